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
from ocrmem.gradflow.report import ErrorFacts, GradientReport, GradState, Phase, RankFacts, StepFacts
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


BEST_LAST: tuple[GradState, ...] = ("none", "zero", "non-finite", "finite")
"""How a step's gradients are summed up: by the best among them."""


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

    The model is used in the mode in which it is, with the grad mode that is on. Afterwards gradients, random
    state, modes, buffers, parameters, attributes and grad mode are as before; what a forward keeps outside
    the model, such as in a global dictionary, is not. A second forward, with the trainable module's output
    tokens permuted, shows whether the loss depends on them. In a distributed run every process must call it.

    Args:
        model: any module.
        batch: a mapping is passed as keywords, a tuple or list as positions, anything else as the one
            argument.
        trainable: the module that should learn, or its name ("proj"); also several of them, or parameters.
            None: every parameter that requires grad. Naming it tells a part frozen by mistake from one frozen
            on purpose.
        loss_fn: takes the model's output and the batch, returns a scalar. None: the output's `loss`, its
            first element, or the output itself.
        optimizer: checked to hold every trainable tensor.
        step: your own training step, from zero_grad to optimizer.step; run once more with the optimizer
            watched, and undone. Needs `optimizer`.
        memory_samples: for each row of the trainable module's output the sample of the batch to which it
            belongs; checks that the model pairs them so. Needs an output with `logits`.
        dropped_columns: keys that the data had and the batch has not, for the explanation.

    Returns:
        The report; `explain` names the cause.

    Raises:
        ProbeError: the check could not be run: the forward raised something that has nothing to do with
            gradients, a tensor is on the wrong device, there is no scalar loss, or the model has no
            parameters.
    """
    if not isinstance(model, nn.Module):
        raise ProbeError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    if step is not None and optimizer is None:
        raise ProbeError("step was given without optimizer; pass both, so that its step can be watched and undone.")
    target = resolve_target(unwrap(model), trainable)
    probe = _Probe(model, batch, target, loss_fn)
    try:
        with _eagerly():
            report = probe.run(memory_samples)
            if optimizer is not None:
                facts = measure.optimizer_facts(unwrap(model), target, optimizer)
                grads = measure.tensor_grads(target, probe.grads, probe.in_graph, optimizer)
                report = replace(report, optimizer=facts, tensors=grads)
                if step is not None:
                    report = replace(report, step=_run_step(step, optimizer, target))
        return replace(report, dropped_columns=tuple(dropped_columns))
    finally:
        probe.close()


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
    return GradientReport(model="", error=facts, exception=error.with_traceback(None))


@dataclass
class _Pass:
    """What the watched forward and backward gave."""

    loss: torch.Tensor | None = None
    error: Exception | None = None
    phase: Phase = "forward"
    backward_ran: bool = False
    backward_skipped: bool = False
    places: tuple[str, ...] | None = None
    """Where the processes were when they were about to gather different modules."""
    ranks: tuple[RankFacts, ...] = ()
    leaves: set[int] = field(default_factory=set)
    """ids of the tensors that the loss's graph leads to."""
    leaks: bool = False
    """Grad mode was on before the forward and off after it."""


