"""`verify_gradient_flow`: one forward and backward, watched, and nothing left behind."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ocrmem.errors import ProbeError
from ocrmem.gradflow import measure, second_pass
from ocrmem.gradflow.explain import find_error_cause
from ocrmem.gradflow.ranks import CollectivesDiffer, Ranks, would_hang
from ocrmem.gradflow.recorder import Recorder
from ocrmem.gradflow.report import ErrorFacts, GradientReport, ParallelFacts, Phase, RankFacts, StepFacts
from ocrmem.gradflow.restore import Snapshot, undone_step
from ocrmem.gradflow.source import error_place
from ocrmem.gradflow.target import (
    Target,
    Trainable,
    check_devices,
    loss_of,
    resolve_target,
    run_model,
    scalar,
    unwrap,
)

LossFunction = Callable[[Any, Any], torch.Tensor]
"""`loss_fn(outputs, batch)`; returns a scalar."""


@dataclass
class _Pass:
    """What one watched forward and backward gave."""

    loss: torch.Tensor | None = None
    error: Exception | None = None
    phase: Phase = "forward"
    backward_ran: bool = False
    backward_skipped: bool = False
    places: tuple[str, ...] | None = None
    mine: RankFacts | None = None
    in_graph: set[int] = field(default_factory=set)
    loss_requires_grad: bool = False
    grad_mode_leaks: bool = False


def verify_gradient_flow(
    model: nn.Module,
    batch: Any,
    trainable: Trainable | None = None,
    loss_fn: LossFunction | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    step: Callable[[], object] | None = None,
    memory_samples: Sequence[int] | None = None,
    dropped_columns: Sequence[str] = (),
) -> GradientReport:
    """Run one forward and backward and report what became of the gradient.

    The model is used in the mode in which it is, with the grad mode that is on. Afterwards gradients, random state,
    modes, buffers, parameters, attributes and grad mode are as before. A second forward, with the trainable module's
    output tokens permuted, shows whether the loss depends on them.

    Args:
        model: any module.
        batch: a mapping is passed as keywords, a tuple or list as positions, anything else as the one argument.
        trainable: the module that should learn, or its name ("proj"); also several of them, or parameters. None:
            every parameter that requires grad. Naming it tells a part frozen by mistake from one frozen on purpose.
        loss_fn: takes the model's output and the batch, returns a scalar. None: the output's `loss`, its first
            element, or the output itself.
        optimizer: checked to hold every trainable tensor.
        step: your own training step, from zero_grad to optimizer.step; run once more with the optimizer watched,
            and undone. Needs `optimizer`.
        memory_samples: for each row of the trainable module's output the sample of the batch to which it belongs;
            checks that the model pairs them so. Needs an output with `logits`.
        dropped_columns: keys that the data had and the batch has not, for the explanation.

    Returns:
        The report; `explain` names the cause.

    Raises:
        ProbeError: the check could not be run: the forward raised something that has nothing to do with gradients,
            a tensor is on the wrong device, there is no scalar loss, or nothing of this model can be trainable.
    """
    if not isinstance(model, nn.Module):
        raise ProbeError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    if step is not None and optimizer is None:
        raise ProbeError(
            "step was given without optimizer; pass both, so that its step can be watched and undone."
        )
    inner = unwrap(model)
    target = resolve_target(inner, trainable)
    snapshot = Snapshot(model, extra=target.tensors.values())
    ranks = Ranks(model)
    grad_enabled, inference_mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    recorder = Recorder(
        inner,
        seeds=target.tensors.values(),
        roots=target.roots.values(),
        before_write=snapshot.before_write,
    )
    try:
        with _eagerly():
            first = _first_pass(model, batch, loss_fn, target, recorder, snapshot, ranks)
            grads = {name: tensor.grad for name, tensor in target.tensors.items()}
            frozen_with_grad = _frozen_with_grad(inner, target)
            torch.set_grad_enabled(grad_enabled)
            if not target.named:
                target = _first_called(target, recorder)
            parallel = ranks.facts(mine=first.mine, skipped=first.backward_skipped, places=first.places)
            again = second_pass.SecondPass()
            underflow = None
            if first.loss is not None and first.phase == "backward" and not first.backward_skipped:
                run = _runner(inner if ranks.wrapper == "DDP" else model, batch, loss_fn, snapshot)
                if ranks.wrapper not in ("FSDP1", "FSDP2"):
                    again = second_pass.disturb(run, target, recorder, first.loss, memory_samples)
                if not ranks.active and first.backward_ran:
                    underflow = second_pass.underflow_scale(run, target, grads, recorder)
            step_facts = (
                _run_step(step, optimizer, target) if step is not None and optimizer is not None else None
            )
        return _report(
            model, batch, target, recorder, first, again, grads, frozen_with_grad, parallel, optimizer, step_facts,
            underflow, grad_enabled, inference_mode, tuple(dropped_columns),
        )  # fmt: skip
    finally:
        snapshot.restore()
        ranks.close()


def report_of_error(error: Exception, *, phase: Phase) -> GradientReport:
    """A report that holds an exception alone, raised where no model was there to be checked yet."""
    source, _ = error_place(error.__traceback__)
    facts = ErrorFacts(
        phase=phase,
        type=type(error).__name__,
        message=str(error),
        source=source,
        module="",
        in_trainable=False,
    )
    return GradientReport(
        model="", training={}, grad_enabled_at_start=True, inference_mode_at_start=False, grad_mode_leak=None,
        trainable=(), named=False, calls=(), events=(), chain_end=None, loss=None, loss_requires_grad=False,
        loss_grad_fn=None, loss_carries=False, loss_live=False, backward_ran=False, tensors=(),
        inference_line=None, inference_parameters=(), frozen_with_grad=(),
        underflow_scale=None, dropped_columns=(), memory=None, host=None, labels=None, optimizer=None, step=None,
        parallel=ParallelFacts(wrapper="none", rank=0, find_unused_parameters=None, ranks=(), backward_skipped=False,
                               collectives_differ=None),
        error=facts, exception=error.with_traceback(None),
    )  # fmt: skip


def _first_pass(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None,
    target: Target,
    recorder: Recorder,
    snapshot: Snapshot,
    ranks: Ranks,
) -> _Pass:
    """The watched forward, the exchange with the other processes, the backward."""
    this = _Pass()
    snapshot.clear_grads()
    try:
        with ranks.comparing_collectives(), recorder.watching():
            enabled_before = torch.is_grad_enabled()
            outputs = run_model(model, batch)
            this.phase = "loss"
            this.loss = loss_of(outputs, model=model) if loss_fn is None else scalar(loss_fn(outputs, batch))
            this.grad_mode_leaks = enabled_before and not torch.is_grad_enabled()
        if this.loss.is_meta:
            check_devices(model, batch)
    except CollectivesDiffer as differ:
        this.places = differ.places
    except ProbeError:
        raise
    except Exception as error:
        check_devices(model, batch)
        this.error = error
    if this.loss is not None:
        this.loss_requires_grad = this.loss.requires_grad
        this.in_graph = measure.leaves_of(this.loss)
    this.mine = _rank_facts(this, target, recorder, ranks.rank)
    facts = tuple(ranks.gather(this.mine))
    this.backward_skipped = would_hang(facts, find_unused=ranks.find_unused) or this.places is not None
    if this.loss is not None and this.error is None and not this.backward_skipped:
        this.phase = "backward"
        try:
            this.loss.backward()
            this.backward_ran = True
        except RuntimeError as error:
            this.error = error
    return this


def _rank_facts(this: _Pass, target: Target, recorder: Recorder, rank: int) -> RankFacts:
    return RankFacts(
        rank=rank,
        memory_calls=len(recorder.log.memory),
        loss_requires_grad=this.loss_requires_grad,
        reached=tuple(sorted(name for name, tensor in target.tensors.items() if id(tensor) in this.in_graph)),
        error=None if this.error is None else f"{type(this.error).__name__}: {this.error}",
        anchored=any(event.kind == "zero-weight" for event in recorder.events),
    )


def _runner(
    model: nn.Module, batch: Any, loss_fn: LossFunction | None, snapshot: Snapshot
) -> Callable[[], tuple[Any, torch.Tensor]]:
    """The same forward again, from the same random state."""

    def run() -> tuple[Any, torch.Tensor]:
        snapshot.random.restore()
        outputs = run_model(model, batch)
        return outputs, loss_of(outputs, model=model) if loss_fn is None else scalar(loss_fn(outputs, batch))

    return run


@contextmanager
def _eagerly() -> Iterator[None]:
    """Run compiled parts as plain Python: inside a compiled graph neither operations nor modules can be watched."""
    if (
        "torch._dynamo" not in sys.modules
    ):  # importing it takes seconds, and nothing can be compiled without it
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
        yield


def _run_step(step: Callable[[], object], optimizer: torch.optim.Optimizer, target: Target) -> StepFacts:
    """Run the caller's own step with the optimizer watched, then undo it."""
    best: list[str] = []

    def look(*_: object) -> None:
        states = [measure.grad_state(tensor.grad) for tensor in target.tensors.values()]
        best.append(next((s for s in ("finite", "non-finite", "zero") if s in states), "none"))

    with undone_step(target.tensors.values(), optimizer):
        handle = optimizer.register_step_pre_hook(look)
        try:
            step()
        finally:
            handle.remove()
    return StepFacts(optimizer_stepped=bool(best), state_at_step=best[-1] if best else "none")  # type: ignore[arg-type]


