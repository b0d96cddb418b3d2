"""Encoder settings. Each encoder has one dataclass of its own; `EncoderSettings` names the encoder and carries it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ocrmem.errors import ConfigError

DEEPSEEK_FEATURES = ("sam-mid", "sam", "sum", "concat")
ATTENTIONS = ("auto", "reference", "folded", "flex", "triton")


@dataclass(frozen=True, kw_only=True)
class PPOCRSettings:
    """PP-OCRv6-small text recognition, read line by line."""

    steps_per_token: int = 16
    """Neighbouring feature steps (8 pixels each) that are joined into one memory token. 16 steps are 128 pixels,
    about 13 characters or 3.4 text tokens at the default page."""

    def __post_init__(self) -> None:
        if self.steps_per_token < 1:
            raise ConfigError(f"steps_per_token={self.steps_per_token}: expected 1 or more.")


@dataclass(frozen=True, kw_only=True)
class DeepSeekOCRSettings:
    """DeepSeek-OCR's DeepEncoder: SAM-ViT-B, a 16x convolutional compressor, CLIP-L."""

    features: Literal["sam-mid", "sam", "sum", "concat"] = "concat"
    """Which features are read: `sam-mid` (512 wide, between the two down-sampling convolutions, averaged to the final
    grid), `sam` (1,024), `sum` (1,024, SAM + CLIP) or `concat` (2,048, CLIP and SAM side by side: what DeepSeek-OCR
    itself feeds on)."""
    page_size: Literal[512, 640, 1024, 1280] = 1024
    """Side of the square page in pixels: 64, 100, 256 or 400 memory tokens."""
    attention: Literal["auto", "reference", "folded", "flex", "triton"] = "auto"
    """How SAM's relative positions enter its attention; all ways give the same features, to rounding. `reference`
    materialises the bias, `folded` puts it into queries and keys, `flex` is FlexAttention, `triton` a kernel of its own
    for half precision on GPUs from Ampere on. `auto`: `triton` there, `folded` on other GPUs, `reference` on the CPU.
    What cannot run falls back to what can."""
    compile: bool = False
    """Compile the encoder's layers. Pays after some hundred pages on a GPU; needs a C++ compiler or Triton."""
    graphs: bool = True
    """Replay the encoder as a CUDA graph for a batch size that comes a third time: on a GPU, in half precision, without
    gradients and autocast, as when pages are encoded ahead or for a prompt. The features are the same; few pages at
    once come sooner, since Python launches them slower than a GPU runs them. The memory of a batch stays taken. What
    cannot be captured runs as it is."""

    def __post_init__(self) -> None:
        if self.features not in DEEPSEEK_FEATURES:
            raise ConfigError(f"features={self.features!r}: expected one of {', '.join(DEEPSEEK_FEATURES)}.")
        if self.page_size not in (512, 640, 1024, 1280):
            raise ConfigError(f"page_size={self.page_size}: expected 512, 640, 1024 or 1280.")
        if self.attention not in ATTENTIONS:
            raise ConfigError(f"attention={self.attention!r}: expected one of {', '.join(ATTENTIONS)}.")


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Which OCR encoder reads the pages."""

    name: str = "pp-ocr"
    """A registered encoder: `pp-ocr`, `deepseek-ocr`, or one that an installed package adds by entry point."""
    checkpoint: str | None = None
    """A hub id, a folder or an asset name with its weights; None: the encoder's own default."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of its weights and arithmetic. It is part of what an adapter was made for."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The encoder's own settings, checked by the encoder (for `pp-ocr`: `PPOCRSettings`)."""
