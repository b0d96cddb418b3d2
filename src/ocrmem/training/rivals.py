"""The trained rivals of the memory: the same projection, fed with the text's own token embeddings."""

from __future__ import annotations

import torch

from ocrmem.config.objectives import Features
from ocrmem.encoders.base import OCREncoder
from ocrmem.errors import ConfigError
from ocrmem.training.packing import TOKENS_PER_SLOT
from ocrmem.types import Page, TokenSpans


class RivalEncoder(OCREncoder):
    """Stands where the OCR encoder stands, with its page and its number of memory tokens, and draws nothing.

    Its features are made of token embeddings by `training.objectives.text_features`.
    """

    name = "rival"
    settings_type = object

    def __init__(self, drawn: OCREncoder, kind: Features, embedding_width: int) -> None:
        super().__init__()
        object.__setattr__(self, "drawn", drawn)  # no submodule: its weights are no part of the rival
        self.kind, self.page = kind, drawn.page
        self._width = embedding_width * (1 if kind == "mean-pooling" else TOKENS_PER_SLOT)

    drawn: OCREncoder

    @classmethod
    def build(cls, settings: object, *, page: object = None) -> RivalEncoder:
        raise ConfigError("a rival is made of an encoder and an LLM; set objectives.features.")

    def load_checkpoint(self, checkpoint: str | None) -> None:
        """It has no weights."""

    @property
    def feature_width(self) -> int:
        return self._width

    @property
    def tokens_per_page(self) -> int:
        return self.drawn.tokens_per_page

    @property
    def lines_per_unit(self) -> int:
        return self.drawn.lines_per_unit

    def forward(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        raise ConfigError("a rival reads text tokens, not pages; give `features`.")

    def num_tokens(self, page: Page) -> int:
        return self.drawn.num_tokens(page)

    def token_spans(self, page: Page) -> TokenSpans:
        return self.drawn.token_spans(page)

    def identity(self) -> str:
        return f"rival {self.kind} {TOKENS_PER_SLOT}"
