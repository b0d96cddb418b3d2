"""The way from the trainable part to the loss, as a list of stations; `tree` and `svg` draw it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ocrmem.gradflow.cause import gradient_zero, part_of
from ocrmem.gradflow.explain import Explanation
from ocrmem.gradflow.report import Event, GradientReport, ModuleCall, SourceLine

Carries = Literal["not needed", "yes", "zero", "no"]
"""Whether a station's output carries the gradient: nothing before it learns; it does; it does, and what comes
is all zeros; it should and does not."""

MAX_DEPTH = 2
"""Levels of modules shown below the model's children."""


OPTIMIZER_CAUSES = ("optimizer-", "gradient-cleared", "weights-too-coarse")
"""Beginnings of the names of causes that lie behind the backward."""


@dataclass(frozen=True, kw_only=True)
class Station:
    """A line of the tree."""

    name: str
    kind: str
    """Class, operation, or empty."""
    detail: str
    """Shape, dtype and grad_fn of the output."""
    carries: Carries
    depth: int
    place: str = ""
    """Source line of a break."""
    is_break: bool = False
    is_trainable: bool = False


def stations(report: GradientReport, explanation: Explanation, *, numbers: bool = True) -> list[Station]:
    """The way, in the order of the forward; at most one station is the break.

    Args:
        numbers: show the loss and gradient norms; False for text that must not depend on the machine.
    """
    shown = _collapsed(_shown_calls(report), report)
    found: list[tuple[int, Station]] = [
        (position, _of_call(call, count, report, numbers)) for position, call, count in shown
    ]
    if report.memory is not None and not report.memory.calls and not _called(report):
        found.insert(0, (0, _never_ran(report)))
    event = _break_event(report, explanation)
    ungraded = next((entry for entry in found if _is_ungraded(entry[1], event, explanation)), None)
    if ungraded is not None:
        marked = replace(ungraded[1], is_break=True, place=_place(explanation.source))
        found[found.index(ungraded)] = (ungraded[0], marked)
    elif event is not None:
        base = _base_depth(report)
        text = event.op.removesuffix(".__get__")
        place = _place(event.source or explanation.source)
        depth = max(0, min(MAX_DEPTH, event.depth - base))
        station = Station(name=text, kind="", detail="", carries="no", depth=depth, place=place, is_break=True)
        found.append((event.position, station))
        found.sort(key=lambda entry: entry[0])
    lines = [station for _, station in found]
    lines.append(_loss(report, explanation, numbers))
    if report.calls and explanation.cause is not None and explanation.cause.startswith(OPTIMIZER_CAUSES):
        lines.append(Station(name="optimizer", kind="", detail="", carries="no", depth=0))
    lines = _with_break(lines, explanation)
    broken = next((index for index, line in enumerate(lines) if line.is_break), len(lines))
    if gradient_zero(report):
        lines[:broken] = [replace(line, carries="zero") if line.carries == "yes" else line for line in lines[:broken]]
    return lines


def _place(source: SourceLine | None) -> str:
    return "" if source is None else f"{source}  {source.text}".rstrip()


def _is_ungraded(station: Station, event: Event | None, explanation: Explanation) -> bool:
    """The station is a module that runs, whole, with grad mode off: it is the break, not some operation in
    it."""
    if event is None or event.kind != "grad-off" or not explanation.module:
        return False
    return station.name == explanation.module and station.carries == "no"


def _with_break(lines: list[Station], explanation: Explanation) -> list[Station]:
    """Mark the place where the chain breaks, unless an event did already, or there is none."""
    if explanation.healthy or any(line.is_break for line in lines):
        return lines
    broken = next((i for i, line in enumerate(lines) if line.carries == "no"), None)
    if broken is None:
        named = [i for i, line in enumerate(lines) if explanation.module and line.name == explanation.module]
        broken = named[0] if named else len(lines) - 1
    lines[broken] = replace(lines[broken], is_break=True, carries="no")
    return lines


def _break_event(report: GradientReport, explanation: Explanation) -> Event | None:
    if explanation.healthy:
        return None
    if report.end is not None and not report.loss_live:
        return report.end
    if explanation.source is None:
        return None
    return next((event for event in report.events if event.source == explanation.source), None)


