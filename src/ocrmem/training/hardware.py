"""What the hardware can do and what a run needs of it, asked before it is needed and told where it was too little.

docs/cost.md has the formulas.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config

from ocrmem.config.train import TrainConfig
from ocrmem.errors import ConfigError
from ocrmem.model.llm import usable_device
from ocrmem.model.mem_model import MEMModel


def own_device(name: str | None = None) -> torch.device:
    """The device of this process.

    Args:
        name: the user's choice; None: of several processes the GPU of its local rank, else the first, else the CPU.

    Raises:
        ConfigError: the device cannot be used.
    """
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return usable_device(name)


def check_bfloat16(wanted: Sequence[str], device: torch.device, *, capability: tuple[int, int] | None = None) -> None:
    """Raise where settings ask for bfloat16 and the GPU has no such arithmetic: torch would emulate it, many times
    slower.

    Args:
        wanted: the settings that ask for it (`training.bf16=true`).
        capability: CUDA compute capability; None: the device's.

    Raises:
        ConfigError: bfloat16 is asked for, and the capability is below 8.0.
    """
    if not wanted or (device.type != "cuda" and capability is None):
        return
    capability = capability or torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return
    raise ConfigError(
        f"{', '.join(wanted)}: {device} has compute capability {capability[0]}.{capability[1]} and no bfloat16 "
        "arithmetic, which begins at 8.0. Set llm.dtype and encoder.dtype to float16 or float32, training.bf16=false "
        "and memory.feature_dtype=float16."
    )


def bfloat16_settings(config: TrainConfig) -> list[str]:
    """The settings of a config that ask for bfloat16."""
    asked = [f"{name}.dtype=bfloat16" for name in ("llm", "encoder") if getattr(config, name).dtype == "bfloat16"]
    return asked + (["training.bf16=true"] if config.training.get("bf16") else [])


def bytes_needed(model: MEMModel, *, shares: int = 1) -> dict[str, int]:
    """Bytes that training takes on one device before any activation, by part.

    The frozen parts have neither gradient nor optimizer state; the projection has both in float32: 4 bytes of weight,
    4 of gradient and 8 of AdamW's moments for each parameter; and what it reads of the LLM's embeddings once.

    Args:
        shares: processes over which FSDP or ZeRO-3 spreads the LLM.
    """
    return {
        "LLM": _bytes(model.base_llm_model) // shares,
        "encoder": _bytes(model.ocr_embed),
        "projection with gradient and AdamW": _bytes(model.proj) + 3 * _learned(model),
    }


def check_memory(model: MEMModel, device: torch.device, *, shares: int = 1, free: int | None = None) -> None:
    """Raise where the weights alone do not fit.

    Args:
        shares: as for `bytes_needed`.
        free: bytes free on the device; None: asked of the driver.

    Raises:
        ConfigError: they do not; the message says how much each part takes, and what lowers it.
    """
    if free is None:
        if device.type != "cuda":
            return
        free = torch.cuda.mem_get_info(device)[0]
    needed = bytes_needed(model, shares=shares)
    if sum(needed.values()) <= free:
        return
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in needed.items())
    raise ConfigError(
        f"too little memory on {device}: {sum(needed.values()) / 2**30:.2f} GiB are needed before any activation "
        f"({parts}), {free / 2**30:.2f} GiB are free. Set llm.dtype=bfloat16 to halve the LLM, launch several "
        "processes with configs/accelerate/fsdp2.yaml or zero3.yaml to spread it, set llm.quantization, or choose a "
        "smaller one."
    )


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that a training step needs, by what they are for."""

    weights: int
    """Of all parts on the GPU, as they are stored."""
    activations: int
    """What the LLM's layers keep for the backward pass."""
    logits: int
    """Of the labels that are there at a time, with their gradient."""
    projection: int
    """Its gradient and AdamW's two moments."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.activations + self.logits + self.projection

    def __str__(self) -> str:
        shares = (
            f"{name} {getattr(self, name) / 1e9:.1f}" for name in ("weights", "activations", "logits", "projection")
        )
        return f"about {self.total / 1e9:.1f} GB ({', '.join(shares)})"


def kept_values(config: Any, *, compiled: bool, memory_budget: float = 1.0) -> int:
    """16-bit values that a layer keeps of a position for the backward pass (`tests/training/test_hardware.py` counts).

    With D the width, Q and K those of queries and keys, I the MLP's: as it is 4D + 4Q + 4K + 3I, the norms' inputs in
    float32; compiled 2D + 3Q + 3K + 2I; and 2D + Q + 2K + 2I with a memory budget a little below 1, where queries and
    keys are turned and attention is run a second time. Lower budgets repeat matrix products and are not told here.

    Args:
        config: a Hugging Face text config of the Llama kind.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    queries, keys = heads * head_width, (getattr(config, "num_key_value_heads", None) or heads) * head_width
    if not compiled:
        return 4 * (width + queries + keys) + 3 * config.intermediate_size
    twice = memory_budget < 1
    return 2 * width + (1 if twice else 3) * queries + (2 if twice else 3) * keys + 2 * config.intermediate_size


