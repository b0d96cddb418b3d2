"""The memory's rivals: what each arm puts in the memory's place, all of the same length.

```
[system … CONTEXT] [turns] [reply]        CONTEXT: nothing | text tokens | memory tokens | both
```

Every arm has the same template, the same recent turns and the same reply; they differ in the context alone. The budget
of a probe is the number of memory tokens that its history takes, and no arm but `full-text` gets more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ocrmem.data.processor import MEMProcessor, stack_pages
from ocrmem.errors import ConfigError
from ocrmem.evaluation.exact_arms import EXACT_ARMS, RECALL_ARMS, exact_context
from ocrmem.evaluation.probes import Probe
from ocrmem.evaluation.rivals import Rival, history_slots
from ocrmem.memory.features import encode_pages
from ocrmem.memory.recall import SENTENCE, load_bm25s

try:
    bm25s = load_bm25s()
except ConfigError:  # the arms that need it are left out, and named
    bm25s = None

PAGES_AT_ONCE = 64
"""Pages drawn into one tensor for the encoder."""


@dataclass(frozen=True, eq=False)
class Context:
    """What one arm puts in the memory's place for one probe."""

    text_ids: list[int] = field(default_factory=list)
    """Text tokens, in front of the memory tokens if there are both."""
    features_PVE: torch.Tensor | None = None
    page_num_tokens: list[int] = field(default_factory=list)
    exact_ids: list[int] = field(default_factory=list)
    """Text tokens behind the memory tokens."""
    order: list[int] | None = None
    """A permutation of the memory tokens after the projection; None: as they come."""
    rival: Rival | None = None
    """Whose projection makes the memory tokens; None: the memory's own."""
    slots_PVT: torch.Tensor | None = None
    """What a rival reads in place of `features_PVE`: token ids, -1 where there is none."""

    @property
    def num_tokens(self) -> int:
        """Positions that it takes."""
        return len(self.text_ids) + sum(self.page_num_tokens) + len(self.exact_ids)


