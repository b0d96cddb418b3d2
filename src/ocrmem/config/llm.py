"""The frozen LLM's settings, and configurations of well-known LLMs, so that sizes can be counted without a network.

Figures are those of the models' public `config.json` files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ocrmem.config.loader import nearest
from ocrmem.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LLMSettings:
    """The frozen language model."""

    name: str = "smollm2-135m-instruct"
    """An asset name, a local folder or a hub id of a causal LM with its tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights; `auto`: as stored. The projection keeps float32 weights whatever this says."""
    attn_implementation: str | None = None
    """Attention kernel by its transformers name (`sdpa`, `flash_attention_2`, `eager`); None: transformers' choice."""
    quantization: Literal["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8"] | None = None
    """Keep the frozen weights in 8 or 4 bits, by a library that must be installed; embeddings and the output layer stay
    as they are. An adapter is best used with the LLM that it was trained with. None: as `dtype` says."""

    def __post_init__(self) -> None:
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(
                f"llm.quantization={self.quantization!r}: expected one of {', '.join(QUANTIZATIONS)}, or null."
            )


QUANTIZATIONS = ("bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8")


def _qwen3(width: int, layers: int, heads: int, mlp: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": mlp,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }


def _llama(
    width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }


LLM_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408, tied=False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600, tied=False),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, 128256, tied=False),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, tied=True),
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, 128256, tied=True),
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, 49152, tied=True),
    "smollm2-360m": _llama(960, 32, 15, 5, 2560, 49152, tied=True),
    "smollm2-1.7b": _llama(2048, 24, 32, 32, 8192, 49152, tied=True),
}
"""Keyword arguments for `AutoConfig.for_model`, by preset name."""


def llm_config(name: str) -> dict[str, Any]:
    """The configuration of a preset, by its name in lower case.

    Raises:
        ConfigError: there is no such preset; the nearest is named.
    """
    key = name.lower().rpartition("/")[2]
    if key not in LLM_CONFIGS:
        raise ConfigError(f"unknown LLM preset {name!r}. {nearest(key, LLM_CONFIGS)}")
    return dict(LLM_CONFIGS[key])
