"""The glyph atlas: every glyph met so far, side by side in one strip, so that a page is drawn by one gather."""

from __future__ import annotations

import unicodedata
from collections import Counter

import numpy as np
import regex

from ocrmem.config.render import RenderSettings
from ocrmem.render.bidi import mirrored
from ocrmem.render.fonts import FontSet
from ocrmem.render.shaping import Shaper

LINE_BREAKS = frozenset("\n\r\v\f\x85\u2028\u2029")
"""Characters that end a line: those of Unicode Standard Annex 14's mandatory breaks."""
BREAK_MARK = "»"
"""What a line break looks like with `line_breaks="mark"`. Of 32 candidates it is the rarest in text among those that
PP-OCRv6-small reads every time between two words without a space; it drops the pilcrow, and reads a bar as an l."""
TAB_SPACES = 4
"""A tab is as wide as four spaces; with `layout="unicode"`, at most: it ends at the next multiple of that width."""
NEWLINE = 0
"""Glyph id of a line break; it has no width where breaks are kept."""
ZERO_WIDTH = 1
"""Glyph id of what is not drawn."""
BLANK = 2
"""Glyph id of blank paper, as wide as the text."""
PIXELS = 16
"""Pixels of a column that numpy gathers at once, and of a row that the extension copies at once: items of 16 bytes are
copied as fast as single ones."""
LINES_AT_ONCE = 8
"""Lines gathered before they are written to the page: they stay in a core's cache."""
INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cf}]")
_BASE = regex.compile(r"\p{M}+|\P{M}\p{M}*", regex.DOTALL)


