"""From what was recorded to the facts of the report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ocrmem.gradflow.calls import HostCall
from ocrmem.gradflow.recorder import Recorder
from ocrmem.gradflow.report import (
    GradState,
    HostFacts,
    LabelFacts,
    MemoryFacts,
    OptimizerFacts,
    TensorGrad,
)
from ocrmem.gradflow.second_pass import SecondPass
from ocrmem.gradflow.target import Target

IGNORED = -100
"""Label of a position without one, as everywhere in transformers."""


def leaves_of(loss: torch.Tensor) -> set[int]:
    """ids of the tensors that the loss's autograd graph leads to."""
    found: set[int] = set()
    if loss.is_leaf and loss.requires_grad:
        return {id(loss)}
    waiting = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, torch.Tensor):
            found.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def grad_state(grad: torch.Tensor | None) -> GradState:
    """Kind of a gradient."""
    if grad is None:
        return "none"
    grad = _local(grad)
    if not bool(torch.isfinite(grad).all()):
        return "non-finite"
    return "finite" if bool(grad.any()) else "zero"


def tensor_grads(
    target: Target,
    grads: Mapping[str, torch.Tensor | None],
    in_graph: set[int] | None,
    optimizer: torch.optim.Optimizer | None,
) -> tuple[TensorGrad, ...]:
    """Facts of every trainable tensor."""
    found = []
    for name, tensor in target.tensors.items():
        grad = grads[name]
        local = None if grad is None else _local(grad).float()
        found.append(
            TensorGrad(
                name=name,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                requires_grad=tensor.requires_grad,
                in_graph=None if in_graph is None else id(tensor) in in_graph,
                state=grad_state(grad),
                norm=None if local is None else float(local.norm()),
                zero_fraction=None if local is None else float((local == 0).float().mean()),
                all_zero_values=not bool(_local(tensor.detach()).any()),
                kept_by_step=None if optimizer is None else _kept_by_step(tensor, grad, optimizer),
            )
        )
    return tuple(found)


def _kept_by_step(tensor: torch.Tensor, grad: torch.Tensor | None, optimizer: torch.optim.Optimizer) -> float | None:
    """Share of a 16-bit weight's values that one step leaves as they are.

    Adam's first step is the learning rate in size; a value stays if that is below half the distance to its
    neighbour, |w|·eps/2. Optimizers from elsewhere may keep float32 copies, so nothing is said of them.
    """
    inner = plain_optimizer(optimizer)
    if tensor.dtype not in (torch.bfloat16, torch.float16) or not type(inner).__module__.startswith("torch.optim"):
        return None
    if grad is None:
        return None
    rate = _learning_rate(inner)
    size = torch.full_like(tensor, rate, dtype=torch.float32)
    if "adam" not in type(inner).__name__.lower():
        size = rate * _local(grad).float().abs()
    half_gap = _local(tensor.detach()).float().abs() * torch.finfo(tensor.dtype).eps / 2
    return float((size < half_gap).float().mean())


def plain_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    inner = vars(optimizer).get("optimizer")
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def inner_optimizer(optimizer: Any, package: str) -> Any:
    """The optimizer whose class comes from `package`, or None: the given one, or one inside its wrappers."""
    while optimizer is not None and not f"{type(optimizer).__module__}.".startswith(f"{package}."):
        optimizer = vars(optimizer).get("optimizer")
    return optimizer


def is_deepspeed(optimizer: Any) -> bool:
    """Whether an optimizer is one of DeepSpeed's, inside accelerate's wrapper or not."""
    return inner_optimizer(optimizer, "deepspeed") is not None


def held_by_zero(tensor: torch.Tensor) -> bool:
    """Whether one of DeepSpeed's ZeRO optimizers steps a parameter: stages 1 and 2 map it to the flat float32
    weights (to None on the processes that hold no share of it), stage 3 names the optimizer itself."""
    return hasattr(tensor, "_hp_mapping") or hasattr(tensor, "_z3_optimizer")


def _learning_rate(optimizer: torch.optim.Optimizer) -> float:
    # During warm-up the rate of the first step is 0; the schedule's own rate is kept beside it.
    return max(float(max(group["lr"], group.get("initial_lr", 0.0))) for group in optimizer.param_groups)


def memory_outputs(target: Target, recorder: Recorder) -> list[torch.Tensor]:
    """What the target's modules returned, in order."""
    return [output for path, output in recorder.log.memory if path in target.roots]


def memory_facts(target: Target, recorder: Recorder, again: SecondPass) -> MemoryFacts | None:
    """Facts of the trainable modules' outputs; None where the whole model is trainable."""
    if not target.roots:
        return None
    outputs = memory_outputs(target, recorder)
    tokens = [output for output in outputs if output.dim()]  # and no loss
    rms = embedding_rms = None
    if tokens and tokens[0].numel() and not tokens[0].is_meta:
        rms = float(tokens[0].float().square().mean().sqrt())
        square_mean = recorder.log.embedding_square_means.get(tokens[0].shape[-1])
        embedding_rms = None if square_mean is None else float(square_mean.sqrt())
    return MemoryFacts(
        module=", ".join(target.roots),
        calls=len(outputs),
        calls_again=again.calls,
        num_tokens=sum(output.shape[:-1].numel() for output in tokens),
        rms=rms,
        embedding_rms=embedding_rms,
        loss_change=again.loss_change,
        value_change=again.value_change,
        permuted=again.permuted,
        sample_moved=again.sample_moved,
        sample_expected=again.sample_expected,
    )


