"""Muon for the projection's matrices, AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.98)
"""AdamW's, for gains, biases and positions."""
MOMENTUM = 0.95
COEFFICIENTS, ITERATIONS = (3.4445, -4.775, 2.0315), 5
"""Of the quintic of Newton-Schulz, and how often it is applied (Jordan et al. 2024)."""


class BatchedMuon(torch.optim.Optimizer):
    """Muon as `torch.optim.Muon` (torch 2.9) has it, with matrices of one shape together: the same updates and state.

    That one takes matrices one by one, some 23 kernels each, and a projection has two dozen.

    Args:
        params: matrices.
        lr: learning rate; updates are scaled to the size of AdamW's (`match_rms_adamw`, Liu et al. 2025).
        weight_decay: as AdamW's.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; without a `closure`."""
        assert closure is None, "a closure is not supported"
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            for parameter in params:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
            grads = [parameter.grad for parameter in params]
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in params]
            torch._foreach_lerp_(buffers, grads, 1 - MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]
            updates = torch._foreach_lerp(grads, buffers, MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
            for numbers in _by_shape(params):
                wide_NRC = torch.stack([_wide(updates[number]) for number in numbers])
                scale = 0.2 * max(wide_NRC.shape[1:]) ** 0.5  # for a root mean square of 0.2
                for number, direction_RC in zip(numbers, orthogonalized(wide_NRC).unbind(), strict=True):
                    _wide(params[number]).add_(direction_RC, alpha=-group["lr"] * scale)


def orthogonalized(matrices_NRC: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrix of each, roughly: Newton-Schulz in bfloat16 (Jordan et al. 2024).

    Args:
        matrices_NRC: N matrices with R ≤ C.
    """
    a, b, c = COEFFICIENTS
    found = matrices_NRC.bfloat16()
    found = found / torch.linalg.vector_norm(found, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """A view of it with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _by_shape(matrices: Iterable[torch.Tensor]) -> list[list[int]]:
    """Numbers of the matrices that have the same two sides, whichever is the first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        groups.setdefault(tuple(sorted(matrix.shape)), []).append(number)
    return list(groups.values())


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024: momentum, orthogonalised) on weight matrices, AdamW on the rest.

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
        self.parts: list[torch.optim.Optimizer] = [BatchedMuon(matrices, lr=lr, weight_decay=weight_decay)]
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
