"""Loading the frozen LLM and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ocrmem.assets.fetch import asset_revision, resolve
from ocrmem.config.llm import LLMSettings, llm_config
from ocrmem.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_llm(settings: LLMSettings) -> tuple[PreTrainedModel, str]:
    """Load a causal LM and tell its revision.

    Raises:
        AssetError: the name is neither an asset, a folder nor a reachable hub id.
        CheckpointError: the folder holds no loadable causal LM.
    """
    folder = resolve(settings.name)
    options = {} if settings.attn_implementation is None else {"attn_implementation": settings.attn_implementation}
    try:
        llm = AutoModelForCausalLM.from_pretrained(folder, dtype=settings.dtype, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"LLM {settings.name!r} could not be loaded from {str(folder)!r}: {error}. Expected a folder with the "
            "config and weights of a causal LM; fetch it again or check the name."
        ) from error
    return llm, asset_revision(settings.name)


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: there is no such device, or nothing can be put on it.
    """
    try:
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"device {str(name)!r} cannot be used here: {reason}. Give cpu, or cuda or cuda:N where PyTorch sees a GPU."
        ) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the LLM of that name.

    Raises:
        CheckpointError: the folder has no tokenizer, or its tokenizer has no chat template.
    """
    folder = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no tokenizer of LLM {name!r} could be loaded from {str(folder)!r}: {error}.") from error
    if tokenizer.chat_template is None:
        raise CheckpointError(
            f"the tokenizer of LLM {name!r} has no chat template, so conversations cannot be written for it. Use an "
            "instruct model, or save the tokenizer with a chat_template."
        )
    return tokenizer


def vocabulary_size(name: str) -> int:
    """Rows of the embedding of the LLM of that name, without loading it.

    Raises:
        CheckpointError: the folder has no config of a language model.
    """
    folder = resolve(name)
    try:
        return int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the config of LLM {name!r} could not be read from {str(folder)!r}: {error}.") from error


def empty_llm(preset: str) -> PreTrainedModel:
    """An LLM of a preset's architecture on the meta device: all shapes, no memory."""
    values = llm_config(preset)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
