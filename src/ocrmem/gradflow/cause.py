"""What a cause is; the causes themselves are in `causes_*.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ocrmem.gradflow.report import ErrorFacts, Event, GradientReport, SourceLine

E0 = "element 0 of tensors does not require grad and does not have a grad_fn"
"""The bare RuntimeError that this package explains."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cause found in one report."""

    sentence: str
    module: str = ""
    source: SourceLine | None = None


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A way in which a gradient breaks."""

    id: str
    table: str
    """Where the reference lists it: A cut with the bare RuntimeError, B another error, C silent, E
    distributed."""
    title: str
    """Half a sentence, for the docs."""
    mend: str
    """One line."""
    find: Callable[[GradientReport], Finding | None]
    undecided: bool = False
    """The batch at hand cannot show whether the model learns."""


def at_event(event: Event, sentence: str) -> Finding:
    """A finding at an event."""
    return Finding(sentence=sentence, module=event.module, source=event.source)


def at_region(event: Event, sentence: str) -> Finding:
    """A finding at the place where grad mode was switched off, or at the event itself."""
    return Finding(sentence=sentence, module=event.module, source=event.region or event.source)


def at_error(error: ErrorFacts, sentence: str) -> Finding:
    """A finding at the place of an exception."""
    return Finding(sentence=sentence, module=error.module, source=error.source)


def stuck(report: GradientReport) -> bool:
    """Nothing reaches the trainable tensors: an error, no gradient, or zeros only."""
    return report.error is not None or not report.some_gradient


def gradient_missing(report: GradientReport) -> bool:
    """No trainable tensor got a gradient, not even zeros, and no other error than the bare one explains
    it."""
    if report.error is not None and E0 not in report.error.message:
        return False
    return "none" in report.states and report.states <= {"none"} and not report.parallel.backward_skipped


def gradient_zero(report: GradientReport) -> bool:
    """The backward ran, and what arrived is exactly zero."""
    return (
        report.backward_ran
        and report.error is None
        and "zero" in report.states
        and not (report.states & {"finite", "non-finite"})
    )


def learns(report: GradientReport) -> bool:
    """The backward ran and brought a usable gradient."""
    return report.backward_ran and report.error is None and report.some_gradient


def moved(report: GradientReport) -> bool | None:
    """Whether the loss changed with the memory; None where that was not measured.

    Differences below a millionth are what GPU kernels vary by from run to run.
    """
    memory = report.memory
    if memory is None or memory.loss_change is None or report.loss is None:
        return None
    return not abs(memory.loss_change) <= 1e-6 * max(1.0, abs(report.loss))


def value_reaches_loss(report: GradientReport) -> bool | None:
    """Whether the loss depends on the memory's values by any way; None where that was not measured."""
    memory = report.memory
    if memory is None or memory.loss_change is None:
        return None
    return moved(report) or bool(memory.value_change)


def memory_name(report: GradientReport) -> str:
    """The trainable module, in quotes."""
    return f"`{report.memory.module}`" if report.memory is not None else "the trainable part"


def part_of(path: str, root: str) -> bool:
    """Whether `path` is `root` or inside it."""
    return path == root or path.startswith(f"{root}.")
