"""Settings of a memory that grows: how large it may become, and what stays exact."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Self

from ocrmem.errors import ConfigError

DEFAULT_BUDGET, DEFAULT_PAGES = 1024, 7
"""Tokens, and full pages where these are more, of a memory whose budget nobody set."""


@dataclass(frozen=True, kw_only=True)
class GrowingSettings:
    """Budget of one conversation's memory. Lengths are tokens of the LLM's tokenizer or memory tokens."""

    budget_tokens: int | None = None
    """Most tokens that the memory may take in a prompt: pages, ledger and recalled text together; None:
    `DEFAULT_BUDGET`, or `DEFAULT_PAGES` pages where that is more. More is not better: an adapter reads a memory well
    that is about as long as those it was trained with (`docs/memory.md`)."""
    ledger_share: float = 0.08
    """Share of the budget for the ledger of exact identifiers, which every turn reads anew; 0: no ledger."""
    recall: int = 0
    """Pages that are expanded back into text for a question, the most relevant first; 0: none."""
    recall_share: float = 0.125
    """Share of the budget for recalled text; not set aside where `recall` is 0."""
    recall_by: Literal["bm25", "attention"] = "bm25"
    """How the pages of `recall` are found: by BM25 over their text, or by the LLM's attention over memory tokens,
    which costs a second reading of the prompt and knows no page that was left out."""
    densities: tuple[float, ...] = (1.0,)
    """Width of a character on the pages of each level, relative to the adapter's own pages. New pages are of the first
    level; where the memory outgrows its budget, the oldest are drawn again at the next, and left out after the last.
    `(1.0, 0.5)`: the older half of the budget holds twice the text, for an adapter that was trained on both; the
    shipped ones were not, and read nothing from a denser page (`docs/log.md`)."""

    def __post_init__(self) -> None:
        if self.budget_tokens is not None and self.budget_tokens < 1:
            raise ConfigError(f"budget_tokens={self.budget_tokens}: expected 1 or more tokens.")
        for name in ("ledger_share", "recall_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a share from 0 up to, not including, 1.")
        if self.recall < 0:
            raise ConfigError(f"recall={self.recall}: expected 0 or more pages.")
        if self.recall_by not in ("bm25", "attention"):
            raise ConfigError(f"recall_by={self.recall_by!r}: expected 'bm25' or 'attention'.")
        falling = all(a > b for a, b in zip(self.densities, self.densities[1:], strict=False))
        if not self.densities or self.densities[0] != 1.0 or not falling or self.densities[-1] <= 0:
            raise ConfigError(
                f"densities={self.densities}: expected falling numbers above 0 from 1.0 on, such as (1.0, 0.5)."
            )
        if self.ledger_tokens + self.recall_tokens >= self.tokens:
            raise ConfigError(
                f"ledger_share={self.ledger_share} and recall_share={self.recall_share} leave nothing of "
                f"budget_tokens={self.tokens} for pages; lower one of them."
            )

    def resolved(self, tokens_per_page: int) -> Self:
        """The same with a number for the budget, for an encoder whose pages have so many tokens."""
        default = max(DEFAULT_BUDGET, DEFAULT_PAGES * tokens_per_page)
        return self if self.budget_tokens is not None else dataclasses.replace(self, budget_tokens=default)

    @property
    def tokens(self) -> int:
        """The budget; `DEFAULT_BUDGET` where none was given and the encoder is not known yet."""
        return DEFAULT_BUDGET if self.budget_tokens is None else self.budget_tokens

    @property
    def ledger_tokens(self) -> int:
        """Most tokens of the ledger, its heading included."""
        return int(self.tokens * self.ledger_share)

    @property
    def recall_tokens(self) -> int:
        """Most tokens of recalled text, its heading included."""
        return int(self.tokens * self.recall_share) if self.recall else 0

    @property
    def page_tokens(self) -> int:
        """Most memory tokens of pages."""
        return self.tokens - self.ledger_tokens - self.recall_tokens