def _first_called(target: Target, recorder: Recorder) -> Target:
    """Of several trainable modules the one that ran first: beside a projection, adapters inside the LLM may learn."""
    called = next((call.path for call in recorder.log.calls() if call.path in target.roots), None)
    if called is None:
        return target
    return replace(target, roots={called: target.roots[called]})


def _frozen_with_grad(model: nn.Module, target: Target) -> tuple[str, ...]:
    wanted = {id(tensor) for tensor in target.tensors.values()}
    return tuple(name for name, p in model.named_parameters() if id(p) not in wanted and p.grad is not None)


def _error_facts(this: _Pass, model: nn.Module, target: Target) -> ErrorFacts | None:
    if this.error is None:
        return None
    source, modules = error_place(this.error.__traceback__)
    names = {module: name for name, module in unwrap(model).named_modules()}
    roots = set(target.roots.values())
    facts = ErrorFacts(
        phase=this.phase,
        type=type(this.error).__name__,
        message=str(this.error),
        source=source,
        module=next((names[module] for module in reversed(modules) if module in names), ""),
        in_trainable=any(module in roots for module in modules),
    )
    if this.phase != "backward" and find_error_cause(facts) is None:
        at = "" if source is None else f" at {source} (`{source.text}`)"
        where = f"{type(model).__name__}'s forward" if this.phase == "forward" else "computing the loss"
        raise ProbeError(
            f"{where} raised {facts.type}{at}: {facts.message}. The gradient could not be checked; make "
            "model(**batch) run first, on the very batch that you pass here."
        ) from this.error
    return facts


