"""Pages of a history that grows: full pages are drawn once."""

from __future__ import annotations

from ocrmem.render.renderer import Renderer
from ocrmem.types import Page

NUM_HISTORIES = 4
"""Histories whose pages are kept. A chat has one and an evaluation goes through conversations one by one, so
a few are enough; a page of 1,280 × 1,280 pixels takes 1.6 MB."""


class HistoryPages:
    """Draws histories, and of a history that has grown only the last page and what follows."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._kept: list[tuple[str, list[Page]]] = []
        """Texts and their pages, the latest last. A list, since the hash of a long text takes longer than a page."""

    def pages(self, text: str) -> list[Page]:
        """The pages of a history's whole text, by `Renderer.pages`."""
        fitting = [number for number, (kept, _) in enumerate(self._kept) if text.startswith(kept)]
        earlier, pages = "", []
        if fitting:
            earlier, pages = self._kept.pop(max(fitting, key=lambda number: len(self._kept[number][0])))
        if len(earlier) < len(text):
            full = pages[:-1]  # the last page may have room, and its last line may break elsewhere
            pages = [*full, *self._renderer.pages(text, start=full[-1].text_end if full else 0)]
        self._kept = [*self._kept, (text, pages)][-NUM_HISTORIES:]
        return list(pages)
