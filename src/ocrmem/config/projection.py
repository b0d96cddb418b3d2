"""Projection settings: the only part that learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ocrmem.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ProjectionSettings:
    """The map from the encoder's feature width to the LLM's embedding width."""

    kind: Literal["mlp", "attention"] = "mlp"
    """`mlp`: Linear, GELU, Linear. `attention`: the same, followed by attention over the page's tokens."""
    hidden_size: int | None = None
    """Width between the two linear layers; None: the LLM's embedding width."""
    num_layers: int = 2
    """Attention layers (kind `attention` alone)."""
    num_heads: int = 8
    """Heads of each attention layer; must divide the LLM's embedding width (kind `attention` alone)."""

    def __post_init__(self) -> None:
        if self.kind not in ("mlp", "attention"):
            raise ConfigError(f"projection kind={self.kind!r}: expected 'mlp' or 'attention'.")
        for name in ("hidden_size", "num_layers", "num_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"projection setting {name}={value}: expected 1 or more.")