def _report(
    model: nn.Module, batch: Any, target: Target, recorder: Recorder, first: _Pass,
    again: second_pass.SecondPass, grads: dict[str, torch.Tensor | None], frozen_with_grad: tuple[str, ...],
    parallel: ParallelFacts, optimizer: torch.optim.Optimizer | None, step: StepFacts | None,
    underflow: float | None, grad_enabled: bool, inference_mode: bool, dropped_columns: tuple[str, ...],
) -> GradientReport:  # fmt: skip
    loss = first.loss
    label = None if loss is None else recorder.lineage.get(loss)
    sharded = parallel.wrapper in ("FSDP1", "FSDP2")
    return GradientReport(
        model=type(unwrap(model)).__name__,
        training={"": model.training}
        | {name: child.training for name, child in unwrap(model).named_children()},
        grad_enabled_at_start=grad_enabled,
        inference_mode_at_start=inference_mode,
        grad_mode_leak=recorder.grad_off if first.grad_mode_leaks else None,
        trainable=tuple(target.roots),
        named=target.named,
        calls=recorder.log.calls(),
        events=recorder.all_events(),
        chain_end=None if label is None or label.live else label.origin,
        loss=None if loss is None else float(loss.detach()),
        loss_requires_grad=first.loss_requires_grad,
        loss_grad_fn=None if loss is None or loss.grad_fn is None else loss.grad_fn.name(),
        loss_carries=label is not None,
        loss_live=label is not None and label.live,
        backward_ran=first.backward_ran,
        tensors=measure.tensor_grads(target, grads, None if sharded else first.in_graph, optimizer),
        inference_line=recorder.inference_line,
        inference_parameters=tuple(name for name, p in unwrap(model).named_parameters() if p.is_inference()),
        frozen_with_grad=frozen_with_grad,
        underflow_scale=underflow,
        dropped_columns=dropped_columns,
        memory=measure.memory_facts(target, recorder, again),
        host=measure.host_facts(recorder.log.host, again.changed_positions_BS, batch),
        labels=measure.label_facts(batch, recorder),
        optimizer=None if optimizer is None else measure.optimizer_facts(unwrap(model), target, optimizer),
        step=step,
        parallel=parallel,
        error=_error_facts(first, model, target),
        exception=None if first.error is None else first.error.with_traceback(None),
    )
