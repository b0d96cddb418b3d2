"""What every OCR encoder offers: pixels in, a fixed grid of features out, and which text each feature covers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ocrmem.config.render import RenderSettings
from ocrmem.errors import PageSizeError
from ocrmem.types import Page, TokenSpans


class OCREncoder(nn.Module, ABC):
    """A frozen OCR vision encoder.

    ```
    pages_PHW uint8 ─▶ forward ─▶ features_PVE        V = tokens_per_page, E = feature_width
    ```

    A subclass builds its parts in `__init__` and sets `page`. It has no batch-norm module whose statistics could
    move, and no active dropout: `model.freeze` checks both.
    """

    name: ClassVar[str]
    """Name under which the encoder is registered."""
    settings_type: ClassVar[type]
    """Frozen dataclass of the encoder's own settings."""

    page: RenderSettings
    """Page settings in force: the encoder's preset, or what the user gave, checked by the encoder."""

    @classmethod
    @abstractmethod
    def build(cls, settings: Any, *, page: RenderSettings | None = None) -> Self:
        """Build the encoder with random weights on torch's current device.

        Args:
            settings: a `settings_type`.
            page: page settings; None: the preset that this encoder reads best.

        Raises:
            PageSizeError: the encoder cannot read such pages.
        """

    @abstractmethod
    def load_checkpoint(self, checkpoint: str | None) -> None:
        """Load weights, strictly, keeping this encoder's dtype and device.

        Args:
            checkpoint: a hub id, a path or an asset name; None: the encoder's own default.

        Raises:
            CheckpointError: the weights are missing, truncated or not this architecture's.
        """

    @property
    @abstractmethod
    def feature_width(self) -> int:
        """E, the width of one feature."""

    @property
    @abstractmethod
    def tokens_per_page(self) -> int:
        """V, the features of one full page."""

    @property
    def lines_per_unit(self) -> int:
        """Lines of a page that are encoded alone: a run of whole units may be cut out of a page and keeps its
        features. Here the whole page; an encoder that reads line by line says 1."""
        return self.page.lines_per_page

    @property
    def tokens_per_unit(self) -> int:
        """Features of such a unit."""
        return self.tokens_per_page * self.lines_per_unit // self.page.lines_per_page

    @abstractmethod
    def forward(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        """Encode pages.

        Args:
            pages_PHW: uint8 grey pages of exactly `page.page_height` × `page.page_width` pixels.

        Returns:
            features_PVE in the encoder's own dtype.

        Raises:
            PageSizeError: the pages have another size than the encoder's page settings say.
        """

    @abstractmethod
    def num_tokens(self, page: Page) -> int:
        """How many of the page's V tokens, from the first, carry its text; the rest is never shown to the LLM."""

    @abstractmethod
    def token_spans(self, page: Page) -> TokenSpans:
        """For each of the page's `num_tokens` tokens, the ranges of source characters under it."""

    @abstractmethod
    def identity(self) -> str:
        """Hex digest of everything that decides the features: name, settings, weights and their dtype.

        The feature cache is keyed by it, and an adapter records it. It is computed anew at each call (a second or
        two for 400 million weights), so that it never tells of weights that have changed; keep it.
        """

    def weights_digest(self) -> str:
        """Hex SHA-256 of every parameter and buffer with its name, shape and dtype; a part of `identity`."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return total.hexdigest()

    def check_pages(self, pages_PHW: torch.Tensor) -> None:
        """Refuse pages of another size or type than this encoder takes."""
        height, width = self.page.page_height, self.page.page_width
        if pages_PHW.ndim != 3 or pages_PHW.dtype != torch.uint8 or tuple(pages_PHW.shape[1:]) != (height, width):
            raise PageSizeError(
                f"encoder {self.name!r} was given pages of shape {tuple(pages_PHW.shape)} and type "
                f"{str(pages_PHW.dtype).removeprefix('torch.')}; it takes [pages, {height}, {width}] uint8. Render "
                "with the encoder's own `page` settings, or build the encoder with the settings of these pages."
            )
