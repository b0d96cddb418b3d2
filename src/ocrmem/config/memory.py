"""Memory settings: what becomes pages and what stays text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ocrmem.errors import ConfigError, MemoryNeverAppearsError


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """When history becomes memory. All lengths are tokens of the LLM's tokenizer."""

    context_threshold: int = 512
    """A prompt of at most this many tokens stays text; a longer one has its oldest turns turned into memory."""
    recent_tokens: int = 256
    """The newest turns that fit into this many tokens stay text; the last user turn stays text however long."""
    max_length: int = 4096
    """Longest prompt, in tokens before compression; older turns beyond it are left out."""
    header: str = "Earlier in this conversation:\n"
    """Text in front of the memory tokens, inside the system turn."""
    position_stride: int = 1
    """Positions that a memory token takes in the LLM's count of them: about as many as the text tokens that it stands
    for, so that what follows is as far away as it was from the text (Zhao et al. 2024, arXiv:2409.14364)."""
    feature_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type in which features are cached; fresh features are rounded alike, so that both give the same loss."""

    def __post_init__(self) -> None:
        for name in ("context_threshold", "recent_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"memory setting {name}={getattr(self, name)}: expected 0 or more tokens.")
        if self.position_stride < 1:
            raise ConfigError(f"memory setting position_stride={self.position_stride}: expected 1 or more positions.")
        if self.feature_dtype not in ("float16", "bfloat16", "float32"):
            raise ConfigError(f"feature_dtype={self.feature_dtype!r}: expected float16, bfloat16 or float32.")
        if self.max_length <= self.context_threshold:
            raise MemoryNeverAppearsError(
                f"max_length={self.max_length} is not above context_threshold={self.context_threshold}: prompts are "
                "cut before they are long enough to get a memory, so no sample would ever have one and nothing would "
                "be learnt. Raise max_length or lower context_threshold."
            )
        if self.max_length <= self.recent_tokens:
            raise MemoryNeverAppearsError(
                f"max_length={self.max_length} is not above recent_tokens={self.recent_tokens}: every prompt would "
                "stay text whole. Raise max_length or lower recent_tokens."
            )
