"""Layout: text to lines of glyphs.

Greedy, from left to right in logical order: a line depends only on the text from its own start, so text that is
appended never changes a line before the last, and a full page never changes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import regex

from ocrmem.config.render import RenderSettings
from ocrmem.render.atlas import NEWLINE, ZERO_WIDTH, Atlas
from ocrmem.render.fonts import is_wide

CHUNK = 16384
"""Characters laid out at once; text of any length needs memory for one chunk and one page."""
_COMPLEX = regex.compile(
    r"[\p{M}\p{Cf}\p{Cs}\r\p{Default_Ignorable_Code_Point}\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff"
    r"\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff]"
)
"""Characters that may join their neighbours to a grapheme cluster of several characters."""
_CLUSTER = regex.compile(r"\X")
_CLOSING = frozenset("，。！？、；：）」』】》〉”’…—·,.!?;:)]}%")
"""Characters before which a line of East Asian text is not broken."""
_OTHER, _SPACE, _HYPHEN, _WIDE, _CLOSE, _BREAK = range(6)


@dataclass(frozen=True, eq=False)
class Line:
    """One laid-out line."""

    start: int
    """First character of the source text."""
    end: int
    """One past the last; the next line starts here."""
    glyph_ids_N: np.ndarray
    offsets_N: np.ndarray
    """Source offset of each glyph."""
    widths_N: np.ndarray
    """Pixels; cut so that the line ends at the right margin."""


def layout_lines(text: str, *, start: int, atlas: Atlas, settings: RenderSettings) -> Iterator[Line]:
    """The lines of `text` from `start`, in order."""
    chunk = CHUNK
    while start < len(text):
        end = min(len(text), start + chunk)
        glyph_ids, offsets, classes = _glyphs(text[start:end], atlas)
        lines = list(_break_lines(glyph_ids, offsets + start, classes, end, atlas, settings))
        if end < len(text):
            lines.pop()  # more text may change it
            if not lines:
                chunk *= 2  # one line, or one cluster, longer than the chunk
                continue
        chunk = CHUNK
        yield from lines
        start = lines[-1].end


def _glyphs(text: str, atlas: Atlas) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Glyph ids, offsets and break classes of a text."""
    if _COMPLEX.search(text) is None:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        unique, inverse = np.unique(codes, return_inverse=True)
        ids = np.array([atlas.glyphs(chr(code))[0][0] for code in unique], dtype=np.int64)
        classes = np.array([_break_class(chr(code)) for code in unique], dtype=np.int8)
        return ids[inverse], np.arange(len(text), dtype=np.int64), classes[inverse]
    ids, offsets, classes = [], [], []
    for match in _CLUSTER.finditer(text):
        cluster = match.group()
        break_class = _break_class(cluster[0])
        for glyph, offset in atlas.glyphs(cluster):
            if glyph != ZERO_WIDTH:
                ids.append(glyph)
                offsets.append(match.start() + offset)
                classes.append(break_class)
    return np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64), np.array(classes, dtype=np.int8)


def _break_class(character: str) -> int:
    if character in "\n\r\v\f\x85\u2028\u2029":
        return _BREAK
    if character == "\t" or (unicodedata.category(character) == "Zs" and character not in "\u00a0\u202f\u2007"):
        return _SPACE
    if character in "-‐–—":
        return _HYPHEN
    if character in _CLOSING:
        return _CLOSE
    return _WIDE if is_wide(character) else _OTHER


def _break_lines(
    glyph_ids: np.ndarray,
    offsets: np.ndarray,
    classes: np.ndarray,
    text_end: int,
    atlas: Atlas,
    settings: RenderSettings,
) -> Iterator[Line]:
    """Cut glyphs into lines; one step for each line, none for each glyph."""
    count = len(glyph_ids)
    if count == 0:
        yield Line(text_end, text_end, glyph_ids, offsets, glyph_ids)
        return
    widths = atlas.widths[glyph_ids]
    ends = np.cumsum(widths)
    last_break = np.maximum.accumulate(np.where(_may_break_after(classes), np.arange(count), -1))
    forced = np.nonzero(classes == _BREAK)[0] if settings.line_breaks == "keep" else np.empty(0, dtype=np.int64)
    first = 0
    while first < count:
        used = ends[first - 1] if first else 0
        fits = int(np.searchsorted(ends, used + settings.text_width, side="right"))
        stop = max(fits, first + 1)
        while stop < count and classes[stop] == _SPACE:
            stop += 1  # spaces at the end of a line hang over the margin
        if stop < count and last_break[stop - 1] >= first:
            stop = int(last_break[stop - 1]) + 1
        after = int(np.searchsorted(forced, first))
        if after < len(forced) and forced[after] < stop:
            stop = int(forced[after]) + 1
        yield _line(first, stop, glyph_ids, offsets, widths, text_end, settings.text_width)
        first = stop


def _may_break_after(classes: np.ndarray) -> np.ndarray:
    following = np.append(classes[1:], _BREAK)
    spaced = (classes == _SPACE) | (classes == _BREAK)
    hyphen = (classes == _HYPHEN) & (following == _OTHER)
    wide = ((classes == _WIDE) | (classes == _CLOSE)) & (following == _WIDE)
    wide |= (classes == _WIDE) & (following != _CLOSE)
    wide |= (classes == _OTHER) & (following == _WIDE)
    return spaced | hyphen | wide


def _line(
    first: int,
    stop: int,
    glyph_ids: np.ndarray,
    offsets: np.ndarray,
    widths: np.ndarray,
    text_end: int,
    text_width: int,
) -> Line:
    right = np.minimum(np.cumsum(widths[first:stop]), text_width)
    return Line(
        start=int(offsets[first]),
        end=int(offsets[stop]) if stop < len(offsets) else text_end,
        glyph_ids_N=glyph_ids[first:stop],
        offsets_N=offsets[first:stop],
        widths_N=np.diff(right, prepend=0),
    )


__all__ = ["NEWLINE", "Line", "layout_lines"]
