"""The trained rivals of the memory: the same projection, fed with the text's own token embeddings."""

from __future__ import annotations

import dataclasses

import torch

from ocrmem.config.mem import RivalRecord
from ocrmem.config.projection import ProjectionSettings
from ocrmem.encoders.base import OCREncoder
from ocrmem.errors import ConfigError
from ocrmem.training.packing import rival_tokens
from ocrmem.types import Page, TokenSpans


class RivalEncoder(OCREncoder):
    """Stands where the OCR encoder stands, with its page and its number of memory tokens, and draws nothing.

    Its features are made of token embeddings by `training.objectives.text_features`, at every stage of a curriculum of
    `record.pieces` pieces. A convolution's projection has the memory's pieces; mean-pooling's has one, since the mean
    has the same width at every stage.

    Args:
        drawn: the encoder that decides the page and the number of memory tokens.
        embedding_width: of the LLM.
    """

    name = "rival"
    settings_type = object

    def __init__(self, drawn: OCREncoder, record: RivalRecord, embedding_width: int) -> None:
        super().__init__()
        object.__setattr__(self, "drawn", drawn)  # no submodule: its weights are no part of the rival
        self.record, self.page = record, drawn.page
        self._width = embedding_width * rival_tokens(record.kind, record.pieces)

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
        kind, pieces = self.record.kind, self.record.pieces
        return f"rival {kind}, {pieces} pieces, {rival_tokens(kind, pieces)} text tokens"


def rival_projection(settings: ProjectionSettings, record: RivalRecord) -> ProjectionSettings:
    """Settings of a rival's projection, given those of the memory's. It is given the LLM's embeddings, and has none to
    read; its layers are as many."""
    layers = settings.num_layers + settings.text_layers
    settings = dataclasses.replace(settings, read_tokens=0, deal_tokens=False, num_layers=layers, text_layers=0)
    return dataclasses.replace(settings, pieces=1, merge=False) if record.kind == "mean-pooling" else settings
