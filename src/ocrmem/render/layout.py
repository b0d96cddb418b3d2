"""Layout: text to lines of glyphs.

```
text ─▶ chunks ─▶ Block: glyphs, offsets, widths (tables for single characters, \\X for the rest) ─▶ Line: a range of it
```

Greedy, in logical order: a line depends only on the text from its own start to the first glyph that it has no room
for, so text that is appended never changes a line before the last, and a full page never changes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import regex

from ocrmem.config.render import RenderSettings
from ocrmem.render import native
from ocrmem.render.atlas import INVISIBLE, ZERO_WIDTH, Atlas
from ocrmem.render.bidi import runs_right_to_left
from ocrmem.render.breaking import (
    BREAK,
    BREAKS,
    CONTEXT,
    JOINED,
    SPACE,
    WILD,
    annex_boundaries,
    annex_breaks,
    annex_class,
    simple_breaks,
    simple_class,
)
from ocrmem.render.shaping import JOINING

CHUNK = 65536
"""Characters laid out at once; text of any length needs memory for one chunk and one page."""
LINES_AT_ONCE = 1024
"""Lines that the extension is asked for at once."""
NUM_CODES = 0x110000
_COMPLEX = regex.compile(
    r"[\p{M}\p{Cf}\p{Cs}\r\p{Default_Ignorable_Code_Point}\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff"
    r"\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff]"
)
"""Characters that may join their neighbours to a grapheme cluster of several characters; `_joins` finds the rest."""
_CLUSTER = regex.compile(r"\X")
_WORD = regex.compile(rf"{JOINING.pattern}|\X")
_UNKNOWN, _SIMPLE, _CLUSTERED, _JOINING = range(4)
_KIND, _CLASS, _ANNEX, _RIGHT_TO_LEFT = range(4)
"""Columns of the table of facts about characters."""


@dataclass(frozen=True, eq=False)
class Block:
    """Glyphs of a chunk of text, in logical order; every array has one item a glyph."""

    glyph_ids_N: np.ndarray
    offsets_N: np.ndarray
    """int64: source offset of each glyph."""
    widths_N: np.ndarray
    """int64 pixels. A tab's is set when its line is known."""
    classes_N: np.ndarray
    """Classes of the simple rules."""
    annex_classes_N: np.ndarray | None
    """Classes for Annex 14; None where lines break by the simple rules."""
    right_to_left_N: np.ndarray | None
    """bool: glyphs that make their line need a visual order; None where none does."""
    text: str
    first_offset: int
    """Source offset of the first character of `text`."""


class Line(NamedTuple):
    """One laid-out line: the glyphs [first, stop) of a block."""

    block: Block
    first: int
    stop: int
    start: int
    """First character of the source text."""
    end: int
    """One past the last; the next line starts here."""
    starts_paragraph: bool
    ends_paragraph: bool


