"""What becomes memory and what stays text.

```
[system] [left out, beyond max_length] [history → pages] [recent turns, the last user turn among them]
 text     gone                          memory            text
```
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ocrmem.config.memory import MemorySettings
from ocrmem.memory.chat_format import ChatFormat, num_leading_system
from ocrmem.types import Message

DROP_STEPS = 8
"""History beyond `max_length` is left out in steps of an eighth of it. The oldest turn that is kept, and with
it every full page, then stays the same for many replies, so cached features stay valid."""


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """A conversation with its token counts, made once and used for all its replies."""

    messages: tuple[Message, ...]
    """The whole conversation."""
    num_system: int
    """Leading system messages."""
    base: int
    """Tokens of a prompt that belong to no turn: default system text, system turn, start of the reply."""
    ends: tuple[int, ...]
    """Length n + 1: tokens of the first i messages, each with the template's own tokens around it."""
    separator_tokens: int
    """Tokens that a memory costs besides its placeholders."""
    last_user: tuple[int, ...]
    """Length n + 1: index of the last user message among the first i; -1 where there is none."""

    @classmethod
    def of(cls, messages: Sequence[Message], *, chat_format: ChatFormat) -> TokenCounts:
        """Tokenise every message once."""
        num_system = num_leading_system(messages)
        overheads = chat_format.overheads
        lengths = chat_format.content_lengths([message.content for message in messages])
        # The first system turn's own tokens are in the base.
        turns = [
            length + (overheads[message.role] if i > 0 or message.role != "system" else 0)
            for i, (message, length) in enumerate(zip(messages, lengths, strict=True))
        ]
        last_user = accumulate(
            (i if message.role == "user" else -1 for i, message in enumerate(messages)), max, initial=-1
        )
        has_system = num_system > 0
        return cls(
            messages=tuple(messages),
            num_system=num_system,
            base=chat_format.base_length(has_system=has_system),
            ends=tuple(accumulate(turns, initial=0)),
            separator_tokens=chat_format.separator_tokens(has_system=has_system),
            last_user=tuple(last_user),
        )

    def prompt_tokens(self, end: int) -> int:
        """Tokens of the prompt of the first `end` messages, before compression."""
        return self.base + self.ends[end]


