"""The renderer: text to pages.

```
text ─▶ layout: grapheme clusters ─▶ glyphs of the atlas ─▶ lines ─▶ raster: one gather a line ─▶ Page
```

Text is drawn in logical order, from left to right; right-to-left scripts are not reordered.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ocrmem.config.render import RenderSettings
from ocrmem.files import write_files
from ocrmem.render.atlas import Atlas
from ocrmem.render.fonts import font_digest
from ocrmem.render.layout import Line, layout_lines
from ocrmem.types import Page

log = logging.getLogger(__name__)

RENDERER_VERSION = 1
"""Raised whenever the same text and settings give other pixels; part of every feature cache key."""


class Renderer:
    """Draws text on pages of fixed settings. Keep one: it remembers every glyph it has drawn.

    Args:
        settings: the page settings.

    Raises:
        RenderError: a font is missing or broken.
    """

    def __init__(self, settings: RenderSettings) -> None:
        self.settings = settings
        self._atlas = Atlas(settings)

    @property
    def missing(self) -> Counter[str]:
        """Characters drawn as boxes so far, and how often."""
        return self._atlas.missing

    def pages(self, text: str, *, start: int = 0) -> list[Page]:
        """All pages of `text` from the character `start`; none for an empty text.

        The pages depend only on the text from `start`, and appended text changes none but the last.
        """
        return list(self.iter_pages(text, start=start))

    def iter_pages(self, text: str, *, start: int = 0) -> Iterator[Page]:
        """`pages` one by one, in memory bounded by one page whatever the text's length."""
        before = self.missing.copy()
        lines = layout_lines(text, start=start, atlas=self._atlas, settings=self.settings)
        while page_lines := list(islice(lines, self.settings.lines_per_page)):
            yield self._draw(page_lines, start)
            start = page_lines[-1].end
        if counted := self.missing - before:
            self._warn(counted)

    def _draw(self, lines: list[Line], start: int) -> Page:
        settings = self.settings
        image_HW = np.full((settings.page_height, settings.page_width), settings.background, dtype=np.uint8)
        boxes = []
        for number, line in enumerate(lines):
            top = settings.margin_top + number * settings.line_height
            right = settings.margin_left + np.cumsum(line.widths_N)
            pixels = self._atlas.draw(line.glyph_ids_N, line.widths_N)
            image_HW[
                top : top + settings.line_height,
                settings.margin_left : settings.margin_left + pixels.shape[1],
            ] = pixels
            box_N4 = np.empty((len(right), 4), dtype=np.int32)
            box_N4[:, 0], box_N4[:, 2] = right - line.widths_N, right
            box_N4[:, 1], box_N4[:, 3] = top, top + settings.line_height
            boxes.append(box_N4)
            self._atlas.count_missing(line.glyph_ids_N)
        return Page(
            image_HW=image_HW,
            text_start=start,
            text_end=lines[-1].end,
            num_lines=len(lines),
            glyph_offsets_N=np.concatenate([line.offsets_N for line in lines]),
            glyph_boxes_N4=np.concatenate(boxes),
        )

    def _warn(self, counted: Counter[str]) -> None:
        shown = ", ".join(f"U+{ord(character):04X} ×{count}" for character, count in counted.most_common(5))
        log.warning(
            "%d characters of %d kinds have no glyph in %s: %s%s; they are drawn as boxes with their code points",
            counted.total(),
            len(counted),
            ", ".join((self.settings.font, *self.settings.fallback_fonts)),
            shown,
            ", …" if len(counted) > 5 else "",
        )


def render_identity(settings: RenderSettings) -> str:
    """Hex digest of everything that decides the pixels of a text: settings, font files, renderer version."""
    fonts = [font_digest(name) for name in (settings.font, *settings.fallback_fonts)]
    values = [RENDERER_VERSION, dataclasses.asdict(settings), fonts]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def save_png(page: Page, path: Path) -> None:
    """Write a page as a grey PNG, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(page.image_HW).save(buffer, format="png")
    write_files(path.parent, {path.name: lambda temporary: temporary.write_bytes(buffer.getvalue())})
