"""What is known about single torch operations, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ocrmem.gradflow.report import EventKind

_PROPERTIES_WITH_VALUES = ("data", "T", "mT", "H", "mH", "real", "imag")

METADATA = frozenset(f"{name}.__get__" for name in dir(torch.Tensor) if name not in _PROPERTIES_WITH_VALUES) | {
    *("size", "dim", "numel", "stride", "is_contiguous", "element_size", "data_ptr", "storage_offset"),
    *("is_floating_point", "is_complex", "is_signed", "get_device", "ndimension", "nelement", "type", "is_same_size"),
    *("is_inference", "_is_view", "is_nonzero", "equal", "untyped_storage", "register_hook", "retain_grad"),
    *("__len__", "__hash__", "__repr__", "__format__", "__bool__"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full"),
}
"""Operations whose result holds no value of their argument, only its shape, type or truth."""

LEAVES_TORCH: dict[str, EventKind] = {
    "numpy": "left-torch",
    "__array__": "left-torch",
    "tolist": "left-torch",
    "item": "left-torch",
    "__float__": "left-torch",
    "__int__": "left-torch",
    "__index__": "left-torch",
    "__dlpack__": "left-torch",
}
"""Operations after which the value lives outside torch."""

FLAT = frozenset(
    {
        "round",
        "round_",
        "floor",
        "floor_",
        "ceil",
        "ceil_",
        "trunc",
        "trunc_",
        "fix",
        "sign",
        "sgn",
        "heaviside",
    }
)
"""Operations that have a derivative, and it is zero."""

_IN_PLACE_DUNDERS = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"})
_NOT_WRITES = frozenset({"requires_grad_", "retain_grad", "share_memory_", "detach_"})


@dataclass(frozen=True)
class MaskedSplice:
    """A source put in where a mask is True."""

    source: torch.Tensor
    slots: int
    """True positions, broadcast over the target."""


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def write_target(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The tensor that an in-place operation writes into."""
    out = kwargs.get("out")
    if isinstance(out, torch.Tensor):
        return out
    in_place = name in _IN_PLACE_DUNDERS or (name.endswith("_") and not name.endswith("__"))
    if in_place and name not in _NOT_WRITES and args and isinstance(args[0], torch.Tensor):
        return args[0]
    return None


def kind_of_cut(name: str, output: torch.Tensor) -> EventKind:
    """Why the output of an operation on a live tensor has no gradient."""
    if name in ("detach", "detach_"):
        return "detach"
    if name == "data.__get__":
        return "data"
    if name in ("tensor", "as_tensor", "new_tensor", "asarray"):
        return "copy"
    if not (output.is_floating_point() or output.is_complex()):
        return "integer"
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return "grad-off"
    return "no-derivative"


def is_zero_number(value: Any) -> bool:
    """A plain 0 or 0.0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0


def masked_splice(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MaskedSplice | None:
    """The source and slot count of `masked_scatter`, `where`, `masked_fill` and `x[mask] = source`."""
    if name in ("masked_scatter", "masked_scatter_"):
        parts = [*args, *(kwargs[key] for key in ("mask", "source") if key in kwargs)]
        if len(parts) == 3 and all(isinstance(part, torch.Tensor) for part in parts):
            target, mask, source = parts
            return MaskedSplice(source, _count(mask.expand_as(target)) if _fits(mask, target) else _count(mask))
    if name == "where" and len(args) == 3 and isinstance(args[0], torch.Tensor):
        source = args[1]
        if isinstance(source, torch.Tensor):
            return MaskedSplice(source, _count(args[0]))
    if name == "__setitem__" and all(isinstance(arg, torch.Tensor) for arg in args):
        target, mask, source = args
        if mask.dtype == torch.bool:
            return MaskedSplice(source, _count(mask) * target.shape[mask.dim() :].numel())
    return None


def _count(mask: torch.Tensor) -> int:
    return int(mask.sum())


def _fits(mask: torch.Tensor, target: torch.Tensor) -> bool:
    try:
        return torch.broadcast_shapes(mask.shape, target.shape) == target.shape
    except RuntimeError:
        return False
