"""A whole memory for tests: SmolLM2's tokenizer, a small random LLM, and an encoder that a person can follow."""

from __future__ import annotations

import functools
from typing import Any

import torch
from memory.parts import shared_tokenizer
from memory.pooling import PoolingEncoder
from transformers import AutoConfig, AutoModelForCausalLM

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.growing import GrowingSettings
from ocrmem.config.mem import MEMConfig
from ocrmem.config.memory import MemorySettings
from ocrmem.config.projection import ProjectionSettings
from ocrmem.config.render import PP_OCR_PAGE
from ocrmem.data.processor import MEMProcessor
from ocrmem.memory.placeholder import choose_memory_token
from ocrmem.model.mem_model import MEMModel
from ocrmem.session.memory import Memory
from ocrmem.types import Message

SMALL = {"context_threshold": 128, "recent_tokens": 48}
FAMILIES = {"llama": {"head_dim": 6}, "qwen3": {"head_dim": 8}, "gemma3_text": {"head_dim": 8, "sliding_window": 64}}


def make_model(
    family: str = "llama",
    *,
    scale: float = 1.0,
    seed: int = 0,
    kind: str = "attention",
    positions: int = 8192,
    read_tokens: int = 0,
) -> MEMModel:
    """A random model of that family; `scale` is the encoder's one weight."""
    tokenizer = shared_tokenizer()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **FAMILIES[family],
    )
    token, index = choose_memory_token(tokenizer)
    settings = MEMConfig.from_settings(
        encoder=EncoderSettings(name="pooling"),
        page=PP_OCR_PAGE,
        memory=MemorySettings(**SMALL),
        projection=ProjectionSettings(kind=kind, num_layers=1, num_heads=2, read_tokens=read_tokens),
        memory_token=token,
        memory_token_id=index,
    )
    llm = AutoModelForCausalLM.from_config(config)
    return MEMModel(settings, base_llm_model=llm, ocr_embed=PoolingEncoder(scale=scale), tokenizer=tokenizer).eval()


@functools.cache
def shared_model(family: str = "llama") -> MEMModel:
    """One model for all tests that leave it as it is."""
    return make_model(family)


def make_memory(model: MEMModel | None = None, *, budget: int = 640, **options: Any) -> Memory:
    """A memory on a small model; keyword arguments are settings of the budget, or `Memory`'s own."""
    model = model or shared_model()
    options = {"densities": (1.0, 0.5), "ledger_share": 0.125, **options}
    own = {name: options.pop(name) for name in ("store", "conversation", "reencode", "wait") if name in options}
    processor = MEMProcessor.from_model(model, tokenizer=shared_tokenizer())
    return Memory(model, processor, settings=GrowingSettings(budget_tokens=budget, **options), **own)


def talk(number: int, *, start: int = 0, words: int = 14) -> list[Message]:
    """Turns of the user and the assistant, no two alike, some with an identifier."""
    roles = ("user", "assistant")
    tails = ("and so on it goes", "see file_{}.txt", "it weighs {} kg", "call me at that place")
    return [
        Message(roles[n % 2], f"turn {n} is about {'thing ' * words}{tails[n % 4].format(n)}.")  # type: ignore[arg-type]
        for n in range(start, start + number)
    ]