def step_memory(
    model: MEMModel,
    *,
    positions: int,
    labels: int,
    compiled: bool = False,
    memory_budget: float = 1.0,
    checkpointing: bool = False,
) -> StepMemory:
    """Memory of a training step with a frozen LLM of the Llama kind.

    Args:
        positions: of the batch, padding included.
        labels: whose logits are in memory at a time.
        memory_budget: `compile_memory_budget` of the config.
        checkpointing: each layer keeps its input alone, and one layer everything.
    """
    config: Any = model.base_llm_model.config.get_text_config()
    size = model.dtype.itemsize if model.dtype.is_floating_point else 2
    layer = positions * size * kept_values(config, compiled=compiled, memory_budget=memory_budget)
    num_layers = config.num_hidden_layers
    inputs = num_layers * positions * config.hidden_size * size
    activations = inputs + layer if checkpointing else num_layers * layer
    return StepMemory(
        weights=_bytes(model),
        activations=activations,
        logits=labels * config.vocab_size * (size + 4 + 4),
        projection=3 * _learned(model),
    )


def out_of_memory(model: MEMModel, inputs: dict[str, Any], *, error: BaseException, step: int) -> str:
    """The message of a step that did not fit: what it takes, and which settings lower it."""
    input_ids, labels = inputs["input_ids"], inputs.get("labels")
    counted = 0 if labels is None else int((labels != -100).sum())
    chunk = model.loss_chunk_size or counted
    parts = list(model.base_llm_model.modules())
    layers = next((part for part in parts if isinstance(part, torch.nn.ModuleList)), ())
    compiled = any("forward" in vars(layer) for layer in layers)
    checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in parts)
    needed = step_memory(
        model,
        positions=input_ids.numel(),
        labels=min(counted, chunk),
        compiled=compiled,
        memory_budget=torch._functorch.config.activation_memory_budget,
        checkpointing=checkpointing,
    )
    has, device = "", model.proj.linear1.weight.device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        has = f"; the GPU has {total / 1e9:.1f} GB, {free / 1e9:.1f} of them free"
    ways = ["lower training.per_device_train_batch_size (with more training.gradient_accumulation_steps)"]
    if not checkpointing:
        ways.append("set training.gradient_checkpointing: true")
    if not compiled:
        ways.append("set compile: true")
    else:
        ways.append("lower compile_memory_budget")
    if min(counted, chunk) > 64:
        ways.append(f"lower loss_chunk_size (now {model.loss_chunk_size or 'null'})")
    ways.append("lower memory.recent_tokens or data.max_reply_tokens, or set llm.quantization")
    reason = str(error).partition("\n")[0].partition(" Tried")[0].rstrip(".")
    return (
        f"step {step} did not fit into memory ({reason}): its batch of {tuple(input_ids.shape)} positions, {counted} "
        f"labelled, needs {needed}{has}. To lower it, {'; '.join(ways)}. Start the same command again, and it goes on "
        "from the last checkpoint."
    )


def _learned(model: MEMModel) -> int:
    return sum(p.numel() * p.itemsize for p in model.proj.parameters() if p.requires_grad)


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
