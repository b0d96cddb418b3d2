"""The renderer: text to pages.

```
text ─▶ layout: grapheme clusters ─▶ glyphs of the atlas ─▶ lines ─▶ raster: one gather a page ─▶ Page
```

A page's character map is in logical order whatever the order on paper: glyph N of the map is the Nth of the text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ocrmem.config.render import LATER_SETTINGS, RenderSettings
from ocrmem.files import write_files
from ocrmem.render.atlas import Atlas
from ocrmem.render.fonts import font_digest
from ocrmem.render.layout import Layout
from ocrmem.render.raster import Raster, page_lines
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
        self._layout = Layout(self._atlas, settings)
        self._raster = Raster(self._atlas, settings)

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
        for on_page in page_lines(self._layout.lines(text, start=start), self.settings):
            yield self._raster.page(on_page, text=text, start=start)
            start = on_page[-1].end
        if counted := self.missing - before:
            self._warn(counted)

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
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    given = {
        name: value
        for name, value in dataclasses.asdict(settings).items()
        if name not in LATER_SETTINGS or value != defaults[name]
    }
    values = [RENDERER_VERSION, given, fonts]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def save_png(page: Page, path: Path) -> None:
    """Write a page as a grey PNG, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(page.image_HW).save(buffer, format="png")
    write_files(path.parent, {path.name: lambda temporary: temporary.write_bytes(buffer.getvalue())})