class _Probe:
    """One check of one model on one batch; `close` undoes everything."""

    def __init__(self, model: nn.Module, batch: Any, target: Target, loss_fn: LossFunction | None) -> None:
        self.model, self.batch, self.target, self.loss_fn = model, batch, target, loss_fn
        self.inner = unwrap(model)
        self.snapshot = Snapshot(model, extra=target.tensors.values())
        self.ranks = Ranks(model)
        self.grad_enabled = torch.is_grad_enabled()
        self.inference_mode = torch.is_inference_mode_enabled()
        self.recorder = Recorder(
            self.inner,
            seeds=target.tensors.values(),
            roots=target.roots.values(),
            before_write=self.snapshot.before_write,
        )
        self.first = _Pass()
        self.grads: dict[str, torch.Tensor | None] = {}

    @property
    def in_graph(self) -> set[int] | None:
        """Leaves of the loss's graph; None under FSDP, where the graph leads to gathered copies."""
        return None if self.ranks.wrapper in ("FSDP1", "FSDP2") else self.first.leaves

    def run(self, memory_samples: Sequence[int] | None) -> GradientReport:
        """All passes, and the report of them."""
        self._forward_and_backward()
        self.grads = {name: tensor.grad for name, tensor in self.target.tensors.items()}
        frozen_with_grad = self._frozen_with_grad()
        torch.set_grad_enabled(self.grad_enabled)
        if not self.target.named:
            self.target = _first_called(self.target, self.recorder)
        again, underflow = self._second_passes(memory_samples)
        first, recorder = self.first, self.recorder
        label = None if first.loss is None else recorder.lineage.get(first.loss)
        return GradientReport(
            model=type(self.inner).__name__,
            training={"": self.model.training} | {name: child.training for name, child in self.inner.named_children()},
            grad_enabled_at_start=self.grad_enabled,
            inference_mode_at_start=self.inference_mode,
            grad_mode_leak=recorder.grad_off if first.leaks else None,
            trainable=tuple(self.target.roots),
            named=self.target.named,
            calls=recorder.log.calls(),
            events=recorder.all_events(),
            chain_end=None if label is None or label.live else label.origin,
            loss=None if first.loss is None else float(first.loss.detach()),
            loss_requires_grad=first.loss is not None and first.loss.requires_grad,
            loss_grad_fn=None if first.loss is None or first.loss.grad_fn is None else first.loss.grad_fn.name(),
            loss_carries=label is not None,
            loss_live=label is not None and label.live,
            backward_ran=first.backward_ran,
            tensors=measure.tensor_grads(self.target, self.grads, self.in_graph, None),
            inference_line=recorder.inference_line,
            inference_parameters=tuple(name for name, p in self.inner.named_parameters() if p.is_inference()),
            frozen_with_grad=frozen_with_grad,
            underflow_scale=underflow,
            memory=measure.memory_facts(self.target, recorder, again),
            host=measure.host_facts(recorder.log.host, again.changed_positions_BS, self.batch),
            labels=measure.label_facts(self.batch, recorder),
            parallel=self.ranks.facts(first.ranks, skipped=first.backward_skipped, places=first.places),
            error=self._error_facts(),
            exception=None if first.error is None else first.error.with_traceback(None),
        )

    def close(self) -> None:
        """Put everything back."""
        self.snapshot.restore()
        self.ranks.close()

    def _forward_and_backward(self) -> None:
        """The watched forward, the exchange with the other processes, the backward."""
        first = self.first
        self.snapshot.clear_grads()
        try:
            with self.ranks.comparing_collectives(), self.recorder.watching():
                outputs = run_model(self.model, self.batch)
                first.phase = "loss"
                first.loss = self._loss(outputs)
                first.leaks = self.grad_enabled and not torch.is_grad_enabled()
            if first.loss.is_meta:
                check_devices(self.model, self.batch)
        except CollectivesDiffer as differ:
            first.places = differ.places
        except ProbeError:
            raise
        except Exception as error:
            check_devices(self.model, self.batch)
            first.error = error
        if first.loss is not None:
            first.leaves = measure.leaves_of(first.loss)
        first.ranks = tuple(self.ranks.gather(self._rank_facts()))
        first.backward_skipped = first.places is not None or would_hang(first.ranks, find_unused=self.ranks.find_unused)
        if first.loss is None or first.error is not None or first.backward_skipped:
            return
        first.phase = "backward"
        try:
            first.loss.backward()
            first.backward_ran = True
        except RuntimeError as error:
            first.error = error

    def _second_passes(self, memory_samples: Sequence[int] | None) -> tuple[second_pass.SecondPass, float | None]:
        """The forward with disturbed memory, and with a scaled loss where float16 may have underflowed."""
        again, underflow, first = second_pass.SecondPass(), None, self.first
        if first.loss is None or first.phase != "backward" or first.backward_skipped:
            return again, underflow
        # A sharded model's gathers are in step with its backward; a forward alone would put them out of step.
        if self.ranks.wrapper not in ("FSDP1", "FSDP2"):
            again = second_pass.disturb(self._again, self.target, self.recorder, first.loss, memory_samples)
        if not self.ranks.active and first.backward_ran:
            underflow = second_pass.underflow_scale(self._again, self.target, self.grads, self.recorder)
        return again, underflow

    def _again(self) -> tuple[Any, torch.Tensor]:
        """The same forward again, from the same random state. DDP is left out: it counts its forwards."""
        self.snapshot.random.restore()
        outputs = run_model(self.inner if self.ranks.wrapper == "DDP" else self.model, self.batch)
        return outputs, self._loss(outputs)

    def _loss(self, outputs: Any) -> torch.Tensor:
        if self.loss_fn is None:
            return loss_of(outputs, model=self.inner)
        return scalar(self.loss_fn(outputs, self.batch))

    def _rank_facts(self) -> RankFacts:
        first, recorder = self.first, self.recorder
        reached = [name for name, tensor in self.target.tensors.items() if id(tensor) in first.leaves]
        return RankFacts(
            rank=self.ranks.rank,
            memory_calls=len(recorder.log.memory),
            loss_requires_grad=first.loss is not None and first.loss.requires_grad,
            reached=tuple(sorted(reached)),
            error=None if first.error is None else f"{type(first.error).__name__}: {first.error}",
            anchored=any(event.kind == "zero-weight" for event in recorder.events),
        )

    def _frozen_with_grad(self) -> tuple[str, ...]:
        wanted = {id(tensor) for tensor in self.target.tensors.values()}
        named = self.inner.named_parameters()
        return tuple(name for name, p in named if id(p) not in wanted and p.grad is not None)

    def _error_facts(self) -> ErrorFacts | None:
        error, phase = self.first.error, self.first.phase
        if error is None:
            return None
        source, modules = error_place(error.__traceback__)
        names = {module: name for name, module in self.inner.named_modules()}
        roots = set(self.target.roots.values())
        facts = ErrorFacts(
            phase=phase,
            type=type(error).__name__,
            message=str(error),
            source=source,
            module=next((names[module] for module in reversed(modules) if module in names), ""),
            in_trainable=any(module in roots for module in modules),
        )
        if phase == "backward" or find_error_cause(facts) is not None:
            return facts
        at = "" if source is None else f" at {source} (`{source.text}`)"
        where = f"{type(self.inner).__name__}'s forward" if phase == "forward" else "computing the loss"
        raise ProbeError(
            f"{where} raised {facts.type}{at}: {facts.message}. The gradient could not be checked; make "
            "model(**batch) run first, on the very batch that you pass here."
        ) from error


