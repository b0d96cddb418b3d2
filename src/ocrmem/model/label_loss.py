"""Cross entropy at the labelled positions only.

The logits of all positions are the largest tensor of a training step (a vocabulary of 151,936 times every position, in
float32), and only those that predict a label are needed. Hidden states are therefore gathered in front of the LLM's
own output layer, by a hook on it: whatever the LLM does to its logits afterwards (Gemma's soft cap, Granite's scale)
stays the LLM's business. Where it does nothing, the logits can also be made some positions at a time
(`model.chunked_loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IGNORE_INDEX = -100
"""Label of a position that has none, as everywhere in transformers."""


def labelled_positions(
    labels_BS: torch.Tensor, target_index_N: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sample, position), each int64 [N]: the positions whose next position has a label.

    Args:
        target_index_N: the same as sample × S + position, where they are known already: to count them makes the host
            wait for the GPU.
    """
    if target_index_N is not None:
        length = labels_BS.shape[1]
        return target_index_N // length, target_index_N % length
    samples_N, positions_N = (labels_BS[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return samples_N, positions_N


@contextmanager
def at_positions(output_layer: nn.Module | None, index: tuple[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """While open, `output_layer` sees hidden states [1, N, D] of the N positions in place of [B, S, D]."""

    def gather(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BSD, *rest = arguments
        return (hidden_BSD[index][None], *rest)

    if output_layer is None:
        yield
        return
    handle = output_layer.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def logits_at(
    logits: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], *, shape_BS: tuple[int, ...]
) -> torch.Tensor:
    """Logits [N, C] of the positions, for an LLM whose output layer was called as a module and for one without."""
    if tuple(logits.shape[:2]) == shape_BS and shape_BS != (1, index[0].shape[0]):
        return logits[index]
    return logits[0]


def cross_entropy_sum(
    logits_NC: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of the cross entropies, each times its weight, in nats and float32."""
    if weights_N is None:
        return F.cross_entropy(logits_NC.float(), targets_N, reduction="sum")
    return (F.cross_entropy(logits_NC.float(), targets_N, reduction="none") * weights_N).sum()


def label_loss(
    sum_of: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    labels_BS: torch.Tensor,
    index: tuple[torch.Tensor, torch.Tensor],
    num_items_in_batch: torch.Tensor | int | None,
    weights_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of the labels that follow the positions, in float32; 0 where nothing is labelled.

    Args:
        sum_of: sum of the cross entropies, from the labels int64 [N] and their weights [N] or None.
        num_items_in_batch: divisor of the sum; None: the number of positions.
        weights_N: the loss is instead the sum of the cross entropies times these.
    """
    samples_N, positions_N = index
    targets_N = labels_BS[samples_N, positions_N + 1]
    if weights_N is not None:
        return sum_of(targets_N, weights_N)
    total = sum_of(targets_N, None)
    if num_items_in_batch is None:
        num_items_in_batch = max(1, targets_N.shape[0])
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def target_loss(memory_PVD: torch.Tensor, targets_PVD: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cosine between memory tokens and their targets, over the targets that are not zero."""
    used_PV = targets_PVD.any(dim=-1)
    cosine_PV = F.cosine_similarity(memory_PVD.float(), targets_PVD.float(), dim=-1)
    return ((1 - cosine_PV) * used_PV).sum() / used_PV.sum().clamp(min=1)
