"""What is measured: full size on a GPU, and the same code on small sizes, so that a CPU runs all of it in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ocrmem.config.llm import llm_config
from ocrmem.encoders.deepencoder_clip import CLIPSizes
from ocrmem.encoders.deepencoder_sam import SAMSizes

PageSize = Literal[512, 640, 1024, 1280]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of all parts of the benchmark."""

    dtype: torch.dtype = torch.bfloat16
    product: int = 8192
    """Side of the matrices whose product's rate everything is compared with."""
    sam: SAMSizes = field(default_factory=SAMSizes)
    clip: CLIPSizes = field(default_factory=CLIPSizes)
    page_size: PageSize = 1024
    pages: int = 16
    """Pages of a batch."""
    batches: tuple[int, ...] = (1, 4)
    """Further batches of the fastest way."""
    mixed: tuple[int, ...] = (512, 1024, 640, 1280, 1024, 512, 640, 1024)
    llm_name: str = "qwen3-8b"
    llm: dict[str, Any] = field(default_factory=lambda: llm_config("qwen3-8b"))
    compile_layers: bool = True
    """Time the LLM's layers compiled, too."""
    batch: int = 2
    """Samples of a step."""
    positions: int = 2048
    """Positions of a sample, half of them memory."""
    labels: int = 256
    """Labels of a sample."""
    short_positions: int = 128
    """Positions of a short sample, which has no memory."""
    short_samples: int = 32
    """Short samples of the mixture."""
    long_samples: int = 74
    """Three samples in ten are short, and all together fill rows of `batch × positions` to the last position."""
    history_tokens: int = 32768
    ratio: int = 8
    """Text tokens of the history to a memory token."""
    question_tokens: int = 64
    chars_per_token: float = 4.0
    render_chars: int = 1_000_000


def small_sizes() -> Sizes:
    """For a CPU: the same shape of everything, in seconds."""
    sam = SAMSizes(
        width=64, num_layers=4, num_heads=2, mlp_width=96, window=14, global_layers=(1, 3), neck_width=16, mid_width=24,
        out_width=32, grid=32,
    )  # fmt: skip
    clip = CLIPSizes(width=32, num_layers=2, num_heads=2, mlp_width=64, grid=8)
    llm = {
        "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160, "vocab_size": 997,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    return Sizes(
        dtype=torch.float32, product=512, sam=sam, clip=clip, page_size=512, pages=2, batches=(1,),
        mixed=(512, 640, 512), llm_name="a tiny qwen3", llm=llm, positions=256, labels=24, short_positions=32,
        short_samples=16, long_samples=38, history_tokens=2048, question_tokens=16, render_chars=40_000,
        compile_layers=False,
    )  # fmt: skip
