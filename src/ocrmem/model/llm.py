"""Loading the frozen LLM and its tokenizer."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

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
    options: dict[str, Any] = {}
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    if settings.quantization is not None:
        options["quantization_config"] = quantization_config(settings.quantization, settings.dtype)
    try:
        llm = AutoModelForCausalLM.from_pretrained(folder, dtype=settings.dtype, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"LLM {settings.name!r} could not be loaded from {str(folder)!r}: {error}. Expected a folder with the "
            "config and weights of a causal LM; fetch it again or check the name."
        ) from error
    return llm, asset_revision(settings.name)


def quantization_config(name: str, dtype: str) -> Any:
    """transformers' configuration of a quantisation.

    Args:
        name: of `LLMSettings.quantization`.
        dtype: in which products are computed; `auto`: bfloat16.

    Raises:
        ConfigError: its library is not installed.
    """
    library = name.partition("-")[0]
    if importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"llm.quantization={name!r} needs the package {library}, which is not installed here. Install it with "
            f"`pip install {library}`, or leave llm.quantization out."
        )
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if name == "bitsandbytes-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


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


def compile_layers(llm: torch.nn.Module) -> None:
    """Compile each layer of a Hugging Face LLM on its own: the layers share one compiled graph, which takes seconds
    where the whole LLM takes minutes."""
    layers = next((module for module in llm.modules() if isinstance(module, torch.nn.ModuleList)), None)
    assert layers is not None, "a causal LM keeps its layers in a ModuleList"
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
