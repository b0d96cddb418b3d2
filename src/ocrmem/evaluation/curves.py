"""Learning curves: what `ocrmem train --json` printed, kept as `results/training/NAME.json`, as a plot and a table.

Runs in `results/short/`, rivals and runs that each leave something out, become a table of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ocrmem.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEARNING_PLOT = "learning.svg"
METRICS = {
    "eval_reconstruction-6_accuracy": "reading, six lines",
    "eval_recall_accuracy": "recall",
    "eval_cloze_accuracy": "cloze",
    "eval_reply_accuracy": "reply",
}
"""What is drawn of an evaluation while training: held-out token accuracy, teacher-forced."""
LOSSES = {"eval_continuation_loss": "continuation, nats", "eval_reply_loss": "reply, nats"}
"""What the table has besides: cross entropy a token, where the likeliest one is seldom right."""


def read_curves(folder: Path) -> dict[str, dict[str, Any]]:
    """Every run of a folder by the file's name; empty where there is no such folder.

    Raises:
        DataError: a file is not what `ocrmem train --json` prints.
    """
    runs = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            for entry in run["log_history"]:
                float(entry["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: no learning curve ({type(error).__name__}: {error}); expected what `ocrmem train CONFIG "
                "--json` prints, an object with `log_history`. Write the file again, or remove it."
            ) from error
        runs[path.stem] = run
    return runs


def learning_figure(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """One panel for each run of several evaluations: held-out token accuracy by step, a dotted line where a stage
    ends."""
    from matplotlib.figure import Figure

    def evaluations(run: Mapping[str, Any]) -> int:
        return sum(not METRICS.keys().isdisjoint(entry) for entry in run["log_history"])

    runs = {name: run for name, run in runs.items() if evaluations(run) > 1} or runs
    figure = Figure(figsize=(1 + 4.5 * len(runs), 3.8), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        for metric, label in METRICS.items():
            known = [entry for entry in run["log_history"] if metric in entry]
            steps, values = [entry["step"] for entry in known], [entry[metric] for entry in known]
            panel.plot(steps, values, marker="o", markersize=3, label=label)
        for end in list(accumulate(stage["steps"] for stage in run.get("stages", ())))[:-1]:
            panel.axvline(end, color="#8c959f", linestyle=":", linewidth=1)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("optimizer steps")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out token accuracy")
    panels[0].legend(fontsize=8)
    return figure


def learning_section(runs: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Lines of the page."""
    if not runs:
        return ()
    return (
        "## While training",
        "",
        f"![Held-out token accuracy by step](fidelity/{LEARNING_PLOT})",
        "",
        "Held-out token accuracy, teacher-forced; dotted lines are ends of stages of the curriculum. The last",
        "evaluation of each run, whose file in `results/training` says what it had of the config, which may have got",
        "further stages since, and which runs came `then`; `…-last` is the last of them, counted from its own start,",
        "and `…-fresh` a run whose adapter is not shipped:",
        "",
        *last_values(runs),
        "",
    )


def short_section(runs: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Lines of the page."""
    if not runs:
        return ()
    return (
        "## Rivals after as many steps, and what each part is worth",
        "",
        "Short runs of the recipe, each by `python benchmarks/fidelity.py --only NAME`. `…-memory` and the rivals have",
        "the same data, steps and size of projection; `no-…` leaves a part out, `no-warm-start` its 400 steps too.",
        "`more-…` go on from a memory with all of the last stage (`more-whole`) or without a part of it. One run each,",
        "except the two that were run again: a hundredth is chance. `2x-memory`, `2x-mean-pooling`, and `4x-memory`",
        "and `4x-mean-pooling`, which go on from these, are of the recipe with `--scale 0.03`, before it had weight",
        "decay and, at 4x, longer rows; the others are of those before, as the `note` of each file says, and what they",
        "go on from and are compared with is `2x-no-reading`.",
        "Held-out token accuracy, teacher-forced, and cross entropy at the end:",
        "",
        *last_values(runs, commands=False),
        "",
    )


def last_values(runs: Mapping[str, Mapping[str, Any]], *, commands: bool = True) -> list[str]:
    """A table of every run's last evaluation while training.

    Args:
        commands: a column for the command of each.
    """
    shown = {**METRICS, **LOSSES}
    head = ["run", "steps", *shown.values(), *(["command"] if commands else []), "device"]
    lines = [head, ["---"] * len(head)]
    for name, run in runs.items():
        last = next((entry for entry in reversed(run["log_history"]) if not METRICS.keys().isdisjoint(entry)), {})
        values = [f"{last[metric]:.3f}" if metric in last else "–" for metric in shown]
        command = [f"`{run['command']}`" if "command" in run else "–"] if commands else []
        lines.append([name, f"{last.get('step', 0):,}", *values, *command, run.get("device", "–")])
    return ["| " + " | ".join(line) + " |" for line in lines]
