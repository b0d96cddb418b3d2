"""Cross entropy with the logits of some positions at a time, forward and backward.

For an LLM that gives its output layer's logits as they are: its hidden states are taken in front of that layer, which
is then called part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(eq=False)
class Captured:
    """What went into an output layer, and the one position of it that came out. Where the LLM's logits are that very
    tensor, it does nothing more to them."""

    hidden_ND: torch.Tensor | None = None
    output: torch.Tensor | None = None


@contextmanager
def captured(output_layer: nn.Module | None, index: tuple[torch.Tensor, torch.Tensor]) -> Iterator[Captured]:
    """While open, keep the hidden states [N, D] of the N positions that come to `output_layer`, which sees one."""
    found = Captured()

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BSD, *rest = arguments
        found.hidden_ND = hidden_BSD[index]
        return (hidden_BSD[:1, :1], *rest)

    def see(_: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        found.output = output

    if output_layer is None:
        yield found
        return
    handles = [output_layer.register_forward_pre_hook(keep), output_layer.register_forward_hook(see)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _ChunkedSum(torch.autograd.Function):
    """Sum of `loss_of(part, begin, end)` over parts of `hidden_ND`, whose gradient is made beside each part's loss: the
    logits of one part are there at a time, forward and backward, and nothing is computed twice (as in Liger Kernel's
    fused linear cross entropy, Hsu et al. 2024)."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, loss_of: Callable[..., torch.Tensor], size: int) -> torch.Tensor:
        grad_ND = torch.empty_like(hidden_ND)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for begin in range(0, hidden_ND.shape[0], size):
            end = min(begin + size, hidden_ND.shape[0])
            with torch.enable_grad():
                part = hidden_ND[begin:end].detach().requires_grad_()
                loss = loss_of(part, begin, end)
            (grad_ND[begin:end],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0].to(grad_ND.dtype), None, None


def chunked_sum(
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor | None,
    *,
    output_layer: nn.Module,
    cross_entropy: Callable[..., torch.Tensor],
    size: int,
) -> torch.Tensor:
    """`cross_entropy` of an output layer's logits, `size` positions at a time.

    Args:
        hidden_ND: hidden states in front of `output_layer`, which does not learn.
        targets_N: int64, the labels.
        weights_N: of the positions; None: all 1.
    """

    def loss_of(part_ND: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        logits_NC = output_layer(part_ND[None])[0]
        weights = () if weights_N is None else (weights_N[begin:end].to(logits_NC.device),)
        return cross_entropy(logits_NC, targets_N[begin:end].to(logits_NC.device), *weights)

    if hidden_ND.requires_grad and torch.is_grad_enabled():
        return _ChunkedSum.apply(hidden_ND, loss_of, size)  # pyright: ignore[reportReturnType]
    parts = range(0, hidden_ND.shape[0], size)
    return torch.stack([loss_of(hidden_ND[begin : begin + size], begin, begin + size) for begin in parts]).sum()
