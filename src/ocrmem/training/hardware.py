"""What the hardware can do, asked before a run needs it."""

from __future__ import annotations

import os

import torch

from ocrmem.model.llm import usable_device


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
