"""The renderer: text to pages.

```
text ─▶ layout: grapheme clusters ─▶ glyphs of the atlas ─▶ lines ─▶ raster: one gather a page ─▶ Page
```

A page's character map is in logical order whatever the order on paper: glyph N of the map is the Nth of the text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator

from ocrmem.config.render import LATER_SETTINGS, RenderSettings
from ocrmem.render.atlas import Atlas
from ocrmem.render.bidi import DIRECTION_CONTEXT
from ocrmem.render.fonts import font_digest
from ocrmem.render.layout import Layout
from ocrmem.render.raster import Raster, page_lines
from ocrmem.types import Page

log = logging.getLogger(__name__)

RENDERER_VERSION = 1
"""Raised whenever the same text and settings give other pixels; part of every feature cache key."""

STREAM_PIECE = 1 << 17
"""Characters of a stream that are laid out at once, at least."""


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
        yield from self._draw(text, start)

    def iter_stream(self, pieces: Iterable[str]) -> Iterator[Page]:
        """The pages of all pieces joined, in memory bounded by one piece and one page.

        Args:
            pieces: a text in parts of any length, such as a file read a million characters at a time.
        """
        text, start, base, enough = "", 0, 0, STREAM_PIECE
        waiting: list[str] = []
        size = 0
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size < enough:
                continue
            text, size = text + "".join(waiting), 0
            waiting.clear()
            enough *= 2  # while no page is full, so that no text is laid out more than twice
            kept = 0
            # The last page waits for more text, which may change it.
            for page in self._draw(text, start, finished=False):
                yield _moved(page, base)
                start, enough = page.text_end, STREAM_PIECE
                kept = int(page.glyph_offsets_N[-1]) if len(page.glyph_offsets_N) else page.text_start
            # The last glyph before the next page stays, since a paragraph begins after a line break, and what tells the
            # direction of a paragraph that goes on.
            kept = max(0, min(kept, start - DIRECTION_CONTEXT))
            text, start, base = text[kept:], start - kept, base + kept
        for page in self._draw(text + "".join(waiting), start):
            yield _moved(page, base)

    def _draw(self, text: str, start: int, *, finished: bool = True) -> Iterator[Page]:
        """Pages from `start`, without the last where the text goes on."""
        before = self.missing.copy()
        waiting = None
        for on_page in page_lines(self._layout.lines(text, start=start), self.settings):
            if waiting is not None:
                yield self._raster.page(waiting, text=text, start=start)
                start = waiting[-1].end
            waiting = on_page
        if finished and waiting is not None:
            yield self._raster.page(waiting, text=text, start=start)
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


def _moved(page: Page, distance: int) -> Page:
    """The same page of a text that has `distance` characters more in front."""
    return dataclasses.replace(
        page,
        text_start=page.text_start + distance,
        text_end=page.text_end + distance,
        glyph_offsets_N=page.glyph_offsets_N + distance,
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
