"""`MEMDataset`: one training sample for each assistant reply."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from ocrmem.data.processor import MEMProcessor, PreparedPrompt, stack_pages
from ocrmem.errors import ConfigError, DataError, MemoryNeverAppearsError
from ocrmem.memory.split import Split, TokenCounts, split_prompt
from ocrmem.model.label_loss import IGNORE_INDEX
from ocrmem.types import Conversation

NUM_TRIED = 16
"""Prompts, of the longest history first, that are drawn before a data set is said to have no memory."""


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What a data set's conversations gave."""

    num_conversations: int
    """Conversations read."""
    num_replies: int
    """Assistant messages in them."""
    num_samples: int
    """Samples of the data set."""
    num_without_memory: int
    """Replies whose prompt stays text: too short, or its memory would not be smaller than its text. Left out
    unless `samples="all"`."""
    num_unusable: int
    """Replies with no user message before them, or right after another reply under a template that makes one
    turn of both. Left out."""
    num_cut_replies: int
    """Samples whose reply is longer than `max_reply_tokens`; they learn its beginning."""
    longest_prompt: int
    """Tokens of the longest prompt, before compression."""

    def __str__(self) -> str:
        cut = f", {self.num_cut_replies} with a reply cut short" if self.num_cut_replies else ""
        return (
            f"{self.num_samples} samples from {self.num_replies} replies in {self.num_conversations} "
            f"conversations{cut}; {self.num_without_memory} replies have no memory, {self.num_unusable} "
            f"cannot be used; the longest prompt has {self.longest_prompt} tokens"
        )


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """Token counts of samples whose pages were drawn."""

    num_measured: int
    """Samples drawn."""
    num_with_memory: int
    """Those with a memory; the others stay text."""
    mean_ratio: float | None
    """Mean of their compression ratios; None where none has a memory."""
    history_tokens: int
    """Text tokens that their memories replace, in all."""
    memory_tokens: int
    """Tokens of their memories, separators included, in all."""


@dataclass(frozen=True, eq=False)
class _Reply:
    """One assistant message that can be learnt from."""

    counts: TokenCounts
    index: int
    source: str


def usable_replies(counts: TokenCounts, processor: MEMProcessor) -> Iterator[int]:
    """The messages of a conversation that are replies which can be learnt from."""
    merges_turns = processor.chat_format.merges_turns
    for index, message in enumerate(counts.messages):
        if message.role != "assistant" or counts.last_user[index] < 0:
            continue
        if merges_turns and counts.messages[index - 1].role == "assistant":
            continue  # it would become one turn with the reply before it
        yield index