def host_facts(host: HostCall | None, changed_BS: torch.Tensor | None, batch: Any) -> HostFacts | None:
    """Facts of the call that took `inputs_embeds`."""
    if host is None:
        return None
    length = host.embeds_BSD.shape[1]
    mask = host.attention_mask
    plain_mask = mask is not None and mask.dim() == 2
    comparable = host.pads_masks and not host.has_cache
    masked = 0
    if plain_mask and changed_BS is not None and mask is not None and mask.shape == changed_BS.shape:
        masked = int((changed_BS & (mask == 0)).sum())
    positions = host.position_ids
    restarting = (
        mask is None
        and positions is not None
        and positions.dim() == 2
        and bool((positions[:, 1:] <= positions[:, :-1]).any())
    )
    return HostFacts(
        path=host.path,
        length=length,
        memory_positions=None if changed_BS is None else int(changed_BS.sum()),
        masked_memory_positions=masked,
        mask_length=int(mask.shape[1]) if plain_mask and mask is not None and comparable else None,
        restarting_positions=restarting,
        labels_after_memory=_labels_after(changed_BS, host.labels, batch),
    )


def _labels_after(changed_BS: torch.Tensor | None, labels: torch.Tensor | None, batch: Any) -> int | None:
    """Labelled positions right of a sample's first memory token; its label is predicted one position
    earlier."""
    if labels is None and isinstance(batch, Mapping):
        labels = batch.get("labels")
    if changed_BS is None or not isinstance(labels, torch.Tensor) or labels.shape != changed_BS.shape:
        return None
    seen_BS = changed_BS.int().cumsum(dim=1) > 0
    return int(((labels[:, 1:] != IGNORED) & seen_BS[:, :-1]).sum())


def label_facts(batch: Any, recorder: Recorder) -> LabelFacts | None:
    """Facts of the labels in the batch and of those in the loss."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
        if recorder.targets_in_loss is None:
            return None
        count = recorder.targets_in_loss
        return LabelFacts(given=count, after_shift=count, in_loss=count, pre_shifted=False)
    return LabelFacts(
        given=int((labels != IGNORED).sum()),
        after_shift=int((labels[:, 1:] != IGNORED).sum()),
        in_loss=recorder.targets_in_loss,
        pre_shifted=_pre_shifted(labels, batch.get("input_ids"), recorder),
    )


def _pre_shifted(labels: torch.Tensor, input_ids: Any, recorder: Recorder) -> bool:
    """Labels name the next token already, and the targets in the loss are shifted against them once more."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.shape != labels.shape or labels.shape[1] < 3:
        return False
    labelled = labels[:, :-1] != IGNORED
    next_ids, same_ids = input_ids[:, 1:][labelled], input_ids[:, :-1][labelled]
    named = labels[:, :-1][labelled]
    if not len(named) or not torch.equal(named, next_ids) or torch.equal(named, same_ids):
        return False
    samples, length = labels.shape
    for logits, target in recorder.loss_inputs:
        if target.numel() % samples or logits.dim() != 2:
            continue
        target_BS = target.reshape(samples, -1)
        # Text comes last where memory was put in front; a loss that slices instead of padding has one column
        # less.
        columns = target_BS.shape[1]
        tail = target_BS[:, columns - length :] if columns >= length else target_BS
        if torch.equal(tail[:, : length - 1], labels[:, 1:]) and not torch.equal(tail, labels):
            return True
    return False


def optimizer_facts(model: nn.Module, target: Target, optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    """Which tensors the optimizer holds."""
    inner = plain_optimizer(optimizer)
    held = {id(tensor): tensor for group in inner.param_groups for tensor in group["params"]}
    of_model = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    of_target = {id(tensor) for tensor in target.tensors.values()}
    missing = {name: tensor for name, tensor in target.tensors.items() if id(tensor) not in held}
    foreign = [tensor for key, tensor in held.items() if key not in of_model and key not in of_target]
    alike = [t for t in foreign if any(t.shape == m.shape for m in missing.values())]
    return OptimizerFacts(
        kind=type(inner).__name__,
        num_tensors=len(held),
        missing=tuple(missing),
        frozen=tuple(of_model[key] for key, t in held.items() if key in of_model and not t.requires_grad),
        foreign=len(foreign),
        foreign_same_values=sum(
            any(t.shape == m.shape and t.device == m.device and torch.equal(t, m) for m in missing.values())
            for t in alike
        ),
        foreign_same_shape=len(alike),
        learning_rate=_learning_rate(inner),
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a sharded tensor."""
    sharding: Any = sys.modules.get("torch.distributed.tensor")  # not imported: nothing is sharded
    if sharding is None or not isinstance(tensor, sharding.DTensor):
        return tensor
    return sharding.DTensor.to_local(tensor)
