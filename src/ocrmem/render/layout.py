"""Layout: text to lines of glyphs.

```
text ─▶ chunks ─▶ Block: glyphs, offsets, widths (tables for single characters, \\X for the rest) ─▶ Lines: ranges of it
```

Greedy, in logical order: a line depends only on the text from its own start to the first glyph that it has no room
for, so text that is appended never changes a line before the last, and a full page never changes.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import regex

from ocrmem.config.render import RenderSettings
from ocrmem.render import native
from ocrmem.render.atlas import INVISIBLE, ZERO_WIDTH, Atlas
from ocrmem.render.bidi import DIRECTED, paragraph_before, runs_right_to_left
from ocrmem.render.breaking import (
    ANNEX_TABLE,
    BREAK,
    BREAKS,
    CONTEXT,
    JOINED,
    LATER,
    SIMPLE_TABLE,
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
    """int32."""
    offsets_N: np.ndarray
    """int64: source offset of each glyph."""
    widths_N: np.ndarray
    """int32 pixels. A tab's is set when its line is known."""
    classes_N: np.ndarray
    """uint8: classes of the simple rules."""
    annex_classes_N: np.ndarray | None
    """uint8: classes for Annex 14; None where lines break by the simple rules."""
    directed: bool
    """Whether a line may need an order of its own, or stand at the right."""
    text: str
    first_offset: int
    """Source offset of the first character of `text`."""

    def end_of(self, stop: int) -> int:
        """Source offset at which a line ends that holds the glyphs before `stop`; the next line starts there."""
        return int(self.offsets_N[stop]) if stop < len(self.offsets_N) else self.first_offset + len(self.text)


class Lines(NamedTuple):
    """Laid-out lines of one block, one after the other."""

    block: Block
    rows_L4: np.ndarray
    """int64: a line's first glyph in the block, one past its last, whether it starts a paragraph, whether it ends
    one."""

    @property
    def end(self) -> int:
        """Source offset at which the text of the next line starts."""
        return self.block.end_of(int(self.rows_L4[-1, 1]))


