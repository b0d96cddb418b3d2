"""DeepSeek-OCR's DeepEncoder.

```
pages_PHW ─▶ 3 channels in [-1, 1] ─▶ SAM ─▶ map [P, 1024, g, g] ─┬────────────────────────▶ "sam"
                                       └─▶ "sam-mid"              ├─▶ CLIP, no class token ─┬─▶ "sum"  (SAM + CLIP)
                                                                  └─────────────────────────┴─▶ "concat" [CLIP, SAM]
```

On a page of 1,024 × 1,024 pixels SAM sees 64 × 64 patches and g is 16: 256 tokens.
"""

from __future__ import annotations

import hashlib
import logging
import types
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.exc import TorchDynamoException

from ocrmem.assets.fetch import resolve
from ocrmem.config.encoder import DeepSeekOCRSettings
from ocrmem.config.render import RenderSettings, deepseek_ocr_page
from ocrmem.encoders.base import OCREncoder
from ocrmem.encoders.checkpoint import load_strictly
from ocrmem.encoders.deepencoder_clip import CLIPEncoder, CLIPSizes
from ocrmem.encoders.deepencoder_sam import SAMEncoder, SAMSizes
from ocrmem.encoders.graphs import Graphs
from ocrmem.errors import ConfigError, PageSizeError
from ocrmem.types import Page, TokenSpans

log = logging.getLogger(__name__)

PIXELS_PER_TOKEN = 64
"""Side of the square of pixels under one token: 16-pixel patches, halved twice."""
UNUSED_CLIP_TENSORS = ("embeddings.patch_embedding.weight", "embeddings.position_ids")
"""In the checkpoint but not here: SAM's map stands in for CLIP's own patches, and the ids are 0, 1, 2, …"""