class Contexts:
    """Makes the contexts of a list of probes; pages are drawn and encoded once.

    Args:
        processor: renders, and knows the tokenizer.
        device: where the encoder is.
        seed: of the shuffled arm.
        rivals: trained rivals; each is an arm more.
    """

    ALL_ARMS = (
        "none",
        "full-text",
        "first-n",
        "last-n",
        "bm25",
        "memory",
        "half-memory-half-bm25",
        *EXACT_ARMS,
        "shuffled-memory",
        "other-memory",
    )

    def __init__(
        self,
        probes: Sequence[Probe],
        processor: MEMProcessor,
        *,
        device: torch.device,
        seed: int = 0,
        rivals: Sequence[Rival] = (),
    ) -> None:
        self.probes, self.processor, self.device, self.seed = probes, processor, device, seed
        tokenizer = processor.tokenizer
        clean = processor.chat_format.clean
        encoded = tokenizer([clean(probe.history) for probe in probes], add_special_tokens=False)
        self.history_ids: list[list[int]] = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
        self.memories = self._memories([probe.history for probe in probes])
        self.rivals: dict[str, Rival] = {rival.kind: rival for rival in rivals}
        self._ranked = functools.cache(self._sentences_by_score)
        self._slots = history_slots([probe.history for probe in probes], rivals, processor)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms whose packages are there, and the trained rivals."""
        missing = {arm for arm, _ in arms_left_out()}
        return (*(arm for arm in self.ALL_ARMS if arm not in missing), *self.rivals)

    def budget(self, index: int) -> int:
        """Memory tokens of a probe's history."""
        return self.memories[index].num_tokens

    def context(self, arm: str, index: int) -> Context:
        """The context of one arm for one probe."""
        ids, budget = self.history_ids[index], self.budget(index)
        memory = self.memories[index]
        if arm == "none":
            return Context()
        if arm == "full-text":
            return Context(text_ids=ids)
        if arm == "first-n":
            return Context(text_ids=ids[:budget])
        if arm == "last-n":
            return Context(text_ids=ids[-budget:])
        if arm == "bm25":
            return Context(text_ids=self.snippets(index, budget))
        if arm == "half-memory-half-bm25":
            newest = _newest(memory, budget // 2)
            return Context(
                self.snippets(index, budget - newest.num_tokens), newest.features_PVE, newest.page_num_tokens
            )
        if arm in EXACT_ARMS:
            assert memory.features_PVE is not None
            exact_ids, features_PVE, page_num_tokens = exact_context(
                arm, self.probes[index], memory.features_PVE, memory.page_num_tokens, processor=self.processor
            )
            return Context(features_PVE=features_PVE, page_num_tokens=page_num_tokens, exact_ids=exact_ids)
        if arm == "shuffled-memory":
            order = np.random.default_rng([self.seed, index]).permutation(budget).tolist()
            return Context(features_PVE=memory.features_PVE, page_num_tokens=memory.page_num_tokens, order=order)
        if arm == "other-memory":
            other = self.memories[(index + 1) % len(self.memories)]
            return Context(features_PVE=other.features_PVE, page_num_tokens=other.page_num_tokens)
        if arm in self.rivals:
            return Context(
                page_num_tokens=memory.page_num_tokens, rival=self.rivals[arm], slots_PVT=self._slots[arm][index]
            )
        assert arm == "memory", arm
        return memory

    def snippets(self, index: int, budget: int) -> list[int]:
        """Token ids of the sentences that BM25 finds for the probe's query, in their own order, cut at the budget.

        BM25 with bm25s' defaults (Lucene's variant, k1 1.5, b 0.75); sentences that share no word with the query come
        last, oldest first.
        """
        kept: dict[int, list[int]] = {}
        for number, ids in self._ranked(index):
            if budget == 0:
                break
            kept[number] = ids[:budget]
            budget -= len(kept[number])
        return [token for number in sorted(kept) for token in kept[number]]

    def _sentences_by_score(self, index: int) -> list[tuple[int, list[int]]]:
        """Number and token ids of each sentence of a probe's history, the best for its query first."""
        assert bm25s is not None, "the arm is left out without it"
        probe = self.probes[index]
        found = [match.group() for match in SENTENCE.finditer(probe.history) if match.group().strip()]
        retriever = bm25s.BM25()
        retriever.index(bm25s.tokenize(found, stopwords="en", show_progress=False), show_progress=False)
        words = bm25s.tokenize([probe.query], stopwords="en", return_ids=False, show_progress=False)[0]
        known: list[str] = [word for word in map(str, words) if word in retriever.vocab_dict]
        scores = retriever.get_scores(known) if known else np.zeros(len(found))
        ids = self.processor.tokenizer(
            [self.processor.chat_format.clean(text) for text in found], add_special_tokens=False
        )["input_ids"]
        return [(number, ids[number]) for number in np.argsort(-scores, kind="stable").tolist()]

    def _memories(self, histories: Sequence[str]) -> list[Context]:
        processor = self.processor
        encoder = processor.encoder
        pages = [processor.pages(history) for history in histories]
        keys = [
            processor.page_key(history[page.text_start : page.text_end])
            for history, drawn in zip(histories, pages, strict=True)
            for page in drawn
        ]
        flat = [page for drawn in pages for page in drawn]
        shape = (0, encoder.tokens_per_page, encoder.feature_width)
        # Every arm needs the features on the device, and a GPU makes them sooner than a disk keeps them.
        store = processor.store if self.device.type == "cpu" else None
        parts = [torch.zeros(shape, dtype=processor.feature_dtype, device=self.device)]
        for begin in range(0, len(flat), PAGES_AT_ONCE):
            features_PVE = encode_pages(
                encoder,
                stack_pages(flat[begin : begin + PAGES_AT_ONCE], encoder),
                keys[begin : begin + PAGES_AT_ONCE],
                store=store,
                dtype=processor.feature_dtype,
                device=self.device,
            )
            parts.append(features_PVE)
        split = torch.cat(parts).split([len(drawn) for drawn in pages])
        return [
            Context(features_PVE=features_PVE, page_num_tokens=[encoder.num_tokens(page) for page in drawn])
            for features_PVE, drawn in zip(split, pages, strict=True)
        ]


def arms_left_out() -> list[tuple[str, str]]:
    """Arms that cannot be run here, and why."""
    if bm25s is not None:
        return []
    reason = "the package bm25s is not installed; pip install ocrmem[eval]"
    return [(arm, reason) for arm in ("bm25", "half-memory-half-bm25", *RECALL_ARMS)]


def _newest(memory: Context, budget: int) -> Context:
    """The newest whole pages of a memory that fit, or else the first tokens of the newest page."""
    counts = memory.page_num_tokens
    first, total = len(counts), 0
    while first > 0 and total + counts[first - 1] <= budget:
        first -= 1
        total += counts[first]
    assert memory.features_PVE is not None
    if total == 0:
        return Context(features_PVE=memory.features_PVE[-1:], page_num_tokens=[min(budget, counts[-1])])
    return Context(features_PVE=memory.features_PVE[first:], page_num_tokens=counts[first:])
