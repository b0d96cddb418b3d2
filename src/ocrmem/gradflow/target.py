"""What is meant by "the trainable part", and how a batch goes into a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ocrmem.errors import ProbeError
from ocrmem.gradflow.operations import tensors_in

Trainable = nn.Module | str | Iterable[nn.Module | str | nn.Parameter]
"""A module, its name in the model, or several modules, names and parameters."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The tensors that should learn, by name, and the modules whose outputs descend from them."""

    tensors: dict[str, torch.Tensor]
    roots: dict[str, nn.Module]
    """Biggest modules all of whose tensors should learn; empty if that is the model itself."""
    named: bool
    """The caller named them."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP1 and `torch.compile` wrappers."""
    while True:
        inner = model._modules.get("_orig_mod") or model._modules.get("_fsdp_wrapped_module")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def resolve_target(model: nn.Module, trainable: Trainable | None) -> Target:
    """The tensors that should learn.

    Args:
        model: the model, unwrapped.
        trainable: what the caller named; None: every parameter that requires grad.

    Raises:
        ProbeError: a name is not in the model, a named module has no parameters, or the model has none at
            all.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if trainable is None:
        if not names:
            raise ProbeError(
                f"{type(model).__name__} has no parameters at all, so nothing in it can learn. Pass the "
                "model that "
                "is trained; modules kept in a plain list are not part of a model, nn.ModuleList keeps them."
            )
        tensors: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return Target(tensors=tensors, roots=_roots(model, tensors.values()), named=False)
    items: list[nn.Module | str | nn.Parameter] = (
        [trainable] if isinstance(trainable, (nn.Module, str)) else list(trainable)
    )
    tensors, roots = {}, {}
    for item in items:
        if isinstance(item, nn.Parameter):
            tensors[names.get(id(item), f"<parameter {tuple(item.shape)}>")] = item
            continue
        path, module = _module(model, item)
        found = [(f"{path}.{name}".lstrip("."), parameter) for name, parameter in module.named_parameters()]
        if not found:
            raise ProbeError(f"trainable={path!r} has no parameters; name the module whose weights should learn.")
        # A wrapper such as peft's keeps frozen originals beside what learns.
        learning = [(name, parameter) for name, parameter in found if parameter.requires_grad]
        tensors |= {names.get(id(p), name): p for name, p in learning or found}
        roots[path] = module
    return Target(tensors=tensors, roots=roots or _roots(model, tensors.values()), named=True)


def _module(model: nn.Module, item: nn.Module | str) -> tuple[str, nn.Module]:
    paths = dict(model.named_modules())
    if isinstance(item, nn.Module):
        path = next((name for name, module in paths.items() if module is item), None)
        return (f"<{type(item).__name__}>" if path is None else path), item
    if item in paths:
        return item, paths[item]
    ends = [name for name in paths if name.endswith(f".{item}")]
    if ends:
        best = min(ends, key=lambda name: name.count("."))
        return best, paths[best]
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    raise ProbeError(
        f"trainable={item!r} is not a module of {type(model).__name__}; its children are: {children}. Give "
        "one of "
        "these, or a longer path as model.named_modules() prints it."
    )


def _roots(model: nn.Module, tensors: Iterable[torch.Tensor]) -> dict[str, nn.Module]:
    wanted = {id(tensor) for tensor in tensors}
    roots: dict[str, nn.Module] = {}

    def visit(path: str, module: nn.Module) -> None:
        inside = [id(parameter) for parameter in module.parameters()]
        if not inside or not wanted.intersection(inside):
            return
        if path and wanted.issuperset(inside):
            roots[path] = module
            return
        for name, child in module.named_children():
            visit(f"{path}.{name}".lstrip("."), child)

    if not wanted.issuperset(id(parameter) for parameter in model.parameters()):
        for name, child in model.named_children():
            visit(name, child)
    return roots


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call the model: a mapping as keywords, a tuple or list as positions, anything else as the one
    argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return model(*batch)
    return model(batch)


def loss_of(outputs: Any, *, model: nn.Module) -> torch.Tensor:
    """The scalar loss in a model's output.

    Raises:
        ProbeError: there is none, or it is not a scalar.
    """
    loss: Any = outputs
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    elif isinstance(outputs, (tuple, list)) and outputs:
        loss = outputs[0]
    elif not isinstance(outputs, torch.Tensor):
        loss = getattr(outputs, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise ProbeError(
            f"{type(model).__name__} returned {type(outputs).__name__} without a loss. Put labels into the "
            "batch, or "
            "pass loss_fn=lambda outputs, batch: ... that returns a scalar tensor."
        )
    return scalar(loss)


def scalar(loss: Any) -> torch.Tensor:
    """`loss` as it is, if it is a scalar tensor."""
    if not isinstance(loss, torch.Tensor):
        raise ProbeError(
            f"loss_fn returned {type(loss).__name__}; return a scalar tensor (not loss.item(), which ends the graph)."
        )
    if loss.numel() != 1:
        raise ProbeError(
            f"the loss has shape {tuple(loss.shape)}; backward needs a scalar. Reduce it, for example with .mean()."
        )
    return loss.reshape(())


def check_devices(model: nn.Module, batch: Any) -> None:
    """Raise if a tensor of the batch lies on a device where no parameter of the model does."""
    wanted = {parameter.device for parameter in model.parameters()} or {torch.device("cpu")}
    named = batch.items() if isinstance(batch, Mapping) else [("batch", batch)]
    for name, value in named:
        for tensor in tensors_in(value):
            if tensor.device not in wanted:
                shown = ", ".join(sorted(str(device) for device in wanted))
                raise ProbeError(
                    f"{name} of the batch is on {tensor.device}, the model on {shown}. Move the batch first: "
                    f"batch.to({next(iter(sorted(map(str, wanted))))!r})."
                )