@contextmanager
def _eagerly() -> Iterator[None]:
    """Run compiled parts as plain Python: inside a compiled graph neither operations nor modules can be
    watched."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds, and nothing is compiled without it
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
        yield


def _run_step(step: Callable[[], object], optimizer: torch.optim.Optimizer, target: Target) -> StepFacts:
    """Run the caller's own step with the optimizer watched, then undo it."""
    seen: list[GradState] = []

    def look(*_: object) -> None:
        states: list[GradState] = [measure.grad_state(tensor.grad) for tensor in target.tensors.values()]
        seen.append(max(states, key=BEST_LAST.index))

    with undone_step(target.tensors.values(), optimizer):
        handle = optimizer.register_step_pre_hook(look)
        try:
            step()
        except RuntimeError as error:
            raise ProbeError(
                f"the step that was given raised {type(error).__name__}: {error}. Leave it out to have the "
                "model alone "
                "examined."
            ) from error
        finally:
            handle.remove()
    return StepFacts(optimizer_stepped=bool(seen), state_at_step=seen[-1] if seen else "none")


def _first_called(target: Target, recorder: Recorder) -> Target:
    """Of several trainable modules the one that ran first: beside a projection, adapters inside the LLM may
    learn."""
    called = next((call.path for call in recorder.log.calls() if call.path in target.roots), None)
    if called is None:
        return target
    return replace(target, roots={called: target.roots[called]})