class Atlas:
    """Bitmaps and widths of glyphs, made when first asked for.

    The rule for what cannot be seen: zero-width, format and bidi control characters, variation selectors, joiners and
    the byte order mark are not drawn; they belong to the glyph before them. Other controls, lone surrogates, private
    use and every character that no font has are drawn as a box with the code point and counted in `missing`; with
    `missing_glyphs="name"`, emoji and other symbols as their Unicode names in brackets.
    """

    def __init__(self, settings: RenderSettings) -> None:
        self._fonts = FontSet(settings)
        self._settings = settings
        self._shaper = Shaper(self._fonts, settings) if settings.shaping == "harfbuzz" else None
        self.missing: Counter[str] = Counter()
        self._ids: dict[str, tuple[tuple[int, int], ...]] = {}
        self._singles: dict[str, int] = {}
        self._mirrors: dict[int, int] = {}
        self._bands = -(-settings.line_height // PIXELS)
        self._strip = np.full((self._bands, 4096, PIXELS), settings.background, dtype=np.uint8)
        self._used = 0
        self._starts = np.zeros(256, dtype=np.int64)
        self._widths = np.zeros(256, dtype=np.int32)
        self._count = 0
        self._pixels = np.zeros(1 << 16, dtype=np.uint8)
        self._pixels_used = 0
        self._places = np.zeros((256, 2), dtype=np.int64)
        self._boxes: dict[int, str] = {}
        mark = np.zeros((settings.line_height, 0), dtype=np.uint8)
        if settings.line_breaks == "mark":
            face = self._fonts.face_for(BREAK_MARK)
            mark = self._fonts.draw_box(ord(BREAK_MARK)) if face is None else self._fonts.draw(face, BREAK_MARK)
        self._add(mark)
        self._add(np.zeros((settings.line_height, 0), dtype=np.uint8))
        self._add(np.zeros((settings.line_height, settings.text_width), dtype=np.uint8))

    def glyphs(self, cluster: str) -> tuple[tuple[int, int], ...]:
        """(glyph id, offset in the cluster) of each glyph of a grapheme cluster, in order."""
        found = self._ids.get(cluster)
        if found is None:
            found = self._ids[cluster] = tuple(self._make(cluster))
        return found

    def word(self, word: str) -> tuple[tuple[int, int], ...]:
        """(glyph id, offset in the word) of each glyph of a word whose letters join, in logical order."""
        if self._shaper is None or INVISIBLE.fullmatch(word):
            return self.glyphs(word)
        found = self._ids.get(word)
        if found is None:
            shaped = self._shaper.draw(word)
            found = tuple(self._make(word) if shaped is None else [(self._add(ink), at) for ink, at in shaped])
            self._ids[word] = found
        return found

    def mirror(self, glyph: int, character: str) -> int:
        """The glyph for `character` in a right-to-left run: `(` is drawn as `)` there, in the same width."""
        if glyph not in self._mirrors:
            other = mirrored(character)
            new = glyph if other is None else self.glyphs(other)[0][0]
            self._mirrors[glyph] = new if self._widths[new] == self._widths[glyph] else glyph
        return self._mirrors[glyph]

    def count_missing(self, glyph_ids_N: np.ndarray) -> None:
        """Count the boxes among the glyphs of a finished page."""
        if self._boxes:
            boxes = np.fromiter(self._boxes, dtype=np.int64)
            if glyph_ids_N.max(initial=0) >= boxes[0]:  # ids grow, so the first box has the least
                counts = np.bincount(glyph_ids_N, minlength=self._count)
                for glyph in boxes[counts[boxes] > 0].tolist():
                    self.missing[self._boxes[glyph]] += int(counts[glyph])

    @property
    def widths(self) -> np.ndarray:
        """int32 widths in pixels by glyph id."""
        return self._widths[: self._count]

    @property
    def starts(self) -> np.ndarray:
        """int64 first column of each glyph in the strip, by glyph id."""
        return self._starts[: self._count]

    @property
    def places(self) -> np.ndarray:
        """int64 [glyphs, 2]: where each glyph's tiles begin in `pixels`, and its width."""
        return self._places[: self._count]

    @property
    def pixels(self) -> np.ndarray:
        """uint8: every glyph cut into tiles of line_height rows of `PIXELS`, from left to right."""
        return self._pixels

    def draw(self, columns_LW: np.ndarray, lines_LHW: np.ndarray) -> None:
        """Write columns of the strip into lines of a page, in place.

        Args:
            columns_LW: int64 column of the strip under each pixel of each line.
            lines_LHW: uint8, L lines of line_height × W pixels; any view of a page.
        """
        num_lines, height, width = lines_LHW.shape
        for band in range(self._bands):
            strip = self._strip[band].view(f"V{PIXELS}")[:, 0]
            top, rows = band * PIXELS, min(PIXELS, height - band * PIXELS)
            for first in range(0, num_lines, LINES_AT_ONCE):
                part = columns_LW[first : first + LINES_AT_ONCE]
                # "clip" spares a pass that looks for bad columns; there are none.
                taken = np.take(strip, part, mode="clip")
                pixels = taken.view(np.uint8).reshape(len(part), width, PIXELS)
                lines_LHW[first : first + LINES_AT_ONCE, top : top + rows] = pixels[:, :, :rows].transpose(0, 2, 1)

    def _make(self, cluster: str) -> list[tuple[int, int]]:
        if cluster[0] in LINE_BREAKS:
            return [(NEWLINE, 0)]
        if cluster[0] == "\t":
            return [(self._space(TAB_SPACES), 0)]
        drawn = INVISIBLE.sub("", cluster)
        if not drawn:
            return [(ZERO_WIDTH, 0)]
        composed = unicodedata.normalize("NFC", drawn)
        first = cluster.index(drawn[0])
        if self._is_drawable(composed) and (face := self._fonts.face_for(composed)) is not None:
            return [(self._add(self._fonts.draw(face, composed)), first)]
        return [glyph for match in _BASE.finditer(cluster) for glyph in self._base(match.group(), match.start())]

    def _base(self, text: str, offset: int) -> list[tuple[int, int]]:
        """The glyphs of one base of a cluster and its marks: one for all where a font has them all, else one for
        each."""
        offsets = [i for i, character in enumerate(text) if not INVISIBLE.match(character)]
        composed = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
        if len(offsets) > 1 and self._is_drawable(composed) and (face := self._fonts.face_for(composed)) is not None:
            return [(self._add(self._fonts.draw(face, composed)), offset + offsets[0])]
        return [(self._single(text[i]), offset + i) for i in offsets]

    def _is_drawable(self, text: str) -> bool:
        """One character, or a base with marks over it; never several bases, which would need shaping, and never
        several marks without a base: they may be the rest of a cluster that was cut, whose marks were drawn alone."""
        categories = [unicodedata.category(character) for character in text]
        return categories[0] not in ("Cc", "Cs") and (
            len(text) == 1 or (categories[0][0] != "M" and all(category[0] == "M" for category in categories[1:]))
        )

    def _single(self, character: str) -> int:
        if character not in self._singles:
            self._singles[character] = self._draw_single(character)
        return self._singles[character]

    def _draw_single(self, character: str) -> int:
        drawable = unicodedata.category(character) not in ("Cc", "Cs")
        face = self._fonts.face_for(character) if drawable else None
        if face is not None:
            return self._add(self._fonts.draw(face, character))
        named = self._settings.missing_glyphs == "name" and unicodedata.category(character) in ("So", "Sm", "Sk", "Sc")
        name = unicodedata.name(character, "") if named else ""
        glyph = self._add(self._fonts.draw_name(name) if name else self._fonts.draw_box(ord(character)))
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
        if self._count == len(self._starts):
            self._starts, self._widths = (np.append(a, np.zeros_like(a)) for a in (self._starts, self._widths))
            self._places = np.concatenate([self._places, np.zeros_like(self._places)])
        contrast = (settings.foreground - settings.background) / 255
        pixels = np.rint(settings.background + coverage * contrast).astype(np.uint8)
        padded = np.full((self._bands * PIXELS, width), settings.background, dtype=np.uint8)
        padded[: len(pixels)] = pixels
        self._strip[:, self._used : self._used + width] = padded.reshape(self._bands, PIXELS, width).transpose(0, 2, 1)
        self._starts[self._count], self._widths[self._count] = self._used, width
        num_tiles = -(-width // PIXELS)
        tiles = np.full((settings.line_height, num_tiles * PIXELS), settings.background, dtype=np.uint8)
        tiles[:, :width] = pixels
        while self._pixels_used + tiles.size > len(self._pixels):
            self._pixels = np.concatenate([self._pixels, np.zeros_like(self._pixels)])
        self._pixels[self._pixels_used : self._pixels_used + tiles.size] = (
            tiles.reshape(settings.line_height, num_tiles, PIXELS).transpose(1, 0, 2).ravel()
        )
        self._places[self._count] = self._pixels_used, width
        self._pixels_used += tiles.size
        self._used += width
        self._count += 1
        return self._count - 1
