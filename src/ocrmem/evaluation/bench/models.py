"""The frozen LLM at full size with random weights, and a `MEMModel` around it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ocrmem.config.encoder import DeepSeekOCRSettings, EncoderSettings
from ocrmem.config.mem import MEMConfig
from ocrmem.config.memory import MemorySettings
from ocrmem.config.projection import ProjectionSettings
from ocrmem.config.render import deepseek_ocr_page
from ocrmem.encoders.deepseek_ocr import DeepSeekOCREncoder
from ocrmem.evaluation.bench.deepencoder import random_encoder
from ocrmem.evaluation.bench.sizes import Sizes
from ocrmem.model.mem_model import MEMModel


def random_llm(sizes: Sizes, device: torch.device) -> PreTrainedModel:
    """The LLM, frozen, on its device."""
    values = dict(sizes.llm)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(config, dtype=sizes.dtype, attn_implementation="sdpa")
    return llm.to(device).requires_grad_(False)


def bench_encoder_of(sizes: Sizes, device: torch.device, *, attention: str = "auto") -> DeepSeekOCREncoder:
    """The encoder of the pages' size."""
    settings = DeepSeekOCRSettings(page_size=sizes.page_size, attention=attention)  # pyright: ignore[reportArgumentType]
    page = deepseek_ocr_page(sizes.page_size)
    return random_encoder(settings, page, sizes.sam, sizes.clip, device=device, dtype=sizes.dtype)


def memory_model(llm: PreTrainedModel, encoder: DeepSeekOCREncoder, sizes: Sizes) -> MEMModel:
    """Ours, with an MLP of the LLM's width as projection; the placeholder is the vocabulary's last id."""
    name = str(sizes.dtype).removeprefix("torch.")
    config = MEMConfig.from_settings(
        encoder=EncoderSettings(name="deepseek-ocr", dtype=name),  # pyright: ignore[reportArgumentType]
        page=encoder.page,
        memory=MemorySettings(feature_dtype=name),  # pyright: ignore[reportArgumentType]
        projection=ProjectionSettings(),
        memory_token="",
        memory_token_id=placeholder_id(sizes),
    )
    model = MEMModel(config, base_llm_model=llm, ocr_embed=encoder, llm_name=sizes.llm_name)
    model.proj.compute_dtype = None if sizes.dtype == torch.float32 else sizes.dtype
    return model


def placeholder_id(sizes: Sizes) -> int:
    """The vocabulary's last id, which no random text has."""
    return sizes.llm["vocab_size"] - 1


def random_ids(sizes: Sizes, number: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [number], on the CPU, without the placeholder."""
    return torch.randint(0, placeholder_id(sizes), (number,), generator=generator)


def sample(
    sizes: Sizes, *, positions: int, memory: int, labels: int, tokens_per_page: int, seed: int
) -> dict[str, Any]:
    """A sample as `MEMDataset` gives them, but for its pages' features in place of pixels.

    Args:
        memory: positions of its memory, whole pages.
    """
    generator = torch.Generator().manual_seed(seed)
    pages = memory // tokens_per_page
    text = random_ids(sizes, positions - memory, generator)
    input_ids = torch.cat([text[:8], torch.full((memory,), placeholder_id(sizes)), text[8:]])
    answers = torch.full_like(input_ids, -100)
    answers[-labels:] = input_ids[-labels:]
    return {
        "input_ids": input_ids,
        "labels": answers,
        "pages": torch.zeros(pages, 0, 0, dtype=torch.uint8),
        "page_keys": [f"{seed}-{page}" for page in range(pages)],
        "page_num_tokens": torch.full((pages,), tokens_per_page),
    }
