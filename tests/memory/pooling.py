"""An encoder that a person can follow: every token is the brightness of 48 × 64 cells of 4 × 4 pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ocrmem.config.render import PP_OCR_PAGE, RenderSettings
from ocrmem.encoders.base import OCREncoder
from ocrmem.types import Page, TokenSpans

CELL = 4
TOKEN_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class PoolingSettings:
    """None."""


class PoolingEncoder(OCREncoder):
    """Lines of 48 pixels, five tokens each on the default page of 640 pixels: V = 80, E = 12 × 32 = 384.

    `calls` holds the number of pages of every call, so that a test can tell cached from fresh features.
    """

    name = "pooling"
    settings_type = PoolingSettings

    @classmethod
    def build(cls, settings: PoolingSettings, *, page: RenderSettings | None = None) -> PoolingEncoder:
        return cls(page=page or PP_OCR_PAGE)

    def load_checkpoint(self, checkpoint: str | None) -> None:
        """It has no weights to load."""

    def __init__(self, *, page: RenderSettings = PP_OCR_PAGE, scale: float = 1.0) -> None:
        super().__init__()
        self.page = page
        self.scale = nn.Parameter(torch.tensor(scale), requires_grad=False)
        self.calls: list[int] = []

    @property
    def feature_width(self) -> int:
        return self.page.line_height // CELL * (TOKEN_WIDTH // CELL)

    @property
    def tokens_per_page(self) -> int:
        return self.page.lines_per_page * self.tokens_per_line

    @property
    def tokens_per_line(self) -> int:
        return self.page.page_width // TOKEN_WIDTH

    def forward(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        self.check_pages(pages_PHW)
        self.calls.append(pages_PHW.shape[0])
        ink_PHW = (255 - pages_PHW.float()) / 255 * self.scale
        cells = F.avg_pool2d(ink_PHW[:, None], CELL)[:, 0]
        lines, tokens = self.page.lines_per_page, self.tokens_per_line
        grid = cells.reshape(-1, lines, self.page.line_height // CELL, tokens, TOKEN_WIDTH // CELL)
        return grid.transpose(2, 3).reshape(-1, self.tokens_per_page, self.feature_width)

    def num_tokens(self, page: Page) -> int:
        return page.num_lines * self.tokens_per_line

    def token_spans(self, page: Page) -> TokenSpans:
        return [[(page.text_start, page.text_end)]] * self.num_tokens(page)

    def identity(self) -> str:
        return hashlib.sha256(f"{self.name} {float(self.scale)}".encode()).hexdigest()
