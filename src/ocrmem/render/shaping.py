"""Letters that change beside others: Arabic, Indic and other scripts, joined by HarfBuzz where it is installed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from ocrmem.config.render import RenderSettings
from ocrmem.errors import RenderError

if TYPE_CHECKING:
    from ocrmem.render.fonts import Face, FontSet

_SCRIPTS = (
    "Arabic", "Syriac", "Nko", "Mongolian", "Mandaic", "Adlam", "Hanifi_Rohingya", "Devanagari", "Bengali", "Gurmukhi",
    "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Myanmar", "Khmer", "Tibetan", "Lao",
    "Thai", "Javanese", "Balinese",
)  # fmt: skip
_LETTERS = "".join("\\p{Script=" + name + "}" for name in _SCRIPTS)
JOINING = regex.compile("(?:[" + _LETTERS + r"][\p{M}\u200c\u200d]*)+")
"""Words of scripts whose letters join or stack."""


class Shaper:
    """Shapes words with the first font that has all their letters.

    Raises:
        RenderError: HarfBuzz is not installed.
    """

    def __init__(self, fonts: FontSet, settings: RenderSettings) -> None:
        try:
            self._library: Any = importlib.import_module("uharfbuzz")
        except ImportError:
            raise RenderError(
                "render setting shaping='harfbuzz' needs the package uharfbuzz. Install it with "
                "`pip install 'ocrmem[shaping]'`, or set shaping=none."
            ) from None
        self._fonts = fonts
        self._settings = settings
        self._opened: dict[str, object] = {}

    def draw(self, word: str) -> list[tuple[np.ndarray, int]] | None:
        """(coverage [line_height, w], offset in the word) of each cluster in logical order; None where no font has the
        whole word."""
        visible = "".join(character for character in word if character not in "\u200c\u200d")
        face = self._fonts.face_for(visible)
        if face is None:
            return None
        library = self._library
        font = self._font(face)
        buffer = library.Buffer()
        buffer.add_str(word)
        buffer.guess_segment_properties()
        library.shape(font, buffer)
        glyphs = list(zip(buffer.glyph_infos, buffer.glyph_positions, strict=True))
        clusters: dict[int, list] = {}
        for info, position in glyphs:
            clusters.setdefault(info.cluster, []).append((info.codepoint, position))
        return [(self._cluster(font, clusters[at]), at) for at in sorted(clusters)]

    def _cluster(self, font: object, glyphs: list) -> np.ndarray:
        """One cluster's glyphs, drawn with their left edge at the left of the image."""
        height = self._settings.line_height
        advance = sum(position.x_advance for _, position in glyphs) / 64
        width = max(1, round(advance))
        pen = self._library.RasterDraw()
        pen.extents = self._library.RasterExtents(0, self._fonts.baseline - height, width, height, width)
        x = 0
        for glyph, position in glyphs:
            pen.transform = (
                1 / 64, 0, 0, 1 / 64, (x + position.x_offset) / 64, position.y_offset / 64,
            )  # fmt: skip
            pen.draw_glyph(font, glyph)
            x += position.x_advance
        image = pen.render()
        rows = image.extents.height, image.extents.stride
        ink = np.frombuffer(image.buffer, dtype=np.uint8).reshape(rows)[::-1, : image.extents.width]
        if ink.shape != (height, width):  # nothing to draw
            ink = np.zeros((height, width), dtype=np.uint8)
        return self._fonts.squeeze(np.ascontiguousarray(ink), num_cells=1)

    def _font(self, face: Face) -> object:
        if face.name not in self._opened:
            library = self._library
            blob = library.Blob.from_file_path(str(face.path))
            font = library.Font(library.Face(blob, face.number))
            font.scale = (face.size * 64, face.size * 64)
            self._opened[face.name] = font
        return self._opened[face.name]
