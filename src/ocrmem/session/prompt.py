"""One prompt of a growing conversation, and what it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ocrmem.data.processor import MEMProcessor
from ocrmem.errors import ConfigError, SpliceError
from ocrmem.memory.growing_pages import MemoryPage
from ocrmem.memory.split import Split
from ocrmem.model.mem_model import MEMModel
from ocrmem.session.reader import Slot, num_positions
from ocrmem.types import Message

BETWEEN = "\n\n"
"""In front of the ledger, and in front of recalled text."""


@dataclass(frozen=True, kw_only=True)
class MemoryTokens:
    """What a prompt is made of, in tokens; `memory` and `text` add up to its length."""

    budget: int
    """Most that the memory may take."""
    pages: tuple[int, ...]
    """Memory tokens of the pages of each level, the adapter's own level first."""
    ledger: int
    recalled: int
    separators: int
    """The memory's header and its other tokens around pages, ledger and recalled text."""
    text: int
    """System text, recent turns and the question."""
    replaced: int
    """Text tokens of the turns that the memory stands for."""
    left_out: int
    """Text tokens of older turns that no page holds any more."""

    @property
    def memory(self) -> int:
        """All tokens that stand for the older turns."""
        return sum(self.pages) + self.ledger + self.recalled + self.separators

    @property
    def total(self) -> int:
        """The prompt's length."""
        return self.memory + self.text

    @property
    def compression_ratio(self) -> float | None:
        """Text tokens replaced ÷ tokens of the memory, everything included; None without memory."""
        return self.replaced / self.memory if self.memory else None


@dataclass(frozen=True, eq=False, kw_only=True)
class MemoryPrompt:
    """A prompt, ready for the LLM but for the features of its pages."""

    text: str
    """What the chat template wrote, placeholders included."""
    input_ids: list[int]
    """Its token ids."""
    slots: list[Slot]
    """The same, each memory token by its page."""
    pages: list[MemoryPage]
    """Oldest first; empty where all of the conversation is text."""
    ledger: str
    recalled: str
    split: Split
    """Which turns are on pages, and which stay text."""
    tokens: MemoryTokens

    @classmethod
    def of(
        cls,
        split: Split,
        pages: Sequence[MemoryPage],
        *,
        ledger: str,
        recalled: str,
        processor: MEMProcessor,
        budget: int,
        num_levels: int,
    ) -> MemoryPrompt:
        """Write the prompt and count it.

        Raises:
            SpliceError: the template lost or repeated placeholders.
            DataError: the template refuses the turns.
        """
        chat_format, token = processor.chat_format, processor.memory_token_id
        num_placeholders = sum(page.num_tokens for page in pages)
        # After a reply all of the conversation may be on pages; its next turn is the user's.
        turns = [*split.system, *(split.recent or [Message("user", "")])]
        parts = [BETWEEN + part for part in (ledger, recalled) if part and pages]
        text = chat_format.text(
            turns, add_generation_prompt=True, num_placeholders=num_placeholders, after_memory="".join(parts)
        )
        ids = chat_format.ids(text)
        if ids.count(token) != num_placeholders:
            raise SpliceError(
                f"the prompt holds {ids.count(token)} placeholders {processor.memory_token!r} but its pages have "
                f"{num_placeholders} memory tokens; the two must be equal. The chat template of "
                f"{processor.tokenizer.name_or_path!r} loses, repeats or itself writes the placeholder: choose another "
                "memory_token, or set another chat template."
            )
        plain = len(chat_format.ids(chat_format.text(turns, add_generation_prompt=True))) if pages else len(ids)
        exact = dict(
            zip((part for part in (ledger, recalled) if part), chat_format.content_lengths(parts), strict=False)
        )
        of_ledger, of_recalled = exact.get(ledger, 0), exact.get(recalled, 0)
        levels = [sum(page.num_tokens for page in pages if page.level == level) for level in range(num_levels)]
        separators = len(ids) - plain - num_placeholders
        tokens = MemoryTokens(
            budget=budget,
            pages=tuple(levels),
            ledger=of_ledger,
            recalled=of_recalled,
            separators=separators - of_ledger - of_recalled,
            text=plain,
            replaced=split.history_tokens,
            left_out=split.dropped_tokens,
        )
        places = iter([(page.key, page.start) for page in pages for _ in range(page.num_tokens)])
        return cls(
            text=text,
            input_ids=ids,
            slots=[next(places) if index == token else index for index in ids],
            pages=list(pages),
            ledger=ledger,
            recalled=recalled,
            split=dataclasses.replace(split, separator_tokens=max(separators, 0)),
            tokens=tokens,
        )

    @property
    def smaller(self) -> bool:
        """Whether the memory takes fewer tokens than the text it replaces."""
        return self.tokens.memory < self.tokens.replaced

    def summary(self) -> str:
        """One line for people."""
        exact = []
        if self.tokens.ledger:
            exact.append(f"ledger {self.tokens.ledger}")
        if self.tokens.recalled:
            exact.append(f"recalled text {self.tokens.recalled}")
        return self.split.summary() + (f"; of the memory's tokens: {', '.join(exact)}" if exact else "")

    def as_json(self) -> dict[str, Any]:
        """The counts, for programs."""
        return {
            "pages": len(self.pages),
            **self.split.as_json(),
            "ledger_tokens": self.tokens.ledger,
            "recalled_tokens": self.tokens.recalled,
        }


def fitted(prompt: MemoryPrompt, model: MEMModel) -> MemoryPrompt:
    """The prompt, if the LLM can read it and say something.

    Raises:
        ConfigError: it is too long.
    """
    most = max_positions(model)
    if most is not None and num_positions(prompt.slots, model) >= most:
        tokens = prompt.tokens
        stride = model.position_stride
        counted = "" if stride == 1 else f", each of its memory tokens counted as {stride}"
        raise ConfigError(
            f"the prompt has {tokens.total} tokens (memory {tokens.memory}, system text, recent turns and question "
            f"{tokens.text}), but the LLM reads {most}{counted}, its reply included. Lower budget_tokens, or append a "
            "long text as a message of its own and ask about it then: it becomes memory."
        )
    return prompt


def max_positions(model: MEMModel) -> int | None:
    """Positions that the LLM can read; None where its config does not say."""
    return getattr(model.base_llm_model.config.get_text_config(), "max_position_embeddings", None)
