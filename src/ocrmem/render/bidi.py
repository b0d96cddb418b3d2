"""Right-to-left text: embedding levels and the order of glyphs on a line (Unicode Standard Annex 9).

python-bidi resolves weak and neutral types and embeddings (rules X1 to X9, W1 to W7, N1 to N2, I1 to I2). Isolates (X5a
to X6a) and paired brackets (N0), which its rules in Python lack, are resolved here.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import regex
from bidi.algorithm import (
    MIRRORED,
    explicit_embed_and_overrides,
    get_empty_storage,
    resolve_implicit_levels,
    resolve_neutral_types,
    resolve_weak_types,
)

from ocrmem.render.breaking import BREAKS

DIRECTED = regex.compile(r"[\p{bc=R}\p{bc=AL}\p{bc=AN}\u202a-\u202e\u2066-\u2069]")
"""Characters that give the line that holds them an order of its own, or may."""
_CONTROLS = regex.compile(r"[\u202a-\u202e\u2066-\u2069]")
_EMBEDDINGS = frozenset("\u202a\u202b\u202d\u202e")
_PDF = "\u202c"
_LRI, _RLI, _FSI, _PDI = "\u2066\u2067\u2068\u2069"
_ISOLATES = frozenset((_LRI, _RLI, _FSI, _PDI))
_KEPT = frozenset(("L", "R", "AL", "EN", "ES", "ET", "AN", "CS", "NSM", "WS", "S", "LRE", "RLE", "LRO", "RLO", "PDF"))
"""Types that the rules are shown as they are; what is drawn and of another type is a neutral."""
DIRECTION_CONTEXT = 2048
"""Characters before a page that are looked at for the direction of a paragraph that goes on there."""
MAX_OPEN = 60
"""Embeddings and isolates within each other; deeper ones are neutrals."""
MAX_BRACKETS = 63
"""Brackets within each other that are paired (BD16)."""
_CANONICAL = {"\u2329": "\u3008", "\u232a": "\u3009"}
_CLOSING: dict[str, str] = {
    opening: closing
    for opening, closing in MIRRORED.items()
    if closing and unicodedata.category(opening) == "Ps" and unicodedata.category(closing) == "Pe"
}
_CLOSERS = frozenset(_CLOSING.values())


def runs_right_to_left(character: str) -> bool:
    """Whether a character gives the line that holds it an order of its own, or may."""
    return DIRECTED.match(character) is not None


def mirrored(character: str) -> str | None:
    """The character that looks like this one in a mirror; None where there is none."""
    return MIRRORED.get(character)


def first_strong(text: str, start: int = 0) -> int | None:
    """0 or 1, the level of the first letter from `start` that is in no isolate begun there, or None without one (rules
    P2 and P3); the end of the isolate that `start` is in ends the search."""
    depth = 0
    for number in range(start, len(text)):
        kind = unicodedata.bidirectional(text[number])
        if kind in ("LRI", "RLI", "FSI"):
            depth += 1
        elif kind == "PDI":
            if depth == 0 and start:
                return None
            depth = max(0, depth - 1)
        elif depth == 0 and kind in ("L", "R", "AL"):
            return int(kind != "L")
    return None


class Paragraph:
    """The direction of a paragraph and what is open in it, as far as its text has been read.

    Lines are resolved one by one, so that no later text changes a line: the direction is that of the first strong
    character so far.
    """

    def __init__(self) -> None:
        self._base: int | None = None
        self._open = ""

    @property
    def base(self) -> int:
        """1 where the paragraph runs from right to left."""
        return self._base or 0

    def is_plain(self, text: str) -> bool:
        """Whether the next line, with this text, runs from left to right throughout."""
        return not self.base and not self._open and DIRECTED.search(text) is None

    def skip(self, text: str) -> None:
        """Read text whose levels are not asked for."""
        whole = self._open + text
        if self._base is None:
            self._base = first_strong(whole)
        open_controls: list[str] = []
        for match in _CONTROLS.finditer(whole):
            control = match.group()
            if control == _PDF:
                if open_controls and open_controls[-1] in _EMBEDDINGS:
                    open_controls.pop()
            elif control == _PDI:
                isolates = [n for n, other in enumerate(open_controls) if other not in _EMBEDDINGS]
                del open_controls[isolates[-1] if isolates else len(open_controls) :]
            elif len(open_controls) < MAX_OPEN:
                if control == _FSI:
                    control = _RLI if first_strong(whole, match.end()) else _LRI
                open_controls.append(control)
        self._open = "".join(open_controls)

    def read(self, text: str) -> list[int]:
        """The embedding level of each character of the next line."""
        before = self._open
        self.skip(text)
        return embedding_levels(before + text, self.base)[len(before) :]


def paragraph_before(text: str, start: int) -> str:
    """The text of the paragraph that the character `start` is in, from its start, or from `DIRECTION_CONTEXT`
    characters before `start`."""
    least = max(0, start - DIRECTION_CONTEXT)
    return text[max(least, *(text.rfind(mark, least, start) + 1 for mark in BREAKS)) : start]


def embedding_levels(text: str, base: int) -> list[int]:
    """The level of each character of a paragraph of level `base`; of those that are not drawn, any."""
    found = [base] * len(text)
    ends = _isolate_ends(text) if _CONTROLS.search(text) else {}
    waiting = [(0, len(text), base, 0)]
    while waiting:
        first, stop, level, depth = waiting.pop()
        sequence: list[dict[str, Any]] = []
        number = first
        while number < stop:
            if (kind := _shown(text[number])) is not None:
                item = {"ch": text[number], "type": kind, "orig": kind, "level": level, "number": number}
                sequence.append(item)
                if number in ends and depth < MAX_OPEN:
                    number = ends[number]
                    continue
            number += 1
        levels = _resolve(sequence, level, found)
        if depth < MAX_OPEN:
            for item in sequence:
                start = item["number"]
                if start in ends:
                    outer = levels[start]
                    is_right = {_LRI: 0, _RLI: 1}.get(text[start], first_strong(text, start + 1) or 0)
                    inner = (outer + 1) | 1 if is_right else (outer + 2) & ~1
                    waiting.append((start + 1, ends[start], inner, depth + 1))
    return found


def visual_order(text: str, levels: list[int], places: list[int], base: int) -> list[int]:
    """The order in which what is drawn stands on a line, from left to right (rules L1 and L2).

    Args:
        text: the line; controls of isolates are not drawn, but take part.
        levels: of each character.
        places: ascending, the character under each glyph.
        base: level of the paragraph.

    Returns:
        The numbers of the glyphs, from left to right.
    """
    numbers = {place: number for number, place in enumerate(places)}
    shown = sorted({*places, *(match.start() for match in _CONTROLS.finditer(text) if match.group() in _ISOLATES)})
    found = [levels[place] for place in shown]
    blank = True  # white space before a tab and at the end of the line
    for number in range(len(shown) - 1, -1, -1):
        kind = unicodedata.bidirectional(text[shown[number]])
        blank = kind == "S" or (blank and kind in ("WS", "LRI", "RLI", "FSI", "PDI"))
        if blank:
            found[number] = base
    return [numbers[shown[number]] for number in _reordered(found) if shown[number] in numbers]


def _reordered(levels: list[int]) -> list[int]:
    order = list(range(len(levels)))
    odd = [level for level in levels if level % 2]
    for least in range(max(levels, default=0), min(odd, default=1) - 1, -1):
        first = 0
        while first < len(order):
            stop = first
            while stop < len(order) and levels[order[stop]] >= least:
                stop += 1
            order[first:stop] = reversed(order[first:stop])
            first = stop + 1
    return order


def _shown(character: str) -> str | None:
    """The type of a character as the rules see it; None where they do not."""
    kind = unicodedata.bidirectional(character)
    if kind in _KEPT:
        return kind
    if kind == "BN" and unicodedata.category(character) == "Cf":
        return None
    return "WS" if kind == "B" else "ON"


def _isolate_ends(text: str) -> dict[int, int]:
    """The place of the end of each isolate, by that of its start; the end of the text where it is not closed (BD9)."""
    ends: dict[int, int] = {}
    waiting: list[int] = []
    for match in _CONTROLS.finditer(text):
        if match.group() in (_LRI, _RLI, _FSI):
            waiting.append(match.start())
            ends[match.start()] = len(text)
        elif match.group() == _PDI and waiting:
            ends[waiting.pop()] = match.start()
    return ends


def _resolve(sequence: list[dict[str, Any]], base: int, found: list[int]) -> dict[int, int]:
    """Write the levels of one sequence, in which isolates are neutrals, to `found`; returns the level around each
    character, before rules W1 to I2, by its number."""
    storage = get_empty_storage()
    storage["base_level"], storage["base_dir"], storage["chars"] = base, "LR"[base % 2], sequence
    explicit_embed_and_overrides(storage)
    around = {item["number"]: item["level"] for item in storage["chars"]}
    resolve_weak_types(storage)
    for run in storage["runs"]:
        _pair_brackets(storage["chars"][run["start"] : run["start"] + run["length"]], run["sor"])
    resolve_neutral_types(storage, False)
    resolve_implicit_levels(storage, False)
    for item in storage["chars"]:
        found[item["number"]] = item["level"]
    return around


def _pair_brackets(run: list[dict[str, Any]], before: str) -> None:
    """Rule N0: the two brackets of a pair have the same direction."""
    pairs: list[tuple[int, int]] = []
    waiting: list[tuple[str, int]] = []
    for number, item in enumerate(run):
        bracket = _CANONICAL.get(item["ch"], item["ch"])
        if item["type"] != "ON" or not (bracket in _CLOSING or bracket in _CLOSERS):
            continue
        if bracket in _CLOSING:
            if len(waiting) == MAX_BRACKETS:
                break
            waiting.append((_CANONICAL.get(_CLOSING[bracket], _CLOSING[bracket]), number))
            continue
        place = next((n for n in range(len(waiting) - 1, -1, -1) if waiting[n][0] == bracket), None)
        if place is not None:
            pairs.append((waiting[place][1], number))
            del waiting[place:]
    for first, last in sorted(pairs):
        embedding = "LR"[run[first]["level"] % 2]
        inside = {_strong(item) for item in run[first + 1 : last]} - {None}
        if not inside:
            continue
        direction = embedding
        if embedding not in inside:
            earlier = (_strong(item) for item in reversed(run[:first]))
            direction = next((strong for strong in earlier if strong), before)
        for number in (first, last):
            run[number]["type"] = direction
            while number + 1 < len(run) and run[number + 1]["orig"] == "NSM":
                number += 1
                run[number]["type"] = direction


def _strong(item: dict[str, Any]) -> str | None:
    """Numbers count as right to left."""
    return {"L": "L", "R": "R", "EN": "R", "AN": "R"}.get(item["type"])
