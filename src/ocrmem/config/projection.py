"""Projection settings: the only part that learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ocrmem.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ProjectionSettings:
    """The map from the encoder's feature width to the LLM's embedding width."""

    kind: Literal["mlp", "attention"] = "mlp"
    """`mlp`: Linear, GELU, Linear. `attention`: the same, and attention over what is on a page, by the numbers of
    layers below."""
    hidden_size: int | None = None
    """Width between the two linear layers; None: the LLM's embedding width."""
    num_layers: int = 2
    """Attention layers over the pieces of a page (kind `attention` alone). 0: each is seen alone."""
    mlp_ratio: int = 4
    """Width of the MLP of an attention layer, in embedding widths (kind `attention` alone)."""
    pieces: int = 1
    """Cut each memory token's features into this many pieces of one width, which attention sees apart before they
    become one memory token (kind `attention` alone). A projection of many pieces also takes fewer to the token, so
    that a curriculum can begin with little compression; see `Stage.pieces`."""
    merge: bool = False
    """How the pieces become one memory token: added up, each through a matrix of its own, or (false) the last stands
    for all, with what attention brought it of the others."""
    merged_layers: int = 0
    """Attention layers over the memory tokens, after their pieces have become one (kind `attention` alone)."""
    gain: bool = False
    """Learn the size of each dimension of the memory tokens, from that of the LLM's embeddings on; otherwise every
    token has the RMS of the LLM's embeddings."""
    read_tokens: int = 0
    """Read the letters of each piece, cut a page's text into tokens with the LLM's tokenizer, and give the embeddings
    of so many tokens that begin within a piece, and nothing else of it, to the layers that follow; so that neither
    what the embeddings are nor how words are cut need be learnt, but only which letters stand on the page (kind
    `attention` alone). Letters beyond those of European languages are read as `?`."""
    deal_tokens: bool = False
    """Deal out the tokens that were read evenly, in order, over the memory tokens of a page, in place of each memory
    token having those that begin in its own pixels, one here and four there; with `read_tokens` and `merge`. A memory
    token keeps one more than it has pieces, each through a matrix of its own, and covers other text than its pixels."""
    text_layers: int = 0
    """Attention layers over the text tokens of a page that were read, before they become memory tokens; with
    `read_tokens`. A trained rival, which reads none, has so many more in `num_layers`."""
    num_heads: int = 8
    """Heads of each attention layer; must divide the LLM's embedding width (kind `attention` alone)."""

    def __post_init__(self) -> None:
        if self.kind not in ("mlp", "attention"):
            raise ConfigError(f"projection kind={self.kind!r}: expected 'mlp' or 'attention'.")
        if self.pieces != 1 and self.kind != "attention":
            raise ConfigError(f"projection pieces={self.pieces} needs kind 'attention'; kind is {self.kind!r}.")
        if self.merge and self.pieces == 1:
            raise ConfigError("projection merge=true needs pieces of 2 or more; pieces is 1.")
        if self.merged_layers and self.kind != "attention":
            raise ConfigError(f"projection merged_layers={self.merged_layers} needs kind 'attention'.")
        if self.deal_tokens and not (self.read_tokens and self.merge):
            raise ConfigError("projection deal_tokens=true needs read_tokens of 1 or more, and merge=true.")
        if self.read_tokens and self.kind != "attention":
            raise ConfigError(f"projection read_tokens={self.read_tokens} needs kind 'attention'.")
        if self.text_layers and not self.read_tokens:
            raise ConfigError(f"projection text_layers={self.text_layers} needs read_tokens of 1 or more.")
        for name in ("num_layers", "text_layers", "merged_layers", "read_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"projection setting {name}={getattr(self, name)}: expected 0 or more.")
        for name in ("hidden_size", "num_heads", "mlp_ratio", "pieces"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"projection setting {name}={value}: expected 1 or more.")