@dataclass(frozen=True, eq=False, kw_only=True)
class Split:
    """How one prompt was divided. All counts are tokens of the LLM's tokenizer."""

    messages: tuple[Message, ...]
    """The conversation; the prompt is its first `end` messages."""
    end: int
    """Messages in the prompt."""
    num_system: int
    """Leading system messages; they stay text."""
    history_start: int
    """First message of the history; those between the system messages and it were left out."""
    recent_start: int
    """First of the recent turns; equal to `history_start` where there is no history."""
    prompt_tokens: int
    """The prompt before compression, nothing left out."""
    dropped_tokens: int
    """Text tokens of the messages left out."""
    history_tokens: int
    """Text tokens of the history: what the memory replaces."""
    separator_tokens: int
    """Tokens that the memory costs besides its placeholders; 0 without memory."""
    placeholder_tokens: int = 0
    """Memory tokens proper, known once the pages are drawn; 0 without memory."""

    @property
    def system(self) -> tuple[Message, ...]:
        """Leading system messages."""
        return self.messages[: self.num_system]

    @property
    def history(self) -> tuple[Message, ...]:
        """Turns that become pages."""
        return self.messages[self.history_start : self.recent_start]

    @property
    def recent(self) -> tuple[Message, ...]:
        """Turns that stay text."""
        return self.messages[self.recent_start : self.end]

    @property
    def num_dropped(self) -> int:
        """Messages left out."""
        return self.history_start - self.num_system

    @property
    def memory_tokens(self) -> int:
        """What stands in the prompt for the history: placeholders and separators."""
        return self.placeholder_tokens + self.separator_tokens if self.placeholder_tokens else 0

    @property
    def compression_ratio(self) -> float | None:
        """Text tokens of the replaced history ÷ memory tokens, separators included; None without memory."""
        return self.history_tokens / self.memory_tokens if self.placeholder_tokens else None

    def with_memory(self, placeholder_tokens: int) -> Split:
        """This split with its pages drawn, or all text where the memory would not be smaller."""
        if placeholder_tokens == 0 or placeholder_tokens + self.separator_tokens >= self.history_tokens:
            return self.as_text()
        return dataclasses.replace(self, placeholder_tokens=placeholder_tokens)

    def as_text(self) -> Split:
        """This split with its history among the recent turns."""
        return dataclasses.replace(
            self, recent_start=self.history_start, history_tokens=0, separator_tokens=0, placeholder_tokens=0
        )

    def summary(self) -> str:
        """One line for people."""
        dropped = (
            f"; {self.num_dropped} oldest turns ({self.dropped_tokens} tokens) left out" if self.num_dropped else ""
        )
        if self.compression_ratio is None:
            return f"no memory: all {len(self.recent)} turns stay text{dropped}"
        return (
            f"memory: {len(self.history)} turns, {self.history_tokens} text tokens as {self.memory_tokens} "
            f"memory tokens (ratio {self.compression_ratio:.2f}); {len(self.recent)} turns stay text{dropped}"
        )

    def as_json(self) -> dict[str, Any]:
        """The counts, for programs."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "history_turns": len(self.history),
            "history_tokens": self.history_tokens,
            "memory_tokens": self.memory_tokens,
            "compression_ratio": self.compression_ratio,
            "recent_turns": len(self.recent),
            "dropped_turns": self.num_dropped,
            "dropped_tokens": self.dropped_tokens,
        }


def split_prompt(counts: TokenCounts, end: int, *, settings: MemorySettings) -> Split:
    """Divide the prompt of the first `end` messages; arithmetic alone, O(log n).

    A prompt of at most `context_threshold` tokens stays text. Of a longer one, the last user turn and what
    follows it stays text however long, and so do the turns before it as far as all of them fit in
    `recent_tokens`; they start with a user turn where there is one. Leading system messages stay text. The
    other turns are history, without the oldest whole turns where the prompt exceeds `max_length`.

    The memory is not decided here: `Split.with_memory` takes it back where it would not be smaller.
    """
    ends, num_system = counts.ends, counts.num_system
    prompt_tokens = counts.prompt_tokens(end)
    recent_start = find_recent_start(counts, end, settings.recent_tokens)
    if prompt_tokens <= settings.context_threshold:
        recent_start = num_system
    history_start = num_system
    excess = prompt_tokens - settings.max_length
    if excess > 0:
        step = max(1, settings.max_length // DROP_STEPS)
        stepped = -(-excess // step) * step
        history_tokens = ends[recent_start] - ends[num_system]
        drop = stepped if stepped < history_tokens else excess
        history_start = min(recent_start, bisect_left(ends, ends[num_system] + drop, lo=num_system))
        while history_start < recent_start and counts.messages[history_start].role != "user":
            history_start += 1  # a reply whose question was left out
    history_tokens = ends[recent_start] - ends[history_start]
    return Split(
        messages=counts.messages,
        end=end,
        num_system=num_system,
        history_start=history_start,
        recent_start=recent_start,
        prompt_tokens=prompt_tokens,
        dropped_tokens=ends[history_start] - ends[num_system],
        history_tokens=history_tokens,
        separator_tokens=counts.separator_tokens if history_tokens else 0,
    )


def find_recent_start(counts: TokenCounts, end: int, recent_tokens: int) -> int:
    """Index of the first turn that stays text."""
    ends = counts.ends
    start = bisect_left(ends, ends[end] - recent_tokens, lo=counts.num_system, hi=end)
    last_user = counts.last_user[end]
    if last_user < counts.num_system:
        return start
    start = min(start, last_user)
    while counts.messages[start].role != "user":
        start += 1
    return start