class Layout:
    """Lays text out on lines, with the glyphs of one atlas."""

    def __init__(self, atlas: Atlas, settings: RenderSettings) -> None:
        self._atlas = atlas
        self._settings = settings
        self._unicode = settings.layout == "unicode"
        # Tables by code point, filled when a character first occurs; zeros of this size cost nothing until touched.
        self._glyph = np.zeros(NUM_CODES, dtype=np.int32)
        self._facts = np.zeros((NUM_CODES, 4), dtype=np.uint8)
        self._ascii_simple = b""
        self._tab_glyph = atlas.glyphs("\t")[0][0] if self._unicode else -1
        self._tab_width = int(atlas.widths[self._tab_glyph])
        self._directed = False
        """Whether right-to-left text has been met; then each line is looked at."""

    def lines(self, text: str, *, start: int) -> Iterator[Lines]:
        """The lines of `text` from the character `start`, in order, some hundreds at a time."""
        chunk, opens = CHUNK, self._opens(text, start)
        if self._unicode and start and not self._directed:
            before = paragraph_before(text, start)
            self._directed = not before.isascii() and DIRECTED.search(before) is not None
        while start < len(text):
            end = min(len(text), start + chunk)
            block = self._block(text[start:end], start)
            rows_L4 = self._break_lines(block, opens)
            if end < len(text):
                rows_L4 = rows_L4[:-1]  # more text may change the last line
                if not len(rows_L4):
                    chunk *= 2  # one line, or one cluster, longer than the chunk
                    continue
            chunk = CHUNK
            lines = Lines(block, rows_L4)
            yield lines
            start, opens = lines.end, bool(rows_L4[-1, 3])

    def _opens(self, text: str, start: int) -> bool:
        """Whether a paragraph begins at `start`."""
        while start > 0 and INVISIBLE.match(text[start - 1]):
            start -= 1
        return start == 0 or (self._settings.line_breaks == "keep" and text[start - 1] in BREAKS)

    def _block(self, text: str, start: int) -> Block:
        """The glyphs of a piece of the source text."""
        if native.blit is not None and (block := self._simple_block(text, start)) is not None:
            return block
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
        self._directed |= self._unicode and bool(facts[_RIGHT_TO_LEFT].any())
        widths = self._atlas.widths.take(ids)
        return Block(ids, offsets, widths, classes, annex, self._directed, text, start)

    def _simple_block(self, text: str, start: int) -> Block | None:
        """The glyphs of characters that are known, and each a glyph by itself; None where one is not."""
        count = len(text)
        ids, widths = np.empty((2, count), dtype=np.int32)
        classes, annex = np.empty((2, count), dtype=np.uint8)
        known, marked = native.blit.look_up(
            text, self._glyph, self._facts, self._atlas.widths, ids, widths, classes, annex, _SIMPLE
        )
        if known < count:
            return None
        self._directed |= marked
        offsets = np.arange(start, start + count, dtype=np.int64)
        return Block(ids, offsets, widths, classes, annex if self._unicode else None, self._directed, text, start)

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
        return Block(ids, offsets, self._atlas.widths.take(ids), classes, annex, self._directed, text, start)

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
                    later = number > 0 and not shaped
                    marks = later and unicodedata.category(text[here])[0] == "M"
                    new[2].append(classes[here] | LATER if marks else classes[here])
                    if annex is not None:
                        plain = (single or shaped) and not dropped
                        new[3].append(JOINED if later else annex[here] if plain else WILD)
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

    def _break_lines(self, block: Block, opens: bool) -> np.ndarray:
        """Cut a block into lines, `Lines.rows_L4`; `opens` says whether the first starts a paragraph."""
        count = len(block.classes_N)
        if count == 0:
            return np.array([[0, 0, opens, False]], dtype=np.int64)
        if native.blit is None:
            return self._break_lines_alone(block, opens)
        settings, annex = self._settings, block.annex_classes_N is not None
        table = ANNEX_TABLE if annex else SIMPLE_TABLE
        has_tabs = self._unicode and "\t" in block.text
        measured: tuple[memoryview, memoryview] | None = None
        parts, first, room, tab = [], 0, LINES_AT_ONCE, self._tab_glyph if has_tabs else -1
        while first < count:
            rows_L4 = np.empty((room, 4), dtype=np.int64)
            num_lines, first, opens, base, stop, asks = native.blit.break_lines(
                block.widths_N, block.glyph_ids_N, block.classes_N, block.annex_classes_N if annex else block.classes_N,
                table, rows_L4, tab, settings.text_width, settings.first_indent, settings.line_breaks == "keep", annex,
                SPACE, BREAK, first, opens,
            )  # fmt: skip
            parts.append(rows_L4[:num_lines])
            room, tab = LINES_AT_ONCE, self._tab_glyph if has_tabs else -1
            if num_lines == len(rows_L4) or first == count:
                continue
            if stop == first:  # a tab: with its width set, this one line is asked for again
                measured = measured or (np.cumsum(block.widths_N, dtype=np.int64).data, self._tabs(block))
                self._set_tabs(block, *measured, first, self._limit(measured[0], first, opens))
                room, tab = 1, -1
                continue
            stop = self._annex_break(block, first, base, stop, asks)
            closes = settings.line_breaks == "keep" and block.classes_N[stop - 1] == BREAK
            parts.append(np.array([[first, stop, opens, closes]], dtype=np.int64))
            first, opens = stop, bool(closes)
        return np.concatenate(parts)

    def _break_lines_alone(self, block: Block, opens: bool) -> np.ndarray:
        """`_break_lines` without the extension: one step for each line, none for each glyph."""
        classes = block.classes_N
        count, known = len(classes), None
        if block.annex_classes_N is None:
            places = simple_breaks(classes)
        else:
            places, known = annex_breaks(block.annex_classes_N)
        keep = self._settings.line_breaks == "keep"
        # Single items of a memoryview are read several times faster than those of an array.
        ends, breaks = np.cumsum(block.widths_N, dtype=np.int64).data, places.data
        spaces, hard = (classes == SPACE).tobytes(), (classes == BREAK).tobytes()
        tabs = self._tabs(block)
        known_places = None if known is None else known.tobytes()
        rows: list[tuple[int, int, bool, bool]] = []
        first = 0
        while first < count:
            limit = self._limit(ends, first, opens)
            fits = bisect_right(ends, limit, first)
            if tabs[bisect_left(tabs, first)] < fits:
                fits = self._set_tabs(block, ends, tabs, first, limit)
            stop = fits if fits > first else first + 1
            while stop < count and spaces[stop]:
                stop += 1  # spaces at the end of a line hang over the margin
            forced = hard.find(1, first, stop) if keep else -1
            if forced >= 0:
                stop = forced + 1
            elif stop < count:
                number = last = bisect_right(breaks, stop) - 1
                while number >= 0 and breaks[number] > first and known_places is not None and not known_places[number]:
                    number -= 1
                base = breaks[number] if number >= 0 and breaks[number] > first else first
                if base > first and number == last:
                    stop = base
                elif known_places is not None:
                    stop = self._annex_break(block, first, base, stop, number < last)
                else:
                    stop = _whole(classes, range(LATER, 2 * LATER), first, stop)
            closes = keep and hard[stop - 1] == 1
            rows.append((first, stop, opens, closes))
            first, opens = stop, closes
        return np.array(rows, dtype=np.int64)

    def _limit(self, ends: memoryview, first: int, opens: bool) -> int:
        """Where among `ends` the line from the glyph `first` must end."""
        start = ends[first - 1] if first else 0
        return start + self._settings.text_width - (self._settings.first_indent if opens else 0)

    def _tabs(self, block: Block) -> memoryview:
        """Numbers of the glyphs that are tabs, and one past the last glyph."""
        return np.append(np.flatnonzero(block.glyph_ids_N == self._tab_glyph), len(block.glyph_ids_N)).data

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

    def _annex_break(self, block: Block, first: int, base: int, stop: int, asks: bool) -> int:
        """The last glyph, `stop` at most, before which Annex 14 lets the next line begin; where there is none, `stop`,
        or the start of its grapheme cluster.

        `base` is the last such place that the tables know, or `first`; `asks` says that they leave later ones open.
        """
        if asks and (asked := self._ask(block, base, stop)) is not None:
            return asked
        if base > first:
            return base
        assert block.annex_classes_N is not None
        return _whole(block.annex_classes_N, (JOINED,), first, stop)

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


def _whole(classes_N: np.ndarray, later: Container[int], first: int, stop: int) -> int:
    """The last glyph, `stop` at most, that is in none of the classes `later`; `stop` where none is after `first`."""
    start = stop
    while start > first and int(classes_N[start]) in later:
        start -= 1
    return start if start > first else stop


def _joins(character: str) -> bool:
    """Whether a character may be one grapheme cluster with a letter before or after it."""
    return _CLUSTER.match(character + "a").end() > 1 or _CLUSTER.match("a" + character).end() > 1  # type: ignore[union-attr]
