"""What the hardware can do, asked before a run needs it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

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
    4 of gradient and 8 of AdamW's moments for each parameter.

    Args:
        shares: processes over which FSDP or ZeRO-3 spreads the LLM.
    """
    return {
        "LLM": _bytes(model.base_llm_model) // shares,
        "encoder": _bytes(model.ocr_embed),
        "projection with gradient and AdamW": 4 * _bytes(model.proj),
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
        "processes with configs/accelerate/fsdp2.yaml or zero3.yaml to spread it, or choose a smaller one."
    )


def out_of_memory_message(error: BaseException, device: torch.device) -> str:
    """What a run that ran out of memory in a step should say: how much was needed, and what lowers it."""
    asked = str(error).partition("Tried to allocate ")[2].partition(". ")[0] or "more"
    held = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return (
        f"the training step ran out of memory on {device}: it held {held:.2f} GiB and asked for {asked}. Lower "
        "training.per_device_train_batch_size (and raise training.gradient_accumulation_steps by as much), set "
        "training.gradient_checkpointing=true, or lower memory.max_length; checkpoints are whole, so the same command "
        "goes on from the last one with --resume."
    )


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
