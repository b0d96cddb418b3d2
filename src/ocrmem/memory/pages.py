"""Pages of a history that grows: full pages are drawn once."""

from __future__ import annotations

from collections import OrderedDict

from ocrmem.render.renderer import Renderer
from ocrmem.types import Page

NUM_HISTORIES = 4
"""Histories whose pages are kept. A chat has one and an evaluation goes through conversations one by one, so
a few are enough; a page of 1,280 × 1,280 pixels takes 1.6 MB."""


class HistoryPages:
    """Draws histories, and of a history that has grown only the last page and what follows."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._kept: OrderedDict[str, list[Page]] = OrderedDict()

    def pages(self, text: str) -> list[Page]:
        """The pages of a history's whole text, by `Renderer.pages`."""
        earlier = max((kept for kept in self._kept if text.startswith(kept)), key=len, default="")
        pages = self._kept.pop(earlier, [])
        if len(earlier) < len(text):
            full = pages[:-1]  # the last page may have room, and its last line may break elsewhere
            pages = [*full, *self._renderer.pages(text, start=full[-1].text_end if full else 0)]
        self._kept[text] = pages
        while len(self._kept) > NUM_HISTORIES:
            self._kept.popitem(last=False)
        return list(pages)