def _base_depth(report: GradientReport) -> int:
    return min((call.depth for call in report.calls if call.path), default=0)


def _called(report: GradientReport) -> bool:
    return any(call.path in report.trainable for call in report.calls)


def _shown_calls(report: GradientReport) -> list[tuple[int, ModuleCall]]:
    base = _base_depth(report)
    chosen = []
    for position, call in enumerate(report.calls, start=1):
        depth = call.depth - base
        if not call.path or depth > MAX_DEPTH or (depth > 0 and not call.carries and not _raised(call, report)):
            continue
        chosen.append((position, call))
    return chosen


def _raised(call: ModuleCall, report: GradientReport) -> bool:
    """The call did not return: the error came from inside it."""
    error = report.error
    return error is not None and error.phase == "forward" and call.shape is None and part_of(error.module, call.path)


def _collapsed(
    calls: list[tuple[int, ModuleCall]], report: GradientReport
) -> list[tuple[int, ModuleCall, list[ModuleCall]]]:
    """Runs of layers 0, 1, 2... that fare alike become one entry, with the calls that it stands for."""
    found: list[tuple[int, ModuleCall, list[ModuleCall]]] = []
    for position, call in calls:
        if found:
            _, first, group = found[-1]
            parent, _, index = call.path.rpartition(".")
            if (
                index.isdigit()
                and first.path.rpartition(".")[0] == parent
                and (first.kind, first.depth, first.live, first.carries)
                == (call.kind, call.depth, call.live, call.carries)
            ):
                group.append(call)
                continue
        found.append((position, call, [call]))
    return found


def _of_call(call: ModuleCall, group: list[ModuleCall], report: GradientReport, numbers: bool) -> Station:
    last = group[-1]
    name = call.path if len(group) == 1 else f"{call.path} … {last.path.rpartition('.')[2]}"
    kind = call.kind if len(group) == 1 else f"{call.kind} ×{len(group)}"
    trainable = call.path in report.trainable
    shape = "" if last.shape is None else f"[{', '.join(map(str, last.shape))}]" if last.shape else "scalar"
    parts = [shape, last.dtype or ""]
    raised = report.error is not None and _raised(call, report)
    if raised and report.error is not None:
        parts.append(f"raised {report.error.type}")
    if call.carries:
        parts.append(last.grad_fn or "no grad_fn")
    if trainable:
        parts.append(_gradient(report, numbers))
    state: Carries = "no" if raised else "not needed" if not call.carries else "yes" if call.live else "no"
    return Station(
        name=name,
        kind=kind,
        detail="  ".join(part for part in parts if part),
        carries=state,
        depth=call.depth - _base_depth(report),
        is_trainable=trainable,
    )


def _gradient(report: GradientReport, numbers: bool) -> str:
    if not report.backward_ran:
        return "gradient none"
    states = report.states
    if numbers and states & {"finite"}:
        norm = sum((tensor.norm or 0.0) ** 2 for tensor in report.tensors) ** 0.5
        return f"gradient {norm:.3g}"
    return "gradient " + " and ".join(sorted(states))


def _never_ran(report: GradientReport) -> Station:
    return Station(
        name=", ".join(report.trainable),
        kind="",
        detail="never ran",
        carries="no",
        depth=0,
        is_trainable=True,
    )


def _loss(report: GradientReport, explanation: Explanation, numbers: bool) -> Station:
    if report.loss is None:
        error = report.error
        building = error is not None and error.phase == "build"
        raised = "" if error is None else f"raised {error.type}" if building else f"{error.type} in the {error.phase}"
        return Station(name="make()" if building else "loss", kind="", detail=raised, carries="no", depth=0)
    value = f"{report.loss:.4g}  " if numbers else ""
    whole = report.loss_live and report.loss_requires_grad
    return Station(
        name="loss",
        kind="",
        detail=value + (report.loss_grad_fn or "no grad_fn"),
        carries="yes" if whole else "no",
        depth=0,
    )