class Layout:
    """Lays text out on lines, with the glyphs of one atlas."""

    def __init__(self, atlas: Atlas, settings: RenderSettings) -> None:
        self._atlas = atlas
        self._settings = settings
        self._unicode = settings.layout == "unicode"
        # Tables by code point, filled when a character first occurs; zeros of this size cost nothing until touched.
        self._glyph = np.zeros(NUM_CODES, dtype=np.int64)
        self._facts = np.zeros((NUM_CODES, 4), dtype=np.uint8)
        self._ascii_simple = b""
        self._tab_glyph = atlas.glyphs("\t")[0][0] if self._unicode else -1
        self._tab_width = int(atlas.widths[self._tab_glyph])

    def lines(self, text: str, *, start: int) -> Iterator[Line]:
        """The lines of `text` from the character `start`, in order."""
        chunk, opens = CHUNK, self._opens(text, start)
        while start < len(text):
            end = min(len(text), start + chunk)
            lines = list(self._break_lines(self._block(text[start:end], start), end, opens))
            if end < len(text):
                lines.pop()  # more text may change it
                if not lines:
                    chunk *= 2  # one line, or one cluster, longer than the chunk
                    continue
            chunk = CHUNK
            yield from lines
            start, opens = lines[-1].end, lines[-1].ends_paragraph

    def _opens(self, text: str, start: int) -> bool:
        """Whether a paragraph begins at `start`."""
        while start > 0 and INVISIBLE.match(text[start - 1]):
            start -= 1
        return start == 0 or (self._settings.line_breaks == "keep" and text[start - 1] in BREAKS)

    def _block(self, text: str, start: int) -> Block:
        """The glyphs of a piece of the source text."""
        if text.isascii() and not (raw := text.encode("ascii")).translate(None, self._ascii_simple):
            return self._ascii_block(raw, text, start)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.intp)
        facts = self._facts_of(codes)
        if not facts[_KIND].all():
            self._learn(np.unique(codes[facts[_KIND] == _UNKNOWN]))
            facts = self._facts_of(codes)
        kinds, classes, ids = facts[_KIND], facts[_CLASS], self._glyph.take(codes)
        annex = facts[_ANNEX] if self._unicode else None
        offsets = np.arange(start, start + len(text), dtype=np.int64)
        if (kinds != _SIMPLE).any():
            ids, offsets, classes, annex = self._clustered(text, start, kinds, ids, offsets, classes, annex)
        right_to_left = None
        if self._unicode:
            marks = facts[_RIGHT_TO_LEFT]
            if marks.any():
                right_to_left = marks[offsets - start] == 1
        widths = self._atlas.widths.take(ids)
        return Block(ids, offsets, widths, classes, annex, right_to_left, text, start)

    def _facts_of(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [4, N]: what is known of each character; one look-up of four bytes, then a row for each of them."""
        four = self._facts.view(np.uint32)[:, 0].take(codes)
        return np.ascontiguousarray(four.view(np.uint8).reshape(len(codes), 4).T)

    def _ascii_block(self, raw: bytes, text: str, start: int) -> Block:
        """The glyphs of characters that are known, and each a glyph by itself: tables of bytes, the common case."""
        ids = self._glyph[:256].take(np.frombuffer(raw, dtype=np.uint8))
        classes = np.frombuffer(raw.translate(self._facts[:256, _CLASS].tobytes()), dtype=np.uint8)
        annex = None
        if self._unicode:
            annex = np.frombuffer(raw.translate(self._facts[:256, _ANNEX].tobytes()), dtype=np.uint8)
        offsets = np.arange(start, start + len(text), dtype=np.int64)
        return Block(ids, offsets, self._atlas.widths.take(ids), classes, annex, None, text, start)

    def _learn(self, codes: np.ndarray) -> None:
        """Fill the tables for characters that have not occurred yet."""
        for code in codes.tolist():
            character = chr(code)
            facts = self._facts[code]
            facts[_CLASS] = simple_class(character)
            if self._unicode:
                facts[_ANNEX] = annex_class(character)
                facts[_RIGHT_TO_LEFT] = runs_right_to_left(character)
            if self._settings.shaping != "none" and JOINING.match(character):
                facts[_KIND] = _JOINING
            elif _COMPLEX.match(character) or _joins(character):
                facts[_KIND] = _CLUSTERED
            else:
                facts[_KIND] = _SIMPLE
                self._glyph[code] = self._atlas.glyphs(character)[0][0]
                if code < 128:
                    self._ascii_simple += bytes([code])

    def _clustered(
        self,
        text: str,
        start: int,
        kinds: np.ndarray,
        ids: np.ndarray,
        offsets: np.ndarray,
        classes: np.ndarray,
        annex: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """The arrays, with the glyphs of whole clusters wherever characters may join.

        Between two simple characters is always a boundary of clusters, so only runs of others, and a simple character
        on each side of them, are looked at.
        """
        mixed = kinds != _SIMPLE
        near = mixed.copy()
        near[1:] |= mixed[:-1]
        near[:-1] |= mixed[1:]
        edges = np.flatnonzero(np.diff(near, prepend=False, append=False)).tolist()
        pattern = _WORD if self._settings.shaping != "none" else _CLUSTER
        arrays = (ids, offsets, classes, classes if annex is None else annex)
        parts: list[tuple] = []
        done, dropped = 0, False
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            new: tuple[list, list, list, list] = ([], [], [], [])
            for match in pattern.finditer(text, first, last):
                at, word = match.start(), match.group()
                single = len(word) == 1 and kinds[at] == _SIMPLE
                glyphs = self._atlas.word(word) if kinds[at] == _JOINING else self._atlas.glyphs(word)
                for number, (glyph, offset) in enumerate(glyphs):
                    if glyph == ZERO_WIDTH:
                        dropped = True  # it may have been a zero-width space
                        continue
                    here = at + offset
                    shaped = kinds[at] == _JOINING
                    new[0].append(glyph)
                    new[1].append(start + here)
                    new[2].append(classes[here] if shaped else classes[at])
                    if annex is not None:
                        plain = (single or shaped) and not dropped
                        new[3].append(JOINED if number and not shaped else annex[here] if plain else WILD)
                    dropped = False
            parts += [tuple(a[done:first] for a in arrays), new]
            done = last
        parts.append(tuple(a[done:] for a in arrays))
        columns = list(zip(*parts, strict=True))
        kinds_of = (ids.dtype, offsets.dtype, classes.dtype, np.uint8)
        joined = [
            np.concatenate([np.asarray(part, dtype=kind) for part in column])
            for column, kind in zip(columns, kinds_of, strict=True)
        ]
        return joined[0], joined[1], joined[2], joined[3] if annex is not None else None

    def _break_lines(self, block: Block, text_end: int, opens: bool) -> Iterator[Line]:
        """Cut a block into lines; one step for each line, none for each glyph."""
        classes = block.classes_N
        count, width = len(classes), self._settings.text_width
        if count == 0:
            yield Line(block, 0, 0, text_end, text_end, opens, False)
            return
        known = None
        if block.annex_classes_N is None:
            places = simple_breaks(classes)
        else:
            places, known = annex_breaks(block.annex_classes_N)
        keep, indent = self._settings.line_breaks == "keep", self._settings.first_indent
        is_break = classes == BREAK
        ends_N = np.cumsum(block.widths_N)
        # Single items of a memoryview are read several times faster than those of an array.
        ends, breaks, offsets = ends_N.data, places.data, block.offsets_N.data
        spaces, hard = (classes == SPACE).tobytes(), is_break.tobytes()
        tabs = np.append(np.flatnonzero(block.glyph_ids_N == self._tab_glyph), count).data
        known_places = None if known is None else known.tobytes()
        found = np.empty((LINES_AT_ONCE, 4), dtype=np.int64)
        first = 0
        while first < count:
            next_tab = tabs[bisect_left(tabs, first)]
            if native.blit is not None:
                number, first, opens = native.blit.break_lines(
                    ends_N, places, known_places or b"", spaces, hard, found, next_tab, width, indent, keep,
                    known_places is not None, first, opens,
                )  # fmt: skip
                for begin, stop, starts, closes in found[:number].tolist():
                    end = offsets[stop] if stop < count else text_end
                    yield Line(block, begin, stop, offsets[begin], end, starts == 1, closes == 1)
                if number == len(found) or first == count:
                    continue
            # One line that needs more than tables, or any where there is no extension.
            limit = (ends[first - 1] if first else 0) + width - (indent if opens else 0)
            fits = bisect_right(ends, limit, first)
            if next_tab < fits:
                fits = self._set_tabs(block, ends, tabs, first, limit)
            stop = fits if fits > first else first + 1
            while stop < count and spaces[stop]:
                stop += 1  # spaces at the end of a line hang over the margin
            forced = hard.find(1, first, stop) if keep else -1
            if forced >= 0:
                stop = forced + 1
            elif stop < count:
                number = bisect_right(breaks, stop) - 1
                if number >= 0 and breaks[number] > first and (known_places is None or known_places[number]):
                    stop = breaks[number]
                elif known_places is not None:
                    stop = self._annex_break(block, breaks, known_places, number, first, stop)
            ends_paragraph = keep and hard[stop - 1] == 1
            end = offsets[stop] if stop < count else text_end
            yield Line(block, first, stop, offsets[first], end, opens, ends_paragraph)
            first, opens = stop, ends_paragraph

    def _set_tabs(self, block: Block, ends: memoryview, tabs: memoryview, first: int, limit: int) -> int:
        """Let the tabs of a line end at the next stop; returns the first glyph that no longer fits."""
        full, shift = self._tab_width, 0
        used = ends[first - 1] if first else 0
        fits, tab = bisect_right(ends, limit, first), bisect_left(tabs, first)
        while (at := tabs[tab]) < fits:
            x = ends[at] - full - used + shift
            block.widths_N[at] = full - x % full
            shift -= x % full
            fits = bisect_right(ends, limit - shift, at + 1)
            tab += 1
        return fits

    def _annex_break(self, block: Block, breaks: memoryview, known: bytes, number: int, first: int, stop: int) -> int:
        """The last glyph, `stop` at most, before which Annex 14 lets the next line begin; where there is none, `stop`,
        or the start of its grapheme cluster.

        `number` is that of the last place in `breaks` that is not after `stop`.
        """
        base = first
        if number >= 0 and breaks[number] > first:
            while number >= 0 and breaks[number] > first and not known[number]:
                number -= 1
            base = max(first, breaks[number] if number >= 0 else first)
            if (asked := self._ask(block, base, stop)) is not None:
                return asked
        if base > first:
            return base
        classes = block.annex_classes_N
        assert classes is not None
        whole = stop
        while whole > first and classes[whole] == JOINED:
            whole -= 1
        return whole if whole > first else stop

    def _ask(self, block: Block, base: int, stop: int) -> int | None:
        """The last glyph after `base`, `stop` at most, at which Annex 14 lets a line begin; None where there is none.

        It is shown one character of the next line, so that no later text can change the answer.
        """
        offsets, classes = block.offsets_N, block.annex_classes_N
        assert classes is not None
        last = int(offsets[stop])
        begin = max(int(offsets[base]), last - CONTEXT)
        text = block.text[begin - block.first_offset : last + 1 - block.first_offset]
        for boundary in reversed(annex_boundaries(text)):
            if begin + boundary <= last:
                glyph = int(np.searchsorted(offsets, begin + boundary))
                if glyph <= base:
                    return None
                if classes[glyph] != JOINED:
                    return glyph
        return None


def _joins(character: str) -> bool:
    """Whether a character may be one grapheme cluster with a letter before or after it."""
    return _CLUSTER.match(character + "a").end() > 1 or _CLUSTER.match("a" + character).end() > 1  # type: ignore[union-attr]