class MEMDataset(Dataset[dict[str, Any]]):
    """One sample for each assistant reply; only that reply is labelled.

    The label covers the reply and the end-of-turn token that the chat template writes after it. Prompt,
    memory and whatever follows have none. Tokens are counted when the data set is made, each message once;
    pages are drawn when a sample is asked for, so that data loader workers share that work. The order and
    content of the samples depend on the arguments alone.

    Whether a reply has a memory is decided from token counts and the smallest memory that the encoder gives.
    A sample whose pages, once drawn, turn out not to be smaller than their text stays text, even with
    `with_memory`; it is harmless and rare (`measure` counts it).

    Args:
        conversations: as `read_conversations` gives them.
        processor: makes the prompts.
        samples: `with_memory`: leave out replies whose prompt has no memory, since the projection cannot
            learn from them; `all`: keep them.
        max_reply_tokens: a longer reply is cut, its end-of-turn token with it.

    Raises:
        MemoryNeverAppearsError: no reply has a memory, with the numbers that decide it.
        DataError: no conversation was given.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: MEMProcessor,
        *,
        samples: Literal["with_memory", "all"] = "with_memory",
        max_reply_tokens: int = 512,
    ) -> None:
        if samples not in ("with_memory", "all"):
            raise ConfigError(f"samples={samples!r}: expected 'with_memory' or 'all'.")
        if max_reply_tokens < 1:
            raise ConfigError(f"max_reply_tokens={max_reply_tokens}: expected 1 or more.")
        if not conversations:
            raise DataError("the data set is empty: no conversations were given. Give at least one.")
        self.conversations = conversations
        self.processor = processor
        self.max_reply_tokens = max_reply_tokens
        self._smallest_memory = processor.smallest_memory()
        self._overhead = processor.chat_format.overheads["assistant"]
        usable: list[_Reply] = []
        num_replies = 0
        for conversation in conversations:
            counts = processor.count(conversation.messages)
            num_replies += sum(message.role == "assistant" for message in conversation.messages)
            usable.extend(_Reply(counts, index, conversation.source) for index in usable_replies(counts, processor))
        with_memory = [reply for reply in usable if self._may_have_memory(self._split(reply))]
        self._replies = usable if samples == "all" else with_memory
        self.report = SampleReport(
            num_conversations=len(conversations),
            num_replies=num_replies,
            num_samples=len(self._replies),
            num_without_memory=len(usable) - len(with_memory),
            num_unusable=num_replies - len(usable),
            num_cut_replies=sum(self._label_tokens(reply) > max_reply_tokens for reply in self._replies),
            longest_prompt=max((reply.counts.prompt_tokens(reply.index) for reply in usable), default=0),
        )
        self._check_memory_appears(usable, with_memory)

    def __len__(self) -> int:
        return len(self._replies)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: int64 `input_ids` and `labels` [S], uint8 `pages` [P, H, W], `page_keys` (P strings),
        int64 `page_num_tokens` [P]; P is 0 without memory."""
        return self._sample(self._replies[index])

    def measure(self, *, max_samples: int = 64) -> CompressionReport:
        """Draw up to `max_samples` samples, spread evenly over the data set, and count their tokens."""
        step = max(1, -(-len(self) // max_samples))
        splits = [self._prompt(reply).split for reply in self._replies[::step]]
        ratios = [split.compression_ratio for split in splits if split.compression_ratio is not None]
        return CompressionReport(
            num_measured=len(splits),
            num_with_memory=len(ratios),
            mean_ratio=statistics.fmean(ratios) if ratios else None,
            history_tokens=sum(split.history_tokens for split in splits),
            memory_tokens=sum(split.memory_tokens for split in splits),
        )

    def reply(self, index: int) -> tuple[Conversation, int]:
        """Conversation and message of the reply of a sample."""
        reply = self._replies[index]
        return Conversation(reply.counts.messages, reply.source), reply.index

    def _split(self, reply: _Reply) -> Split:
        return split_prompt(reply.counts, reply.index, settings=self.processor.memory)

    def _may_have_memory(self, split: Split) -> bool:
        return split.history_tokens > split.separator_tokens + self._smallest_memory

    def _label_tokens(self, reply: _Reply) -> int:
        ends = reply.counts.ends
        # Its content, and the end of its turn.
        return ends[reply.index + 1] - ends[reply.index] - self._overhead + 1

    def _prompt(self, reply: _Reply) -> PreparedPrompt:
        return self.processor.prepare(reply.counts, reply.index)

    def _sample(self, reply: _Reply) -> dict[str, Any]:
        prompt = self._prompt(reply)
        reply_ids = self._reply_ids(prompt, reply)[: self.max_reply_tokens]
        return {
            "input_ids": torch.tensor(prompt.input_ids + reply_ids),
            "labels": torch.tensor([IGNORE_INDEX] * len(prompt.input_ids) + reply_ids),
            "pages": stack_pages(prompt.pages, self.processor.encoder),
            "page_keys": prompt.page_keys,
            "page_num_tokens": torch.tensor(prompt.page_num_tokens, dtype=torch.int64),
        }

    def _reply_ids(self, prompt: PreparedPrompt, reply: _Reply) -> list[int]:
        """Ids of the reply as the template writes it after the prompt, up to its end-of-turn token."""
        chat_format = self.processor.chat_format
        whole = self.processor.prompt_text(prompt.split, reply=reply.counts.messages[reply.index])
        if not whole.startswith(prompt.text):
            raise DataError(
                f"{reply.source}: message {reply.index}: the chat template of "
                f"{self.processor.tokenizer.name_or_path!r} writes the prompt otherwise once the reply "
                "follows, so what the LLM would have to generate cannot be told from the prompt. Set "
                "tokenizer.chat_template to one that only appends."
            )
        whole_ids, num_prompt = chat_format.ids(whole), len(prompt.input_ids)
        if whole_ids[:num_prompt] == prompt.input_ids:
            reply_ids = whole_ids[num_prompt:]
        else:  # the reply's first characters were joined with the prompt's last; in generation they never are
            reply_ids = chat_format.ids(whole[len(prompt.text) :])
        return reply_ids[: len(reply_ids) - chat_format.num_reply_tail]

    def _check_memory_appears(self, usable: list[_Reply], with_memory: list[_Reply]) -> None:
        """Raise unless one of the longest histories has a memory; the template is tried out on the way."""
        settings, report = self.processor.memory, self.report
        if not usable:
            raise DataError(
                f"none of the {report.num_replies} replies in {report.num_conversations} conversations can "
                "be learnt from: a reply needs a user message before it. Check the order of the messages."
            )
        if report.longest_prompt <= settings.context_threshold:
            raise MemoryNeverAppearsError(
                f"no sample has a memory: the longest of {len(usable)} prompts has {report.longest_prompt} "
                f"tokens, not above context_threshold={settings.context_threshold}. Lower context_threshold, "
                "or give longer conversations."
            )
        ranked = sorted(with_memory, key=lambda reply: -self._split(reply).history_tokens)[:NUM_TRIED]
        if any(self._sample(reply)["page_keys"] for reply in ranked):
            return
        history = max(self._split(reply).history_tokens for reply in usable)
        if history == 0:
            raise MemoryNeverAppearsError(
                f"no sample has a memory: the longest of {len(usable)} prompts has {report.longest_prompt} "
                f"tokens, but all that is left besides recent_tokens={settings.recent_tokens}, the last user "
                f"turn, and what max_length={settings.max_length} leaves out is no whole turn. Lower "
                "recent_tokens, raise max_length, or give longer conversations."
            )
        raise MemoryNeverAppearsError(
            f"no sample has a memory: the longest history of {len(usable)} prompts has {history} text "
            "tokens, and its pages would take as many tokens or more (a page of encoder "
            f"{self.processor.encoder.name!r} takes {self._smallest_memory} to "
            f"{self.processor.encoder.tokens_per_page}). Give longer conversations, lower recent_tokens, "
            "raise max_length, or set pages that hold more text for each token."
        )
