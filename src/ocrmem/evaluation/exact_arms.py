"""Arms of a memory with an exact part: as many tokens as the memory alone, some of them text.

```
[memory without its oldest lines] [ledger] [recalled sentences]        together: the memory's own number of tokens
```

The text stands behind the memory as `Memory` writes it, but without headings: the budgets are of 100 to 250 tokens, of
which they would take too many. What the text does not need stays the memory's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ocrmem.data.processor import MEMProcessor
from ocrmem.evaluation.probes import Probe
from ocrmem.memory.ledger import Ledger
from ocrmem.memory.recall import PageIndex, best, recalled_text
from ocrmem.training.exact_text import ids_behind_memory

RECALL_ARMS = ("memory-recall", "memory-ledger-recall")
EXACT_ARMS = ("memory-ledger", *RECALL_ARMS)
RECALLED_PAGES = 2
LEDGER_SHARE, RECALL_SHARE = 0.04, 0.5
"""Of a budget, the most for ledger and recalled text. Histories are short: more for the ledger is text that nobody
asks for, less for recalled text than a sentence."""


def exact_context(
    arm: str,
    probe: Probe,
    features_PVE: torch.Tensor,
    page_num_tokens: Sequence[int],
    *,
    processor: MEMProcessor,
) -> tuple[list[int], torch.Tensor, list[int]]:
    """What an arm of `EXACT_ARMS` puts in the memory's place for one probe.

    Args:
        features_PVE: the memory of the probe's whole history.
        page_num_tokens: tokens in use of each of its pages.

    Returns:
        ids of the text behind the memory, features_PVE and tokens in use of what is left of the pages.
    """
    chat_format = processor.chat_format
    total = sum(page_num_tokens)
    parts = []
    if "ledger" in arm:
        ledger = Ledger(heading="", count_tokens=chat_format.content_lengths)
        ledger.add(probe.history)
        parts.append(ledger.text(int(total * LEDGER_SHARE)))
    if "recall" in arm:
        texts = [probe.history[page.text_start : page.text_end] for page in processor.pages(probe.history)]
        chosen = best(PageIndex().scores(texts, probe.query), RECALLED_PAGES)
        parts.append(
            recalled_text(
                [texts[i] for i in sorted(chosen)],
                probe.query,
                budget=int(total * RECALL_SHARE),
                count_tokens=chat_format.content_lengths,
            )
        )
    ids = ids_behind_memory(parts, chat_format)
    return ids, *without_oldest(features_PVE, page_num_tokens, len(ids), unit=processor.encoder.tokens_per_unit)


def without_oldest(
    features_PVE: torch.Tensor, page_num_tokens: Sequence[int], number: int, *, unit: int
) -> tuple[torch.Tensor, list[int]]:
    """Pages without so many of their oldest tokens, or a few more: whole units are cut off their beginning."""
    kept, counts = [], []
    for features_VE, count in zip(features_PVE, page_num_tokens, strict=True):
        cut = min(-(-max(number, 0) // unit) * unit, count)
        number -= cut
        if cut < count:
            kept.append(torch.cat([features_VE[cut:], features_VE.new_zeros(cut, features_VE.shape[1])]))
            counts.append(count - cut)
    return torch.stack(kept) if kept else features_PVE[:0], counts
