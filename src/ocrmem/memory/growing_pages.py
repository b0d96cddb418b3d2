"""Pages of a history that only grows, within a budget of memory tokens.

```
history:  [left out] [dense pages …] [full pages of the adapter's own settings …] [tail page]
           oldest                                                                  newest
```

A full page never changes. Only the tail page is drawn again when the history grows. Where the pages outgrow their
budget, the oldest of each level are drawn again at the next, denser one; those of the last level are left out. What is
kept is a function of the history's text alone, however it came in pieces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ocrmem.config.render import RenderSettings
from ocrmem.encoders.base import OCREncoder
from ocrmem.errors import ConfigError
from ocrmem.render.renderer import Renderer, render_identity
from ocrmem.types import Page

KEPT = 0.45
"""Share of the budget that is left in use when it was exceeded. The pages, and with them the LLM's cached keys and
values, then stay as they are until the rest of it is full again; the prompt's front is read anew as rarely."""
FEWEST_PAGES = 4
"""Full pages that a budget must have room for, the tail page among them."""


@dataclass(frozen=True, eq=False)
class MemoryPage:
    """One page of a growing history, without its pixels: they are drawn from its text again when needed."""

    level: int
    """Index into the densities; 0: the adapter's own page settings."""
    start: int
    """First character of the history that it holds."""
    text: str
    """What it holds."""
    key: str
    """`page_key` of its features."""
    num_tokens: int
    """Memory tokens in use."""

    @property
    def end(self) -> int:
        """One past the last character that it holds."""
        return self.start + len(self.text)


class GrowingPages:
    """The pages of one history.

    Args:
        encoder: tells the tokens of a page.
        densities: as in `GrowingSettings`.
        budget: most memory tokens of all pages together.
        page_key: text and render identity to the key of a page's features.

    Raises:
        ConfigError: the budget has no room for `FEWEST_PAGES`, or the pages of a level would be too narrow.
    """

    def __init__(
        self,
        encoder: OCREncoder,
        *,
        densities: Sequence[float],
        budget: int,
        page_key: Callable[[str, str], str],
    ) -> None:
        if budget < FEWEST_PAGES * encoder.tokens_per_page:
            raise ConfigError(
                f"the memory's budget leaves {budget} tokens for pages, but a page has {encoder.tokens_per_page}, and "
                f"at least {FEWEST_PAGES} are needed. Raise budget_tokens, or lower the shares of ledger and recall."
            )
        self._encoder = encoder
        self._page_key = page_key
        self._budget = budget - encoder.tokens_per_page  # the tail page may become full at any time
        self._shares = [0.5 ** (level + 1) for level in range(len(densities))]
        self._shares[-1] *= 2  # what is left, so that they add up to 1
        settings = [denser(encoder.page, density) for density in densities]
        self._renderers = [Renderer(each) for each in settings]
        self._identities = [render_identity(each) for each in settings]
        self.full: list[MemoryPage] = []
        """Pages that never change, oldest first; levels fall."""
        self.tail: MemoryPage | None = None
        """The newest page; None before any text."""
        self.left_out = 0
        """Characters at the history's start that no page holds any more."""
        self._tail_text = ""

    @property
    def tokens_per_page(self) -> int:
        """V, the features of one page."""
        return self._encoder.tokens_per_page

    @property
    def pages(self) -> list[MemoryPage]:
        """All pages, oldest first."""
        return self.full if self.tail is None else [*self.full, self.tail]

    @property
    def end(self) -> int:
        """Characters of the history so far."""
        return self._tail_start + len(self._tail_text)

    @property
    def _tail_start(self) -> int:
        return self.full[-1].end if self.full else self.left_out

    def append(self, text: str) -> None:
        """Take text that follows everything before it; pages that become full make room for themselves."""
        if not text:
            return
        self._tail_text += text
        start, taken, waiting = self._tail_start, 0, None
        for page in self._renderers[0].iter_pages(self._tail_text):
            if waiting is not None:
                self.full.append(waiting)
                taken = waiting.end - start
                self._fit()
            waiting = self._record(0, page, self._tail_text, start)
        self._tail_text = self._tail_text[taken:]
        self.tail = waiting

    def restore(self, full: Sequence[MemoryPage], *, left_out: int) -> None:
        """Take full pages that were kept, in place of all pages; the tail's text follows by `append`.

        They must follow each other without a gap from `left_out` on.
        """
        self.full, self.tail, self.left_out, self._tail_text = list(full), None, left_out, ""

    def page(self, level: int, start: int, text: str) -> MemoryPage | None:
        """A page of exactly that text; None where it does not fit on one."""
        pages = list(self._renderers[level].pages(text))
        return self._record(level, pages[0], text, start) if len(pages) == 1 else None

    def draw(self, page: MemoryPage) -> Page:
        """The page with its pixels; offsets are those of its own text."""
        (drawn,) = self._renderers[page.level].pages(page.text)
        return drawn

    def _record(self, level: int, page: Page, text: str, offset: int) -> MemoryPage:
        held = text[page.text_start : page.text_end]
        return MemoryPage(
            level=level,
            start=offset + page.text_start,
            text=held,
            key=self._page_key(held, self._identities[level]),
            num_tokens=self._encoder.num_tokens(page),
        )

    def _fit(self) -> None:
        """Bring the full pages below the budget, if they have outgrown it."""
        if sum(page.num_tokens for page in self.full) <= self._budget:
            return
        keep = KEPT * self._budget
        while sum(page.num_tokens for page in self.full) > keep:
            # The shares add up to 1, so one level at least has more than its own.
            level = next(
                level
                for level, share in enumerate(self._shares)
                if sum(page.num_tokens for page in self.full if page.level == level) > share * keep
            )
            self._move_on(list(self._oldest(level, self._shares[level] * keep)))

    def _oldest(self, level: int, room: float) -> Iterator[MemoryPage]:
        """The oldest pages of a level, so many that the others fit into its room."""
        own = [page for page in self.full if page.level == level]
        tokens = sum(page.num_tokens for page in own)
        for page in own:
            if tokens <= room:
                return
            tokens -= page.num_tokens
            yield page

    def _move_on(self, moved: Sequence[MemoryPage]) -> None:
        """Draw neighbouring pages of one level at the next, or leave them out after the last."""
        first, level = self.full.index(moved[0]), moved[0].level + 1
        denser_pages: list[MemoryPage] = []
        if level < len(self._renderers):
            text = "".join(page.text for page in moved)
            denser_pages = [
                self._record(level, page, text, moved[0].start) for page in self._renderers[level].iter_pages(text)
            ]
        else:
            assert first == 0, "pages of the last level are the oldest"
            self.left_out = moved[-1].end
        self.full[first : first + len(moved)] = denser_pages


def denser(settings: RenderSettings, density: float) -> RenderSettings:
    """Page settings under which a text takes about `density` times the pages.

    Characters of a fixed cell become narrower; proportional type becomes smaller, its lines with it.

    Raises:
        ConfigError: a character would be narrower than a pixel.
    """
    if density == 1.0:
        return settings
    try:
        if settings.cell_width is not None:
            return dataclasses.replace(settings, cell_width=round(settings.cell_width * density))
        side = math.sqrt(density)
        return dataclasses.replace(
            settings,
            font_size=round(settings.font_size * side),
            line_height=round(settings.line_height * side),
        )
    except ConfigError as error:
        raise ConfigError(f"density {density} is too low for these pages: {error}") from error
