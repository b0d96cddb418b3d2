"""The forward again: with the memory tokens permuted, and, where all gradients were zero, with a scaled
loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ocrmem.gradflow.operations import tensors_in
from ocrmem.gradflow.recorder import Recorder
from ocrmem.gradflow.target import Target

Run = Callable[[], tuple[Any, torch.Tensor]]
"""Runs the forward from the same random state; returns the outputs and the loss."""

UNDERFLOW_SCALE = 2.0**24
"""float16 loses what is below 2^-24; a loss scaled by as much brings back what was lost from ordinary
sizes."""


@dataclass
class SecondPass:
    """What the disturbed forward showed; None where it was not made."""

    loss_change: float | None = None
    value_change: float | None = None
    calls: int | None = None
    permuted: bool = True
    changed_positions_BS: torch.Tensor | None = None
    sample_moved: int | None = None
    sample_expected: int | None = None


def disturb(
    run: Run, target: Target, recorder: Recorder, loss: torch.Tensor, memory_samples: Sequence[int] | None
) -> SecondPass:
    """Permute the trainable modules' output tokens and see what changes.

    With grad mode as in the first pass, so that the model takes the same branches; there is no backward.
    """
    memory = [output for path, output in recorder.log.memory if path in target.roots and output.dim() >= 2]
    if not target.roots or not memory:
        return SecondPass()
    permuted = any(not torch.equal(_permute(output), output) for output in memory)
    host = recorder.log.host
    try:
        with _disturbed(target, _permute if permuted else torch.neg) as seen:
            _, other = run()
        change = float((other.detach() - loss.detach()).float())
        result = SecondPass(loss_change=change, calls=seen.calls, permuted=permuted)
        if change == 0:
            with _disturbed(target, lambda tokens: tokens * 1.5 + 0.1):
                result.value_change = float((run()[1].detach() - loss.detach()).float())
        if host is not None and seen.embeds is not None and seen.embeds.shape == host.embeds_BSD.shape:
            result.changed_positions_BS = (seen.embeds != host.embeds_BSD).any(dim=-1)
        if memory_samples is not None and len(memory_samples) and memory[0].dim() > 2:
            result.sample_expected = memory_samples[0]
            result.sample_moved = _sample_moved(run, target)
        return result
    except RuntimeError:
        # A graph that cannot run twice is reported by what the second pass could not show.
        return SecondPass()


def underflow_scale(
    run: Run, target: Target, grads: dict[str, torch.Tensor | None], recorder: Recorder
) -> float | None:
    """The scale if gradients that were all zero, with float16 on the way, are not with the loss scaled up."""
    if any(grad is None or bool(grad.any()) for grad in grads.values()) or not grads:
        return None
    if not any(call.dtype == "float16" for call in recorder.log.calls()):
        return None
    _, loss = run()
    try:
        scaled = torch.autograd.grad(loss.float() * UNDERFLOW_SCALE, list(target.tensors.values()), allow_unused=True)
    except RuntimeError:
        return None
    return UNDERFLOW_SCALE if any(grad is not None and bool(grad.any()) for grad in scaled) else None


@dataclass
class _Seen:
    calls: int = 0
    embeds: torch.Tensor | None = None


def _permute(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.roll(1, dims=-2)


def _first_row(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([-tokens[:1], tokens[1:]])


@contextmanager
def _disturbed(target: Target, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[_Seen]:
    """Change the first tensor of every trainable module's output, unless it is no tokens, as a loss of its own is not,
    and note the last `inputs_embeds` passed."""
    seen = _Seen()
    roots = set(target.roots.values())

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if isinstance(kwargs.get("inputs_embeds"), torch.Tensor):
            seen.embeds = kwargs["inputs_embeds"].detach().clone()
        if module not in roots:
            return None
        seen.calls += 1
        first = next(tensors_in(output), None)
        if first is None or first.dim() < 2:
            return None
        if isinstance(output, torch.Tensor):
            return change(output)
        if type(output) is tuple:
            return tuple(change(item) if item is first else item for item in output)
        return None

    handle = torch.nn.modules.module.register_module_forward_hook(after, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _sample_moved(run: Run, target: Target) -> int | None:
    """The sample whose logits alone change with the first memory row; -1 for several or none."""
    plain = _logits(run()[0])
    with _disturbed(target, _first_row):
        other = _logits(run()[0])
    if plain is None or other is None or plain.shape != other.shape:
        return None
    moved = (plain != other).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return moved[0] if len(moved) == 1 else -1


def _logits(outputs: Any) -> torch.Tensor | None:
    logits = getattr(outputs, "logits", None)
    return logits.detach() if isinstance(logits, torch.Tensor) else None
