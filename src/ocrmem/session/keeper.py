"""A conversation's place in a store: what is read when it is opened, and written as it grows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ocrmem.config.growing import GrowingSettings
from ocrmem.data.processor import MEMProcessor
from ocrmem.errors import StoreError, StoreMismatchError
from ocrmem.memory.growing_pages import GrowingPages, MemoryPage
from ocrmem.memory.store import MemoryStore, StoredConversation, StoredPage
from ocrmem.memory.store_lock import WriterLock
from ocrmem.model.identity import PROBE_TOLERANCE, LLMIdentity
from ocrmem.model.mem_model import MEMModel
from ocrmem.types import Message

log = logging.getLogger(__name__)

PARTS = {"encoder": "encoder", "page": "page settings", "feature_dtype": "feature_dtype", "llm": "LLM"}
"""What the pages and token counts of a conversation depend on, and how it is called."""


def made_with(model: MEMModel, processor: MEMProcessor, settings: GrowingSettings) -> dict[str, Any]:
    """What a conversation's pages are made with, as a store records it."""
    llm = LLMIdentity.of(model.base_llm_model, name=(model.config.llm or {}).get("name", "unknown"), revision="")
    return {
        "encoder": f"{processor.encoder.name} {processor.encoder_identity}",
        "page": processor.render_identity,
        "feature_dtype": processor.memory.feature_dtype,
        "llm": f"{llm.name} ({llm.model_type}, {llm.num_hidden_layers} layers, {llm.hidden_size} wide, "
        f"{llm.vocab_size} ids)",
        "llm_probe": list(llm.embedding_probe),
        "page_tokens": settings.page_tokens,
        "densities": list(settings.densities),
    }


def differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """In which parts two records differ, for people; weights are compared as adapters compare them."""
    found = [
        f"{name} {_short(stored.get(key))} there, {_short(own[key])} here"
        for key, name in PARTS.items()
        # The same LLM may be loaded from two places.
        if (_shape(stored.get(key)) != _shape(own[key]) if key == "llm" else stored.get(key) != own[key])
    ]
    theirs, ours = stored.get("llm_probe", []), own["llm_probe"]
    if not found and (
        len(theirs) != len(ours) or math.dist(theirs, ours) > PROBE_TOLERANCE * max(math.hypot(*ours), 1e-9)
    ):
        found.append(f"LLM {_short(stored.get('llm'))} there, other weights of the same shape here")
    return found


class Keeper:
    """One conversation of a store, opened for writing; or for reading, where the store is read-only.

    Args:
        memory: `made_with` of the memory that uses it.
        wait: seconds to wait for another writer.

    Raises:
        StoreBusyError: another process writes it.
        StoreError: the store is read-only and has no such conversation.
    """

    def __init__(self, store: MemoryStore, name: str, *, memory: dict[str, Any], wait: float) -> None:
        self.store, self._memory = store, memory
        self._lock: WriterLock | None = None
        found = store.find(name)
        if found is None and store.read_only:
            raise StoreError(f"store {store.where} has no conversation {name!r}, and is read-only.")
        self.conversation: StoredConversation = found or store.create(name)
        if not store.read_only:
            self._lock = store.writer(self.conversation, wait=wait)
            # Another process may have deleted it while this one waited.
            self.conversation = store.find(name) or store.create(name)
        self._kept: dict[int, str] = {}
        """First character and key of every page that the store has."""

    def close(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()

    def messages(self) -> list[Message]:
        """All of them."""
        return self.store.messages(self.conversation)

    def append(self, new: Sequence[Message], *, position: int) -> None:
        """Write messages; they are on disk when this returns."""
        self.store.append(self.conversation, new, position=position)

    def load_pages(
        self,
        text_of: Callable[[int, int], str],
        length: int,
        pages: GrowingPages,
        *,
        reencode: bool,
    ) -> tuple[list[MemoryPage], dict[str, torch.Tensor]]:
        """The stored pages that agree with the text, and features by key.

        Pages that were kept under another budget, or do not agree with the text, are not given; their features are, so
        that a page with the same text need not be encoded again.

        Args:
            text_of: the history's text from one character to another.
            length: characters of the whole history.
            pages: what draws them.
            reencode: give nothing where the pages were made with other parts.

        Raises:
            StoreMismatchError: they were, and `reencode` is False.
        """
        stored = self.store.pages(self.conversation)
        self._kept = {page.start: page.key for page in stored}
        settings = self.conversation.settings
        if settings is None:
            return [], {}
        if found := differences(settings, self._memory):
            if not reencode:
                raise StoreMismatchError(
                    f"conversation {self.conversation.name!r} of store {self.store.where} was made with other parts: "
                    f"{'; '.join(found)}. Its messages can be kept and its pages drawn and encoded again: open it with "
                    "reencode=True (`ocrmem chat --reencode`). Or load the adapter that it was made with."
                )
            return [], {}
        full, features = [], {}
        for each in stored:
            page = None
            if 0 <= each.start < each.end <= length and (not full or full[-1].end == each.start):
                page = pages.page(each.level, each.start, text_of(each.start, each.end))
            if page is None or page.key != each.key or each.features_VE is None:
                log.warning(
                    "conversation %r: the stored page of characters %d to %d is damaged or not of this text; the pages "
                    "are made again",
                    self.conversation.name,
                    each.start,
                    each.end,
                )
                self._kept = dict.fromkeys(self._kept, "")  # so that all of them are written again
                return [], features
            full.append(page)
            features[page.key] = padded(each.features_VE, pages.tokens_per_page)
        budget = ("page_tokens", "densities")
        if any(settings.get(key) != self._memory[key] for key in budget):
            return [], features
        return full, features

    def keep_pages(self, full: Sequence[MemoryPage], features: Mapping[str, torch.Tensor]) -> None:
        """Write the full pages that are new, and remove those that are gone; in one transaction."""
        now = {page.start: page.key for page in full}
        removed = [start for start, key in self._kept.items() if now.get(start) != key]
        added = [
            StoredPage(page.level, page.start, page.end, page.num_tokens, page.key, used(features[page.key]))
            for page in full
            if self._kept.get(page.start) != page.key
        ]
        if self.store.read_only or not (removed or added):
            return
        self.store.change_pages(self.conversation, removed=removed, added=added, settings=self._memory)
        self._kept = now

    def forget(self, *, keep: int) -> None:
        """Delete the messages from number `keep` on and every page; an empty conversation takes its place if 0."""
        self.store.delete(self.conversation, keep=keep)
        self._kept = {}
        if keep == 0:
            self.close()
            self.conversation = self.store.create(self.conversation.name)
            self._lock = self.store.writer(self.conversation)


def used(features_VE: torch.Tensor) -> torch.Tensor:
    """The rows up to the last that is not zero."""
    rows = features_VE.any(dim=1).nonzero()
    return features_VE[: int(rows[-1]) + 1 if len(rows) else 0]


def padded(features_VE: torch.Tensor, num_rows: int) -> torch.Tensor:
    """features_VE with zeros below."""
    full_VE = features_VE.new_zeros(num_rows, features_VE.shape[1])
    full_VE[: len(features_VE)] = features_VE
    return full_VE


def _shape(llm: object) -> str:
    return str(llm).partition("(")[2]


def _short(value: object) -> str:
    text = str(value)
    return " ".join(word[:12] if len(word) > 40 else word for word in text.split(" "))
