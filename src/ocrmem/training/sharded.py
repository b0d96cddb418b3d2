"""The projection's weights and its optimizer's state, whole, however the processes of a run hold them.

Under DDP every process has all of them. FSDP2 leaves each process a slice of every tensor (a `DTensor`), DeepSpeed's
ZeRO a slice of the optimizer's state and of the gradients, and at stage 3 of the weights too. Only the projection
learns, so that both are small enough to be gathered; a checkpoint then looks the same whoever wrote it, and goes on
under another number of processes or another way of sharing. Every function is called by all processes together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ocrmem.errors import CheckpointError
from ocrmem.gradflow.measure import inner_optimizer


def full_weights(proj: nn.Module) -> dict[str, torch.Tensor]:
    """The projection's state, whole, on the CPU."""
    state = {name: _whole(tensor) for name, tensor in proj.state_dict().items()}
    if any(_is_zero3(parameter) for parameter in proj.parameters()):
        state |= {name: _zero3_weight(parameter) for name, parameter in proj.named_parameters()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_weights(proj: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put whole weights, checked before, where each process holds its share of them."""
    parameters = dict(proj.named_parameters())
    kept = {name: buffer for name, buffer in proj.named_buffers() if name in weights}  # some are no part of an adapter
    with torch.no_grad():
        for name, tensor in {**parameters, **kept}.items():
            value = weights[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements))
            elif _is_zero3(tensor):
                import deepspeed  # pyright: ignore[reportMissingImports]

                with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                    tensor.copy_(value)
            else:
                tensor.copy_(value)
    _set_master_weights(parameters, weights)


def full_optimizer_state(optimizer: Any, proj: nn.Module) -> dict[str, Any]:
    """The optimizer's state as `torch.optim.Optimizer.state_dict` gives it in one process."""
    inner = _innermost(optimizer)
    if _zero(optimizer) is None:
        state = inner.state_dict()
        state["state"] = {
            index: {key: _whole(value) for key, value in values.items()} for index, values in state["state"].items()
        }
        return state
    from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

    keys = _moments(inner)
    if keys:
        _link_zero_state(_zero(optimizer))
    groups, state, index = [], {}, 0
    for group in optimizer_groups(optimizer, proj):
        indices = []
        for parameter in group["params"]:
            moments: dict[str, Any] = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            if moments and all(value is not None for value in moments.values()):
                state[index] = {key: value.detach().cpu() for key, value in moments.items()}
                state[index]["step"] = torch.tensor(_zero_step(inner))
            indices.append(index)
            index += 1
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": indices})
    return {"state": state, "param_groups": groups}


def load_optimizer_state(optimizer: Any, proj: nn.Module, state: dict[str, Any]) -> None:
    """Put a whole state where each process holds its share of it.

    Raises:
        CheckpointError: it is the state of other tensors.
    """
    inner = _innermost(optimizer)
    groups = optimizer_groups(optimizer, proj)
    sizes, given = [len(group["params"]) for group in groups], [len(group["params"]) for group in state["param_groups"]]
    if sizes != given:
        raise CheckpointError(
            f"the checkpoint's optimizer has groups of {given} tensors, this run's {sizes}: it comes from another "
            "optimizer or projection. Set training.optim and optimizer back, or give another output_dir."
        )
    parameters = [parameter for group in groups for parameter in group["params"]]
    if _zero(optimizer) is not None:
        from deepspeed.utils import safe_set_full_optimizer_state  # pyright: ignore[reportMissingImports]

        _make_zero_state(_zero(optimizer), inner, state["state"])
        for index, values in state["state"].items():
            for key in values.keys() - {"step"}:
                safe_set_full_optimizer_state(parameters[index], values[key].to(_device(parameters[index])), key)
            _set_zero_step(inner, float(values.get("step", 0)))
        for group, saved in zip(inner.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        return
    shares = {
        index: {key: _share(value, parameters[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    inner.load_state_dict({**state, "state": shares})


def optimizer_groups(optimizer: Any, proj: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's groups with the model's own parameters; ZeRO keeps them beside its flat ones."""
    inner = _innermost(optimizer)
    if _zero(optimizer) is None:
        return inner.param_groups
    zero = _zero(optimizer)
    own = getattr(zero, "bit16_groups", None) or getattr(zero, "fp16_groups", None) or []
    flat = [parameter for group in own for parameter in group]
    # Stage 3 cuts a group into sub-groups of its own; the projection's order is then the order.
    if len(own) != len(inner.param_groups):
        own = [flat]
    return [
        {**{key: value for key, value in group.items() if key != "params"}, "params": list(parameters)}
        for group, parameters in zip(inner.param_groups, own, strict=True)
    ]


def asked_for_deepspeed() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def asked_for_fsdp() -> bool:
    """Whether the launcher was told to shard with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _share(value: Any, parameter: torch.Tensor) -> Any:
    """What this process holds of a value that belongs to a parameter; scalars such as the step stay whole."""
    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _innermost(optimizer: Any) -> Any:
    while isinstance(inner := vars(optimizer).get("optimizer"), object) and inner is not None:
        optimizer = inner
    return optimizer


def _is_zero3(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def _device(parameter: torch.Tensor) -> torch.device:
    return parameter.device


def _zero3_weight(parameter: torch.Tensor) -> torch.Tensor:
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _set_master_weights(parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """DeepSpeed's optimizers step float32 copies of the weights that learn, and copy them back."""
    learning = {name: p for name, p in parameters.items() if p.requires_grad}
    held = {name: p for name, p in learning.items() if _is_zero3(p) or hasattr(p, "_hp_mapping")}
    if held:
        from deepspeed.utils import safe_set_full_fp32_param  # pyright: ignore[reportMissingImports]

        for name, parameter in held.items():
            safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))


def _zero(optimizer: Any) -> Any:
    """ZeRO's own optimizer inside accelerate's wrapper; None where there is none."""
    return inner_optimizer(optimizer, "deepspeed.runtime.zero")


def _link_zero_state(zero: Any) -> None:
    """Stages 1 and 2 tell each parameter which slice of the flat state is its own, once there is a state."""
    if not hasattr(zero, "single_partition_of_fp32_groups"):  # stage 3 looks the state up itself
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state  # pyright: ignore[reportMissingImports]

    for parameters, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, partition, zero.optimizer.state)


def _make_zero_state(zero: Any, inner: Any, state: Mapping[int, Mapping[str, Any]]) -> None:
    """An optimizer that has not stepped yet has no state; make it, as its first step would."""
    flat = getattr(zero, "single_partition_of_fp32_groups", None) or getattr(zero, "fp32_partitioned_groups_flat", [])
    first = next(iter(state.values()), {})
    for partition in flat:
        for key, value in first.items():
            if key not in inner.state[partition]:
                empty = torch.zeros_like(value) if key == "step" else torch.zeros_like(partition)
                inner.state[partition][key] = empty.detach()
    if first:
        _link_zero_state(zero)


def _moments(inner: Any) -> list[str]:
    """Names of what an optimizer keeps of every weight besides its step: Adam's `exp_avg` and `exp_avg_sq`."""
    return sorted(
        {
            key
            for state in inner.state.values()
            for key, value in state.items()
            if torch.is_tensor(value) and value.numel() > 1
        }
    )


def _zero_step(inner: Any) -> float:
    steps = [float(state["step"]) for state in inner.state.values() if "step" in state]
    return max(steps, default=float(max((group.get("step", 0) for group in inner.param_groups), default=0)))


def _set_zero_step(inner: Any, step: float) -> None:
    for state in inner.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else int(step)
    for group in inner.param_groups:
        if "step" in group:
            group["step"] = int(step)
