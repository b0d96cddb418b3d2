"""Which tensors were computed from the trainable ones, and whether a gradient can still travel back.

Two questions are kept apart, because the breaks differ in them: a detached memory still reaches the loss as a
value (`Label` with live=False), a memory that was never spliced does not reach it at all (no `Label`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Label:
    """A tensor's descent from the trainable tensors."""

    live: bool
    """Its autograd graph leads back to them."""
    origin: int | None
    """Index of the event that cut it; None while live, and for tensors that descend from frozen
    parameters."""
    fixed: bool = False
    """Its graph, if it has one, is known to come from something else."""


class Lineage:
    """Labels of tensors, by tensor object and by storage.

    Storages are needed because `.data`, `nn.Parameter(x)`, in-place writes and custom autograd functions hand
    on values without an operation that could be watched. Weak references keep a freed storage's address from
    being taken for a new tensor's.
    """

    def __init__(self, seeds: Iterable[torch.Tensor]) -> None:
        self._seeds = {id(tensor): tensor for tensor in seeds}
        self._tensors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._storages: dict[int, tuple[StorageWeakRef, Label]] = {}

    def is_seed(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is one of the trainable tensors."""
        return id(tensor) in self._seeds

    def get(self, tensor: torch.Tensor) -> Label | None:
        """The label of `tensor`, or None where it does not descend from a trainable tensor."""
        if id(tensor) in self._seeds:
            return Label(live=tensor.requires_grad, origin=None)
        label: Label | None = self._tensors.get(tensor)
        if label is None:
            label = self._by_storage(tensor)
        if label is None or label.live or label.fixed:
            return label
        if tensor.requires_grad and not tensor.is_leaf:
            return Label(live=True, origin=None)  # a custom function gave it its graph after it was labelled
        return label

    def knows_object(self, tensor: torch.Tensor) -> bool:
        """Whether an operation labelled this very tensor, rather than one that shares its storage."""
        return id(tensor) in self._seeds or tensor in self._tensors

    def set(self, tensor: torch.Tensor, label: Label) -> None:
        """Label a tensor, its storage, and the tensor that it is a view of."""
        self._tensors[tensor] = label
        key = _storage_key(tensor)
        if key is not None:
            self._storages[key.cdata] = (key, label)
        base = tensor._base
        if base is not None and base is not tensor and id(base) not in self._seeds:
            self._tensors[base] = Label(label.live and base.requires_grad, label.origin, label.fixed)

    def _by_storage(self, tensor: torch.Tensor) -> Label | None:
        key = _storage_key(tensor)
        if key is None:
            return None
        found = self._storages.get(key.cdata)
        if found is None:
            return None
        if not found[1].live:
            return found[1]
        return Label(live=tensor.requires_grad and not tensor.is_leaf, origin=None)


def _storage_key(tensor: torch.Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse and some wrapper tensors have no storage
        return None


def storage_address(tensor: torch.Tensor) -> int | None:
    """Address of the storage object, or None where the tensor has none."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
