"""Exact text behind a sample's memory, as `Memory` and the exact arms of the evaluation have it.

```
[memory without its oldest units] [ledger] [recalled sentences]        together: no more than the memory's own tokens
```
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ocrmem.memory.chat_format import ChatFormat
from ocrmem.memory.ledger import Ledger
from ocrmem.memory.recall import recalled_text
from ocrmem.session.memory import LEDGER_HEADING, RECALL_HEADING
from ocrmem.session.prompt import BETWEEN

LEDGER_SHARE, RECALL_SHARE = 0.125, 0.25
"""Of the memory's tokens, what ledger and recalled text may take in the place of its oldest units."""
MIN_UNITS = 3
"""A shorter memory has no exact text."""


def exact_ids(
    texts: Sequence[str], question: str, *, num_tokens: int, chat_format: ChatFormat, rng: np.random.Generator
) -> list[int]:
    """Token ids of what stands behind a memory; none where nothing fits.

    One sample in four has the ledger alone, one the recalled sentences alone, two have both; half have headings.

    Args:
        texts: what the memory shows, in order.
        question: what the sentences are recalled for.
        num_tokens: memory tokens, of which ledger and recalled text get their shares, headings included.
    """
    drawn, headings = int(rng.integers(4)), bool(rng.integers(2))
    parts = []
    if drawn != 0:
        ledger = Ledger(heading=LEDGER_HEADING if headings else "", count_tokens=chat_format.content_lengths)
        for text in texts:
            ledger.add(text)
        parts.append(ledger.text(int(num_tokens * LEDGER_SHARE)))
    if drawn != 1:
        heading = RECALL_HEADING if headings else ""
        budget = int(num_tokens * RECALL_SHARE) - sum(chat_format.content_lengths([heading]))
        # Unrelated sentences too: the projection must hold its own beside text that does not help.
        found = recalled_text(texts, question, budget=budget, count_tokens=chat_format.content_lengths, shared=0.0)
        parts.append(heading + found if found else "")
    return ids_behind_memory(parts, chat_format)


def ids_behind_memory(parts: Sequence[str], chat_format: ChatFormat) -> list[int]:
    """Token ids of texts behind a memory, as `Memory` writes them; empty ones are left out."""
    text = "".join(BETWEEN + part for part in parts if part)
    return chat_format.ids(chat_format.clean(text)) if text else []
