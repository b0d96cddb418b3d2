"""The glyph atlas: every glyph met so far, side by side in one strip, so that a line is drawn by one gather."""

from __future__ import annotations

import unicodedata
from collections import Counter

import numpy as np
import regex

from ocrmem.config.render import RenderSettings
from ocrmem.render.fonts import FontSet

LINE_BREAKS = frozenset("\n\r\v\f\x85\u2028\u2029")
"""Characters that end a line: those of Unicode Standard Annex 14's mandatory breaks."""
BREAK_MARK = "»"
"""What a line break looks like with `line_breaks="mark"`. Of 32 candidates it is the rarest in text among those that
PP-OCRv6-small reads every time between two words without a space; it drops the pilcrow, and reads a bar as an l."""
TAB_SPACES = 4
"""A tab is as wide as four spaces."""
NEWLINE = 0
"""Glyph id of a line break; it has no width where breaks are kept."""
ZERO_WIDTH = 1
"""Glyph id of what is not drawn."""
_INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cf}]")


class Atlas:
    """Bitmaps and widths of glyphs, made when first asked for.

    The rule for what cannot be seen: zero-width, format and bidi control characters, variation selectors, joiners and
    the byte order mark are not drawn; they belong to the glyph before them. Other controls, lone surrogates, private
    use and every character that no font has are drawn as a box with the code point, and counted in `missing`.
    """

    def __init__(self, settings: RenderSettings) -> None:
        self._fonts = FontSet(settings)
        self._settings = settings
        self.missing: Counter[str] = Counter()
        self._ids: dict[str, tuple[tuple[int, int], ...]] = {}
        self._strip = np.full((settings.line_height, 4096), settings.background, dtype=np.uint8)
        self._used = 0
        self._starts: list[int] = []
        self._widths: list[int] = []
        self._boxes: dict[int, str] = {}
        mark = np.zeros((settings.line_height, 0), dtype=np.uint8)
        if settings.line_breaks == "mark":
            face = self._fonts.face_for(BREAK_MARK)
            mark = self._fonts.draw_box(ord(BREAK_MARK)) if face is None else self._fonts.draw(face, BREAK_MARK)
        self._add(mark)
        self._add(np.zeros((settings.line_height, 0), dtype=np.uint8))

    def glyphs(self, cluster: str) -> tuple[tuple[int, int], ...]:
        """(glyph id, offset in the cluster) of each glyph of a grapheme cluster, in order."""
        found = self._ids.get(cluster)
        if found is None:
            found = self._ids[cluster] = tuple(self._make(cluster))
        return found

    def count_missing(self, glyph_ids: np.ndarray) -> None:
        """Count the boxes among the glyphs of a finished line."""
        if self._boxes:
            for glyph in glyph_ids.tolist():
                if glyph in self._boxes:
                    self.missing[self._boxes[glyph]] += 1

    @property
    def widths(self) -> np.ndarray:
        """int64 widths in pixels by glyph id."""
        return np.asarray(self._widths, dtype=np.int64)

    def draw(self, glyph_ids: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Pixels [line_height, sum of widths] of glyphs side by side."""
        starts = np.asarray(self._starts, dtype=np.int64)[glyph_ids]
        before = np.cumsum(widths) - widths
        columns = np.repeat(starts - before, widths) + np.arange(widths.sum())
        return self._strip[:, columns]

    def _make(self, cluster: str) -> list[tuple[int, int]]:
        if cluster[0] in LINE_BREAKS:
            return [(NEWLINE, 0)]
        if cluster[0] == "\t":
            return [(self._space(TAB_SPACES), 0)]
        drawn = _INVISIBLE.sub("", cluster)
        if not drawn:
            return [(ZERO_WIDTH, 0)]
        composed = unicodedata.normalize("NFC", drawn)
        first = cluster.index(drawn[0])
        if self._is_drawable(composed) and (face := self._fonts.face_for(composed)) is not None:
            return [(self._add(self._fonts.draw(face, composed)), first)]
        offsets = [i for i, character in enumerate(cluster) if not _INVISIBLE.match(character)]
        return [(self._single(cluster[offset]), offset) for offset in offsets]

    def _is_drawable(self, text: str) -> bool:
        """One character, or a base with marks over it; never several bases, which would need shaping."""
        return unicodedata.category(text[0]) not in ("Cc", "Cs") and all(
            unicodedata.category(c)[0] == "M" for c in text[1:]
        )

    def _single(self, character: str) -> int:
        drawable = unicodedata.category(character) not in ("Cc", "Cs")
        face = self._fonts.face_for(character) if drawable else None
        if face is not None:
            return self._add(self._fonts.draw(face, character))
        glyph = self._add(self._fonts.draw_box(ord(character)))
        self._boxes[glyph] = character
        return glyph

    def _space(self, count: int) -> int:
        face = self._fonts.face_for(" ")
        width = self._settings.font_size // 4 if face is None else self._fonts.draw(face, " ").shape[1]
        return self._add(np.zeros((self._settings.line_height, width * count), dtype=np.uint8))

    def _add(self, coverage: np.ndarray) -> int:
        settings, width = self._settings, coverage.shape[1]
        while self._used + width > self._strip.shape[1]:
            self._strip = np.concatenate([self._strip, np.full_like(self._strip, settings.background)], axis=1)
        contrast = (settings.foreground - settings.background) / 255
        pixels = np.rint(settings.background + coverage * contrast)
        self._strip[:, self._used : self._used + width] = pixels
        self._starts.append(self._used)
        self._widths.append(width)
        self._used += width
        return len(self._widths) - 1
