"""PP-OCRv6-small text recognition as an encoder of pages, line by line.

```
pages_PHW ─▶ lines [P·L, 3, 48, W] in [-1, 1] ─▶ PPLCNetV4 + SVTR ─▶ [P·L, W/8, 120] ─▶ join k steps ─▶ features_PVE
                                                                          └─▶ CTC head ─▶ the text read back
```
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Self

import numpy as np
import torch
from transformers import PPOCRV6SmallRecConfig
from transformers.models.pp_ocrv6_small_rec.modeling_pp_ocrv6_small_rec import (
    PPOCRV6SmallRecForTextRecognition,
)

from ocrmem.assets.fetch import resolve
from ocrmem.config.encoder import PPOCRSettings
from ocrmem.config.render import PP_OCR_PAGE, RenderSettings
from ocrmem.encoders.base import OCREncoder
from ocrmem.encoders.pp_ocr_weights import OnnxWeights, fold_norms, load_onnx
from ocrmem.errors import PageSizeError
from ocrmem.types import Page, TokenSpans

LINE_HEIGHT = 48
"""Height of a line that the recogniser was trained on."""
STEP_WIDTH = 8
"""Pixels under one feature step: the backbone and its pooling reduce the width eightfold."""
STEP_FEATURES = 120
"""Width of the features just before the CTC head."""
NUM_CLASSES = 18710
"""Characters, and the CTC blank as class 0."""
FEATURE_STD = 4.5
"""Standard deviation of those features over rendered English text; features are divided by it."""
DEFAULT_CHECKPOINT = "pp-ocrv6-small-rec"


class PPOCREncoder(OCREncoder):
    """Reads pages of 48-pixel lines. V = lines × width / 8 / steps_per_token, E = 120 × steps_per_token.

    Each line is encoded alone, so a line's features do not depend on the rest of the page. Lines without ink are not
    encoded: their features are zeros, which `num_tokens` never shows.
    """

    name = "pp-ocr"
    settings_type = PPOCRSettings

    def __init__(self, settings: PPOCRSettings, *, page: RenderSettings) -> None:
        super().__init__()
        check_page(page, settings.steps_per_token)
        self.page = page
        self.steps_per_token = settings.steps_per_token
        self.tokens_per_line = page.page_width // (STEP_WIDTH * settings.steps_per_token)
        # The ONNX graph has 1e-5 in its blocks and 1e-6 in the last norm; the config has one value for both.
        config = PPOCRV6SmallRecConfig(head_out_channels=NUM_CLASSES, layer_norm_eps=1e-5)
        self.recogniser = PPOCRV6SmallRecForTextRecognition(config)
        self.recogniser.head.encoder.norm.eps = 1e-6
        fold_norms(self.recogniser)
        for parameter in self.recogniser.parameters():
            if parameter.ndim == 4:  # twice as fast on a CPU as the default memory format
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._characters: list[str] = []

    @classmethod
    def build(cls, settings: PPOCRSettings, *, page: RenderSettings | None = None) -> Self:
        return cls(settings, page=page or preset_page(settings))

    def load_checkpoint(self, checkpoint: str | None) -> None:
        weights = OnnxWeights(resolve(checkpoint or DEFAULT_CHECKPOINT))
        load_onnx(self.recogniser, weights)
        self._characters = weights.characters

    @property
    def feature_width(self) -> int:
        return STEP_FEATURES * self.steps_per_token

    @property
    def tokens_per_page(self) -> int:
        return self.page.lines_per_page * self.tokens_per_line

    @property
    def lines_per_unit(self) -> int:
        return 1

    def forward(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        self.check_pages(pages_PHW)
        lines = self._lines(pages_PHW)
        inked = self._inked(lines)
        steps = self.line_features(lines[inked])
        features = steps.new_zeros(lines.shape[0], *steps.shape[1:])
        features = features.index_put((inked,), steps / FEATURE_STD)
        return features.reshape(pages_PHW.shape[0], self.tokens_per_page, self.feature_width)

    def line_features(self, lines_LHW: torch.Tensor) -> torch.Tensor:
        """Raw features [L, W/8, 120] of uint8 lines [L, 48, W], just before the CTC head."""
        dtype = self.recogniser.dtype
        if len(lines_LHW) == 0:
            return torch.zeros(0, lines_LHW.shape[2] // STEP_WIDTH, STEP_FEATURES, dtype=dtype, device=lines_LHW.device)
        pixels = (lines_LHW.to(dtype) / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self.recogniser.head.encoder(self.recogniser.model(pixels).last_hidden_state).last_hidden_state

    def read_lines(self, pages_PHW: torch.Tensor) -> list[list[str]]:
        """What the recogniser's own CTC head reads on each line with ink, page by page (greedy decoding)."""
        self.check_pages(pages_PHW)
        lines = self._lines(pages_PHW)
        inked = self._inked(lines)
        classes = self.recogniser.head.head(self.line_features(lines[inked])).argmax(-1).cpu().numpy()
        pages: list[list[str]] = [[] for _ in range(pages_PHW.shape[0])]
        for line, row in zip(inked.tolist(), classes, strict=True):
            pages[line // self.page.lines_per_page].append(self._decode(row))
        return pages

    def num_tokens(self, page: Page) -> int:
        if page.num_lines == 0:
            return 0
        # Below the last line is nothing, and to the right of its last glyph neither.
        last_N4 = page.glyph_boxes_N4[page.glyph_boxes_N4[:, 1] == page.glyph_boxes_N4[-1:, 1]]
        on_last = -(-int(last_N4[:, 2].max()) // (STEP_WIDTH * self.steps_per_token)) if len(last_N4) else 1
        return (page.num_lines - 1) * self.tokens_per_line + min(max(on_last, 1), self.tokens_per_line)

    def token_spans(self, page: Page) -> TokenSpans:
        spans: TokenSpans = [[] for _ in range(self.num_tokens(page))]
        offsets, boxes = page.glyph_offsets_N, page.glyph_boxes_N4
        if len(offsets) == 0:
            return spans
        starts, ends = np.append(page.text_start, offsets[1:]), np.append(offsets[1:], page.text_end)
        columns = (boxes[:, 0] + boxes[:, 2]) // 2 // (STEP_WIDTH * self.steps_per_token)
        columns = np.minimum(columns, self.tokens_per_line - 1)  # spaces hanging over the margin
        tokens = np.minimum(boxes[:, 1] // LINE_HEIGHT * self.tokens_per_line + columns, len(spans) - 1)
        for token, start, end in zip(tokens.tolist(), starts.tolist(), ends.tolist(), strict=True):
            span = spans[token]
            if span and span[-1][1] == start:
                span[-1] = (span[-1][0], end)
            else:
                span.append((start, end))
        return spans

    def identity(self) -> str:
        head = f"{self.name} {self.steps_per_token} {FEATURE_STD}"
        return hashlib.sha256(f"{head} {self.weights_digest()}".encode()).hexdigest()

    def _lines(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        return pages_PHW[:, : self.page.lines_per_page * LINE_HEIGHT].reshape(-1, LINE_HEIGHT, self.page.page_width)

    def _inked(self, lines_LHW: torch.Tensor) -> torch.Tensor:
        """int64 indices of the lines with a pixel that is not background."""
        return (lines_LHW != self.page.background).flatten(1).any(dim=1).nonzero().squeeze(-1)

    def _decode(self, classes: np.ndarray) -> str:
        """CTC: repeated classes are one, class 0 is none; the class after the last character is the space."""
        kept = classes[np.append(True, classes[1:] != classes[:-1]) & (classes != 0)]
        characters = self._characters
        return "".join(characters[index - 1] if index <= len(characters) else " " for index in kept)


def preset_page(settings: PPOCRSettings) -> RenderSettings:
    """The preset, its width moved to the nearest that is a whole number of memory tokens."""
    unit = STEP_WIDTH * settings.steps_per_token
    width = max(1, round(PP_OCR_PAGE.page_width / unit)) * unit
    return dataclasses.replace(PP_OCR_PAGE, page_width=width)


def check_page(page: RenderSettings, steps_per_token: int) -> None:
    """Raise unless the recogniser can read such pages."""
    unit = STEP_WIDTH * steps_per_token
    problems = []
    if page.line_height != LINE_HEIGHT:
        problems.append(f"line_height={page.line_height}, expected {LINE_HEIGHT}")
    if page.margin_top or page.margin_bottom:
        problems.append(f"margin_top={page.margin_top} and margin_bottom={page.margin_bottom}, expected 0")
    if page.page_width % unit:
        problems.append(f"page_width={page.page_width}, expected a multiple of {unit} (8 pixels × steps_per_token)")
    if page.page_height % LINE_HEIGHT:
        problems.append(f"page_height={page.page_height}, expected a multiple of {LINE_HEIGHT}")
    if problems:
        raise PageSizeError(
            f"encoder 'pp-ocr' cannot read such pages: {'; '.join(problems)}. Change the page settings."
        )
