"""Leaves a model exactly as it was found: gradients, random state, modes, buffers, attributes, grad mode."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

_INTERNAL = frozenset({"training", "_parameters", "_buffers", "_modules"})


class RandomState:
    """State of every random generator that a forward may draw from."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002  (whoever uses the global state must get it back)
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Put every generator back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class Snapshot:
    """What of a model a forward and backward may change.

    Parameters are too large to copy; `before_write` copies one at the moment that an operation is about to
    write into it. Gradients are taken off the tensors and put back as the same objects.

    Args:
        model: the model.
        extra: further tensors whose gradients are kept, such as those of modules that the model does not
            register.
    """

    def __init__(self, model: nn.Module, *, extra: Iterable[torch.Tensor] = ()) -> None:
        self._model = model
        self.random = RandomState()
        self._grad_enabled = torch.is_grad_enabled()
        self._modes = [(module, module.training) for module in model.modules()]
        self._attributes = [
            (module, {key: value for key, value in vars(module).items() if key not in _INTERNAL})
            for module in model.modules()
            if not _keeps_own_books(module)
        ]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
        self._written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tensors = [*model.parameters(), *model.buffers(), *extra]
        self._requires_grad = [(tensor, tensor.requires_grad) for tensor in self._tensors]
        self._grads = [(tensor, tensor.grad) for tensor in self._tensors if tensor.is_leaf]

    def clear_grads(self) -> None:
        """Take all gradients off, so that those of the probe stand alone."""
        for tensor, _ in self._grads:
            tensor.grad = None

    def before_write(self, tensor: torch.Tensor) -> None:
        """Keep a copy of a parameter that is about to be written into; buffers were copied already."""
        if isinstance(tensor, nn.Parameter) and id(tensor) not in self._written:
            self._written[id(tensor)] = (tensor, tensor.detach().clone())

    def restore(self) -> None:
        """Put everything back, bit for bit."""
        torch.set_grad_enabled(self._grad_enabled)
        with torch.no_grad():
            for tensor, value in (*self._written.values(), *self._buffers):
                if not same_bits(tensor, value):
                    tensor.detach().copy_(value)
        for module, attributes in self._attributes:
            now = vars(module)
            for key in [key for key in now if key not in attributes and key not in _INTERNAL]:
                del now[key]
            for key, value in attributes.items():
                if now.get(key) is not value:
                    now[key] = value
        for module, mode in self._modes:
            module.training = mode
        for tensor, wanted in self._requires_grad:
            if tensor.requires_grad != wanted and tensor.is_leaf:
                tensor.requires_grad_(wanted)
        for tensor, grad in self._grads:
            tensor.grad = grad
        self.random.restore()


def _keeps_own_books(module: nn.Module) -> bool:
    """DDP and FSDP note in their attributes how far they are; going back would contradict their C++ side."""
    return any(base.__module__.startswith(("torch.nn.parallel", "torch.distributed")) for base in type(module).__mro__)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in every bit, NaN included."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = left.detach().contiguous(), right.detach().contiguous()
    if left.dim() == 0:
        left, right = left[None], right[None]
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@contextmanager
def undone_step(tensors: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo what a training step does to `tensors` and to the optimizer."""
    held = {id(tensor): tensor for tensor in tensors}
    held |= {id(tensor): tensor for group in optimizer.param_groups for tensor in group["params"]}
    values = [(tensor, tensor.detach().clone()) for tensor in held.values()]
    state: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in values:
                tensor.detach().copy_(value)
        optimizer.load_state_dict(state)
