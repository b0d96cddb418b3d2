"""The path as plain text."""

from __future__ import annotations

from ocrmem.gradflow.explain import Explanation
from ocrmem.gradflow.path import stations
from ocrmem.gradflow.report import GradientReport

MARKS = {"not needed": "·", "yes": "✓", "zero": "○", "no": "✗"}


def path_tree(report: GradientReport, explanation: Explanation, *, numbers: bool = True) -> str:
    """The way from the trainable part to the loss, one line a station, the break marked.

    `✓` carries the gradient, `○` carries nothing but zeros, `✗` should carry it and does not, `·` needs none,
    `▶` is the part that learns.
    """
    lines = []
    found = stations(report, explanation, numbers=numbers)
    rows = [("  " * station.depth + _name(station.name, station.is_trainable), station) for station in found]
    width = min(44, max(len(name) for name, _ in rows))
    for name, station in rows:
        where = "  ".join(filter(None, (station.detail, station.place)))
        line = f"{MARKS[station.carries]} {name:{width}}  {station.kind:22} {where}".rstrip()
        lines.append(line + ("   ◀── the break" if station.is_break else ""))
    return "\n".join(lines)


def _name(name: str, trainable: bool) -> str:
    return f"▶ {name}" if trainable else name
