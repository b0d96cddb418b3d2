"""Muon for the projection's matrices, AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.98)
"""AdamW's, for gains, biases and positions."""


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024: momentum, orthogonalised) on weight matrices, AdamW on the rest.

    Updates of the matrices are scaled to the size of AdamW's (`match_rms_adamw`, Liu et al. 2025), so one learning
    rate serves both.

    Args:
        proj: the trainable part.
        lr: learning rate.
        weight_decay: of the matrices.
    """

    def __init__(self, proj: nn.Module, *, lr: float, weight_decay: float = 0.0) -> None:
        named = [(name, parameter) for name, parameter in proj.named_parameters() if parameter.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and "position" not in name]
        others = [p for name, p in named if not (p.ndim == 2 and "position" not in name)]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        ]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=BETAS, weight_decay=0.0))
        super().__init__([p for _, p in named], {"lr": lr})
        # The schedule writes the learning rate into these groups, which are the parts' own.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of both."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both, by part."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Both, by part."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