class DeepSeekOCREncoder(OCREncoder):
    """Reads square pages. V = (page_size / 64)²; E by the choice of features.

    All of CLIP's positions see the whole page, so every token of a page is shown to the LLM, those over blank paper
    too: `num_tokens` is V always.
    """

    name = "deepseek-ocr"
    settings_type = DeepSeekOCRSettings

    def __init__(
        self,
        settings: DeepSeekOCRSettings,
        *,
        page: RenderSettings,
        sam_sizes: SAMSizes | None = None,
        clip_sizes: CLIPSizes | None = None,
    ) -> None:
        super().__init__()
        check_page(page, settings.page_size)
        self.page = page
        self.features = settings.features
        self.grid = settings.page_size // PIXELS_PER_TOKEN
        self._sam_sizes = sam_sizes or SAMSizes()
        self.compile_layers = settings.compile
        self._compiled = False
        self.graphs = Graphs() if settings.graphs else None
        self.sam_model = SAMEncoder(self._sam_sizes, attention=settings.attention)
        self.vision_model = CLIPEncoder(clip_sizes or CLIPSizes())

    @classmethod
    def build(cls, settings: DeepSeekOCRSettings, *, page: RenderSettings | None = None) -> Self:
        return cls(settings, page=page or deepseek_ocr_page(settings.page_size))

    def load_checkpoint(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            raise ConfigError(
                "encoder 'deepseek-ocr' needs its weights: set encoder.checkpoint to a hub id "
                "(deepseek-ai/DeepSeek-OCR) or to a folder with the original checkpoint's safetensors."
            )
        folder = resolve(checkpoint)
        load_strictly(self.sam_model, folder, prefix="model.sam_model.")
        load_strictly(self.vision_model, folder, prefix="model.vision_model.", unused=UNUSED_CLIP_TENSORS)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `to`, `half` and `cpu` call: graphs of weights that move are of no use, and hold memory."""
        if self.graphs is not None:
            self.graphs.clear()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Self:
        """Graphs are for evaluation mode: while training, a step needs their memory."""
        if mode and self.graphs is not None:
            self.graphs.clear()
        return super().train(mode)

    @property
    def feature_width(self) -> int:
        sizes = self._sam_sizes
        widths = {
            "sam-mid": sizes.mid_width,
            "sam": sizes.out_width,
            "sum": sizes.out_width,
            "concat": 2 * sizes.out_width,
        }
        return widths[self.features]

    @property
    def tokens_per_page(self) -> int:
        return self.grid**2

    def forward(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        self.check_pages(pages_PHW)
        return self._encode(pages_PHW)

    def encode_mixed(self, pages: Sequence[torch.Tensor], *, batch_size: int = 16) -> list[torch.Tensor]:
        """Encode square pages of several sizes: those of one size go together, `batch_size` at a time.

        Args:
            pages: uint8 [H, W] each, H = W a multiple of 64 pixels.

        Returns:
            features_VE of each page, in the order given, V = (H / 64)².

        Raises:
            PageSizeError: a page is no such square.
        """
        of_size: dict[int, list[int]] = {}
        for number, page_HW in enumerate(pages):
            side = page_HW.shape[0]
            if page_HW.dtype != torch.uint8 or tuple(page_HW.shape) != (side, side) or side % PIXELS_PER_TOKEN:
                raise PageSizeError(
                    f"page {number} has shape {tuple(page_HW.shape)} and type {str(page_HW.dtype)[6:]}; encoder "
                    f"'deepseek-ocr' takes uint8 squares whose side is a multiple of {PIXELS_PER_TOKEN} pixels."
                )
            of_size.setdefault(side, []).append(number)
        found: dict[int, torch.Tensor] = {}
        for numbers in of_size.values():
            for begin in range(0, len(numbers), batch_size):
                part = numbers[begin : begin + batch_size]
                found.update(zip(part, self._encode(torch.stack([pages[number] for number in part])), strict=True))
        return [found[number] for number in range(len(pages))]

    def _encode(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        """Square pages of one size; compiled where that was asked for and works, as a graph where that can be."""
        if self.compile_layers and not self._compiled:
            for layer in self._layers():
                # A method, so that a copy's is the copy's own.
                layer.forward = types.MethodType(torch.compile(type(layer).forward), layer)
            self._compiled = True
        try:
            if self.graphs is None:
                return self._features(pages_PHW)
            return self.graphs(self._features, pages_PHW, module=self, dtype=self.sam_model.pos_embed.dtype)
        except TorchDynamoException as error:
            log.warning("the encoder's layers cannot be compiled here and run as they are: %s", error)
            for layer in self._layers():
                vars(layer).pop("forward", None)
            self.compile_layers = False
        return self._features(pages_PHW)

    def _layers(self) -> list[torch.nn.Module]:
        """SAM's and CLIP's, which are compiled one by one: all of a kind share one graph."""
        return [*self.sam_model.blocks, *self.vision_model.transformer.layers]

    def _features(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        dtype = self.sam_model.pos_embed.dtype
        pixels_P3HW = (pages_PHW.to(dtype) / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
        if self.features == "sam-mid":
            mid = self.sam_model(pixels_P3HW, until_mid=True)
            return F.avg_pool2d(mid, 2).flatten(2).transpose(1, 2)
        sam_map = self.sam_model(pixels_P3HW)
        sam_PVE = sam_map.flatten(2).transpose(1, 2)
        if self.features == "sam":
            return sam_PVE
        clip_PVE = self.vision_model(sam_map)[:, 1:]
        return sam_PVE + clip_PVE if self.features == "sum" else torch.cat([clip_PVE, sam_PVE], dim=-1)

    def num_tokens(self, page: Page) -> int:
        return self.tokens_per_page

    def token_spans(self, page: Page) -> TokenSpans:
        spans: TokenSpans = [[] for _ in range(self.tokens_per_page)]
        offsets, boxes = page.glyph_offsets_N, page.glyph_boxes_N4
        if len(offsets) == 0:
            return spans
        starts, ends = np.append(page.text_start, offsets[1:]), np.append(offsets[1:], page.text_end)
        centres = (boxes[:, :2] + boxes[:, 2:]) // 2 // PIXELS_PER_TOKEN
        cells = np.clip(centres[:, 1], 0, self.grid - 1) * self.grid + np.clip(centres[:, 0], 0, self.grid - 1)
        for cell, start, end in zip(cells.tolist(), starts.tolist(), ends.tolist(), strict=True):
            if spans[cell] and spans[cell][-1][1] == start:
                spans[cell][-1] = (spans[cell][-1][0], end)
            else:
                spans[cell].append((start, end))
        return spans

    def identity(self) -> str:
        head = f"{self.name} {self.features} {self.page.page_width}"
        return hashlib.sha256(f"{head} {self.weights_digest()}".encode()).hexdigest()


def check_page(page: RenderSettings, page_size: int) -> None:
    """Raise unless the page is a square of the encoder's page size."""
    if (page.page_width, page.page_height) != (page_size, page_size):
        raise PageSizeError(
            f"encoder 'deepseek-ocr' with page_size={page_size} takes pages of {page_size} × {page_size} pixels, but "
            f"the page settings say {page.page_width} × {page.page_height}. Set "
            "encoder.settings.page_size (512, 640, 1024 or 1280) or the page settings to match."
        )
