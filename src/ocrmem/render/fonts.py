"""Fonts: which one has a character, and how it looks in its place on a line."""

from __future__ import annotations

import hashlib
import struct
import unicodedata
from pathlib import Path

import numpy as np
import regex
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

from ocrmem.assets.fetch import asset_revision, resolve
from ocrmem.config.render import RenderSettings
from ocrmem.errors import RenderError
from ocrmem.render.hexbox import hex_box

BUNDLED = {"dejavu-sans": "DejaVuSans.ttf", "dejavu-sans-mono": "DejaVuSansMono.ttf"}
FETCHED = {
    "noto-sans-sc": None,
    "noto-sans-kr": "Hang",
    "noto-sans-devanagari": "Deva",
    "noto-sans-thai": "Thai",
    "noto-sans-tamil": "Taml",
    "noto-sans-telugu": "Telu",
    "noto-sans-khmer": "Khmr",
    "noto-sans-arabic": "Arab",
}
"""The script (ISO 15924) that a font is asked about as a fallback; None: about any character. So an emoji that no font
has does not fetch and open them all."""
MAX_MARKS = 30
"""Combining marks drawn over one base; Unicode's stream-safe text (Standard Annex 15) has no more."""
FOLDER = Path(__file__).with_name("font_files")


def font_path(name: str) -> Path:
    """The file of a bundled font, a fetched one (downloaded on first use), or a path without its `#number`.

    Raises:
        RenderError: there is no such font.
        AssetError: the font could not be fetched.
    """
    if name in BUNDLED:
        return FOLDER / BUNDLED[name]
    if name in FETCHED:
        return resolve(name)
    path = Path(_split_number(name)[0])
    if path.is_file():
        return path
    raise RenderError(
        f"font {name!r} is neither bundled ({', '.join(BUNDLED)}), nor fetchable ({', '.join(FETCHED)}), nor a file. "
        "Give one of these names, or the path of a TrueType or OpenType file (path#1: the second font of a collection)."
    )


def _split_number(name: str) -> tuple[str, int]:
    """Path and number of a font: `fonts.ttc#1` is the second font of a collection."""
    path, mark, number = name.rpartition("#")
    if mark and number.isascii() and number.isdecimal() and not Path(name).is_file():
        return path, int(number)
    return name, 0


def font_digest(name: str) -> str:
    """SHA-256 of a font's file, without fetching it."""
    if name in FETCHED:
        return asset_revision(name)
    return hashlib.sha256(font_path(name).read_bytes()).hexdigest()


class Face:
    """One font file at one size."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.path, self.number = path, number = font_path(name), _split_number(name)[1]
        try:
            self.font = ImageFont.truetype(str(path), size, index=number, layout_engine=ImageFont.Layout.BASIC)
            with TTFont(path, fontNumber=number, lazy=True) as tables:
                self.characters = frozenset(tables.getBestCmap() or ())
        except (OSError, TTLibError, KeyError, ValueError, AssertionError, struct.error) as error:
            raise RenderError(f"font file {str(path)!r} is no readable font: {error}. Give another font.") from error
        if not self.characters:
            raise RenderError(f"font file {str(path)!r} has no Unicode character map. Give another font.")

    def coverage(self, text: str, *, height: int, baseline: int) -> np.ndarray:
        """Coverage [height, advance of the base] of a base and its marks on the baseline, 0 to 255."""
        base, marks = text[0], text[1 : 1 + MAX_MARKS]
        advance = self.font.getlength(base)
        image = Image.new("L", (max(1, round(advance)), height), 0)
        pen = ImageDraw.Draw(image)
        pen.text((0, baseline), base, fill=255, font=self.font, anchor="ls")
        for mark in marks:
            # A mark without an advance reaches back over its base; in a monospaced font it has a cell of its own.
            place = advance if self.font.getlength(mark) == 0 else 0
            pen.text((place, baseline), mark, fill=255, font=self.font, anchor="ls")
        return np.asarray(image)


class FontSet:
    """The fonts of the page settings, tried in order; fallbacks are opened when a character first needs them."""

    def __init__(self, settings: RenderSettings) -> None:
        self._settings = settings
        self.names = (settings.font, *settings.fallback_fonts)
        self._faces: dict[int, Face] = {}
        self._scripts = [
            regex.compile(rf"\p{{Script_Extensions={script}}}") if number and (script := FETCHED.get(name)) else None
            for number, name in enumerate(self.names)
        ]
        self._primary = self._face(0)
        ascent, descent = self._primary.font.getmetrics()
        spare = settings.line_height - ascent - descent
        self.baseline = settings.line_height - descent - max(0, spare // 2)
        """Below the middle of the spare room; where there is none, descenders stay whole and high accents are cut."""

    def _face(self, index: int) -> Face:
        if index not in self._faces:
            self._faces[index] = Face(self.names[index], self._settings.font_size)
        return self._faces[index]

    def face_for(self, text: str) -> Face | None:
        """The first font that has every character of `text`; None where none has."""
        codes = {ord(character) for character in text}
        for index, script in enumerate(self._scripts):
            if (script is None or script.search(text)) and codes <= self._face(index).characters:
                return self._face(index)
        return None

    def draw(self, face: Face, text: str) -> np.ndarray:
        """Coverage [line_height, w] of one glyph, squeezed into its cells where the settings have cells."""
        coverage = face.coverage(text, height=self._settings.line_height, baseline=self.baseline)
        return self.squeeze(coverage, num_cells=2 if is_wide(text[0]) else 1)

    def squeeze(self, coverage: np.ndarray, *, num_cells: int) -> np.ndarray:
        """Coverage [line_height, w] brought to the width that the settings say."""
        settings, width = self._settings, coverage.shape[1]
        if settings.cell_width is not None:
            width = settings.cell_width * num_cells
            if num_cells == 2 and settings.wide_cell_width is not None:
                width = settings.wide_cell_width
        elif settings.horizontal_scale != 1:
            width = max(1, round(width * settings.horizontal_scale))
        else:
            return coverage
        return np.asarray(Image.fromarray(coverage).resize((width, coverage.shape[0]), Image.Resampling.BOX))

    def draw_name(self, name: str) -> np.ndarray:
        """Coverage [line_height, w] of a character's name in brackets, at most as wide as the text."""
        letters = [self.draw(self._primary, letter) for letter in f"[{name.lower()}]"]
        return np.concatenate(letters, axis=1)[:, : self._settings.text_width]

    def draw_box(self, code: int) -> np.ndarray:
        """Coverage [line_height, w] of the box for a character that no font has."""
        settings = self._settings
        box = hex_box(code, height=min(settings.line_height, settings.font_size))
        width = box.shape[1] + 1
        if settings.cell_width is not None:
            width = -(-width // settings.cell_width) * settings.cell_width
        coverage = np.zeros((settings.line_height, width), dtype=np.uint8)
        top = max(0, min(self.baseline - box.shape[0] + box.shape[0] // 8, settings.line_height - box.shape[0]))
        coverage[top : top + box.shape[0], : box.shape[1]] = box
        return coverage


def is_wide(character: str) -> bool:
    """Whether a character takes two cells (Unicode Standard Annex 11: wide or full width)."""
    return unicodedata.east_asian_width(character) in "WF"
