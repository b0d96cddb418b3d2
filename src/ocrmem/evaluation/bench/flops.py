"""Arithmetic of the parts, in FLOPs: a multiplication and an addition are two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ocrmem.encoders.deepencoder_clip import CLIPSizes
from ocrmem.encoders.deepencoder_sam import SAMSizes


def sam_flops(sizes: SAMSizes, page_size: int) -> float:
    """SAM with its neck and both convolutions, for a page; padded window positions are not counted."""
    side = page_size // sizes.patch
    positions = side * side
    linear = 2 * positions * (4 * sizes.width**2 + 2 * sizes.width * sizes.mlp_width) * sizes.num_layers
    num_global = sum(layer < sizes.num_layers for layer in sizes.global_layers)
    keys = num_global * positions + (sizes.num_layers - num_global) * sizes.window**2
    attention = 4 * positions * keys * sizes.width
    patches = 2 * positions * 3 * sizes.patch**2 * sizes.width
    neck = 2 * positions * (sizes.width * sizes.neck_width + 9 * sizes.neck_width**2)
    down = (
        2
        * 9
        * (positions / 4 * sizes.neck_width * sizes.mid_width + positions / 16 * sizes.mid_width * sizes.out_width)
    )
    return linear + attention + patches + neck + down


def clip_flops(sizes: CLIPSizes, page_size: int) -> float:
    """CLIP's transformer over a page's map of a sixteenth of SAM's patches, and the class token."""
    positions = (page_size // 64) ** 2 + 1
    linear = 2 * positions * (4 * sizes.width**2 + 2 * sizes.width * sizes.mlp_width)
    return sizes.num_layers * (linear + 4 * positions**2 * sizes.width)


def llm_parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Weights of a Llama- or Qwen-like LLM, by part: `layers`, `embedding` and `head` (0 where it is the embedding).

    Args:
        config: a preset of `config.llm`.
    """
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_width = config.get("head_dim") or width // heads
    attention = 2 * width * heads * head_width + 2 * width * config["num_key_value_heads"] * head_width
    layer = attention + 3 * width * config["intermediate_size"]
    embedding = width * config["vocab_size"]
    return {
        "layers": layer * config["num_hidden_layers"],
        "embedding": embedding,
        "head": 0 if config["tie_word_embeddings"] else embedding,
    }


def step_flops_per_position(config: Mapping[str, Any]) -> float:
    """A training step with a frozen LLM: forward and the gradient of the activations, 4 for each weight, the output
    layer's with them. Attention's own products are left out, as in the limit that the measurements state."""
    parameters = llm_parameters(config)
    return 4.0 * (parameters["layers"] + parameters["embedding"])
