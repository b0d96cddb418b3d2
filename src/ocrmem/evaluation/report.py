"""From results files to the page `docs/fidelity.md` and its plots: `python -m ocrmem.evaluation.report`.

```
results/fidelity/*.json ─▶ check_schema ─┬─▶ docs/fidelity.md
results/{training,short}/*.json ─────────┴─▶ docs/fidelity/*.svg
```

One file holds one evaluation of one adapter on one device; an adapter may have several files. The same files give the
same page and plots, byte for byte, with the same version of matplotlib.
"""

from __future__ import annotations

import datetime
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from ocrmem.errors import DataError
from ocrmem.evaluation.curves import LEARNING_PLOT, learning_figure, learning_section, read_curves, short_section
from ocrmem.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
"""Version of results files; raise it when what their fields mean changes."""
TASKS = {"cued-recall": "Cued recall", "cloze": "Cloze questions", "next-turn": "Next turn"}
"""Headings of the tasks, in the order of the page."""
MEMORY_ARM = "memory"
"""The arm that is the adapter itself; drawn in colour."""
SCALE_ARMS = ("none", "full-text")
"""The ends of the scale of G."""
READING_PLOT = "reading.svg"
DASH = "–"

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """One results file."""

    name: str
    """The file's name without its ending."""
    data: Row
    """Checked against the schema."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_interval(value: Any) -> bool:
    numbers = isinstance(value, dict) and all(_is_number(value.get(key)) for key in ("mean", "low", "high"))
    return numbers and value["low"] <= value["high"]


def _is_date(value: Any) -> bool:
    try:
        datetime.datetime.fromisoformat(value)
    except (ValueError, TypeError):
        return False
    return True


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text that is not empty", lambda value: isinstance(value, str) and value.strip() != ""),
    "date": ("an ISO 8601 date", _is_date),
    "count": ("a whole number of 0 or more", lambda value: type(value) is int and value >= 0),
    "number": ("a finite number", _is_number),
    "number?": ("a finite number or null", lambda value: value is None or _is_number(value)),
    "truth": ("true or false", lambda value: isinstance(value, bool)),
    "interval": ('{"mean", "low", "high"} of finite numbers, low not above high', _is_interval),
    "interval?": (
        '{"mean", "low", "high"} of finite numbers, low not above high, or null',
        lambda value: value is None or _is_interval(value),
    ),
    "rows": ("a list of objects", lambda value: isinstance(value, list) and all(type(row) is dict for row in value)),
    "object": ("an object", lambda value: isinstance(value, dict)),
    "seeds": ("a list of whole numbers", lambda value: isinstance(value, list) and all(type(s) is int for s in value)),
}
"""What a field may be: in words, and how it is checked."""

TOP = {
    "schema": "count",
    "probes": "count",
    "command": "text",
    "created": "date",
    "versions": "object",
    "device": "text",
    "seeds": "seeds",
    "adapter": "object",
    "reading": "rows",
    "using": "rows",
    "mean_gain": "rows",
    "cost": "rows",
    "left_out": "rows",
}
"""Fields of a results file and their kinds."""
ADAPTER = {"name": "text", "steps": "count", "memory_ratio": "number"}
"""Fields of `adapter`."""
ROWS = {
    "reading": {
        "source": "text",
        "num_chars": "count",
        "arm": "text",
        "ratio": "number",
        "n": "count",
        "token_accuracy": "interval",
        "cer": "interval?",
        "identifier_recall": "interval?",
    },
    "using": {
        "task": "text",
        "source": "text",
        "arm": "text",
        "n": "count",
        "budget_tokens": "number",
        "ce": "interval",
        "gain": "interval?",
        "ce_over_memory": "interval?",
        "exact_match": "interval?",
        "token_f1": "interval?",
        "transcribes": "interval?",
    },
    "mean_gain": {"arm": "text", "tasks": "text", "gain": "interval?"},
    "cost": {
        "arm": "text",
        "tokens": "number",
        "render_ms": "number?",
        "encode_ms": "number?",
        "prefill_ms": "number?",
        "decode_ms_per_token": "number?",
        "cached": "truth",
    },
    "left_out": {"arm": "text", "reason": "text"},
}
"""Fields of each row of the tables. Null stands for what is not defined or does not happen in an arm."""


def check_schema(data: Any, *, source: str) -> Row:
    """The data of a results file, if it is one of this version. Fields besides those of the schema are passed over.

    Args:
        source: the file, for error messages.

    Raises:
        DataError: a field is missing or not of its kind; it is named with its place.
    """
    if not isinstance(data, dict):
        raise DataError(f"{source}: expected one JSON object with results, got {type(data).__name__}. {_again()}")
    if "schema" in data and data["schema"] != SCHEMA:
        raise DataError(f"{source}: schema is {data['schema']!r}; this version reads {SCHEMA}. {_again()}")
    _check_fields(data, TOP, where=source)
    _check_fields(data["adapter"], ADAPTER, where=f"{source}: adapter")
    for table, fields in ROWS.items():
        for index, row in enumerate(data[table]):
            _check_fields(row, fields, where=f"{source}: {table}[{index}]")
    return data


def _check_fields(values: Mapping[str, Any], fields: Mapping[str, str], *, where: str) -> None:
    for name, kind in fields.items():
        expected, fits = KINDS[kind]
        if name not in values:
            raise DataError(
                f"{where}: no {name!r}; expected {expected}. It has {', '.join(values) or 'none at all'}. {_again()}"
            )
        if not fits(values[name]):
            raise DataError(f"{where}: {name} is {json.dumps(values[name])[:80]}; expected {expected}. {_again()}")


def _again() -> str:
    return "Write the file again with `ocrmem eval`, or remove it."


def read_results(folder: Path) -> list[Results]:
    """Every `*.json` of a folder, by name.

    Raises:
        DataError: there is none, or one is broken.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(f"no results in {str(folder)!r}: expected *.json files. Make one with `ocrmem eval ADAPTER`.")
    return [Results(path.stem, read_file(path)) for path in paths]


def read_file(path: Path) -> Row:
    """The data of one results file.

    Raises:
        DataError: it is no results file of this version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}. {_again()}") from error
    return check_schema(data, source=str(path))


def write_report(results_folder: Path, docs_folder: Path) -> Path:
    """Write the page and its plots; the plots of results that are gone stay where they are.

    Returns:
        The page.
    """
    results = read_results(results_folder)
    curves = read_curves(results_folder.parent / "training")
    figures = plots(results)
    if curves:
        figures[LEARNING_PLOT] = learning_figure(curves)
    for name, figure in figures.items():
        write_text(docs_folder / "fidelity" / name, svg(figure))
    path = docs_folder / "fidelity.md"
    short = read_curves(results_folder.parent / "short")
    write_text(path, "\n".join([page(results), *learning_section(curves), *short_section(short)]))
    return path


def page(results: Sequence[Results]) -> str:
    """The page in Markdown."""
    parts = [
        "# Fidelity: how well the memory is read and used",
        "",
        "Made from `results/fidelity/*.json` by `python -m ocrmem.evaluation.report`. All texts are held out. Square",
        "brackets are 95% bootstrap intervals over probes. CE is cross-entropy in nats per token of the answer;",
        "G = (CE none − CE arm) / (CE none − CE full text), so 0 is no memory and 1 the full text. Arms of a task are",
        "scored on the same probes, so `CE over memory's`, the mean of the differences, tells arms apart where the",
        "intervals of G overlap: above 0 the memory is better. `–` stands where a figure is not defined: no such step,",
        "no identifiers, or no certain gap between no memory and the full text.",
        "",
        "A trained memory also tells the LLM what form an answer has, as a trained soft prompt would, and text does",
        "not: so G can be above 1, and far above it where the full text by itself hardly helps the frozen LLM.",
        "`other-memory`, the memory of another text, has the form and nothing of the text: what a memory holds is its",
        "distance from that row, and `shuffled-memory` has the same tokens in another order. Since version 2 of the",
        "probes a question of cued recall or cloze has a worked example before it, the same for every arm; since",
        "version 3 ledger and recalled text stand behind the memory, and no more in front of it; since version 4 only",
        "sentences that share enough of the question are recalled, and the ledger takes a twenty-fifth, not an eighth.",
        "",
        *_table(
            ["results", "adapter", "compression ratio", "steps", "evaluated", "probes, version", "device"],
            [
                [
                    r.name,
                    a["name"],
                    f"{a['memory_ratio']:.2f}×" if r.data["reading"] else "–",
                    f"{a['steps']:,}",
                    r.data["created"],
                    str(r.data["probes"]),
                    r.data["device"],
                ]
                for r in results
                for a in [r.data["adapter"]]
            ],
        ),
        "",
    ]
    if any(r.data["reading"] for r in results):
        parts += [f"![Token accuracy and character error rate by ratio](fidelity/{READING_PLOT})", ""]
    return "\n".join([*parts, *(line for r in results for line in _section(r))])


def _section(results: Results) -> list[str]:
    data = results.data
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    made = f"Seeds {', '.join(map(str, data['seeds']))}; {versions}."
    if rivals := data.get("rivals"):
        trained = ", ".join(f"{rival['arm']} {rival['steps']:,}" for rival in rivals)
        made += f" Steps of the trained rivals: {trained}; of the memory: {data['adapter']['steps']:,}."
    lines = [f"## {results.name}", "", "```bash", data["command"], "```", "", made, ""]
    if data["reading"]:
        lines += ["### Reading", "", *_reading_table(data["reading"]), ""]
    if data["using"]:
        lines += ["### Using", "", f"![Gain recovered of every arm](fidelity/{quote(_using_plot(results))})", ""]
        for (task, source), rows in _by_task(data["using"]).items():
            lines += [f"#### {_heading(task, source)}", "", *_using_table(rows), ""]
    if data["mean_gain"]:
        cells = [[row["arm"], row["tasks"], _interval(row["gain"])] for row in data["mean_gain"]]
        lines += ["#### Mean of the tasks", "", *_table(["arm", "tasks", "G"], cells), ""]
    if data["cost"]:
        lines += ["### Cost", "", *_cost_table(data["cost"]), ""]
    if data["left_out"]:
        lines += [
            "### Left out",
            "",
            *(f"- {row['arm']}: {' '.join(row['reason'].split())}" for row in data["left_out"]),
            "",
        ]
    return lines


def _reading_table(rows: Iterable[Row]) -> list[str]:
    cells = [
        [row["source"], f"{row['num_chars']:,}", row["arm"], f"{row['ratio']:.2f}×", f"{row['n']:,}"]
        + [_interval(row[key]) for key in ("token_accuracy", "cer", "identifier_recall")]
        for row in rows
    ]
    head = ["source", "characters", "arm", "ratio", "probes", "token accuracy", "character error rate", "identifiers"]
    return _table(head, cells)


def _using_table(rows: Iterable[Row]) -> list[str]:
    cells = [
        [row["arm"], f"{row['n']:,}", f"{row['budget_tokens']:.0f}"]
        + [_interval(row[key]) for key in ("ce", "gain", "ce_over_memory", "exact_match", "token_f1", "transcribes")]
        for row in rows
    ]
    head = ["arm", "probes", "tokens", "CE", "G", "CE over memory's", "exact match", "token F1", "transcribes"]
    return _table(head, cells)


def _cost_table(rows: Iterable[Row]) -> list[str]:
    times = ("render_ms", "encode_ms", "prefill_ms", "decode_ms_per_token")
    cells = [
        [row["arm"], "warm" if row["cached"] else "cold", f"{row['tokens']:.0f}"]
        + [DASH if row[time] is None else f"{row[time]:.2f}" for time in times]
        for row in rows
    ]
    return _table(["arm", "cache", "tokens", *(time.replace("_", " ") for time in times)], cells)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines]


def _interval(value: Row | None) -> str:
    return DASH if value is None else f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _by_task(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by task and source, in the order of `TASKS`, and then of the file."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["source"]), []).append(row)
    known = list(TASKS)
    return dict(sorted(groups.items(), key=lambda item: known.index(item[0][0]) if item[0][0] in known else len(known)))


def _heading(task: str, source: str) -> str:
    return f"{TASKS.get(task, task)}, {source}"


def _using_plot(results: Results) -> str:
    return f"{results.name}-using.svg"


def plots(results: Sequence[Results]) -> dict[str, Figure]:
    """The figures of the page by file name.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise DataError(f"the plots need matplotlib ({error}). Install it: pip install 'ocrmem[plot]'") from error
    figures = {_using_plot(r): _using_figure(r.data["using"]) for r in results if r.data["using"]}
    if any(r.data["reading"] for r in results):
        figures[READING_PLOT] = _reading_figure(longest_trained(results))
    return figures


def longest_trained(results: Sequence[Results]) -> list[Row]:
    """Rows on reading, of one file for each ratio, to a tenth, and length: a line through adapters of one ratio would
    tell nothing, so of those it is the one with the most steps, and a rival is drawn beside the memory that was
    evaluated with it. The page's tables have all."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for result in sorted(results, key=lambda result: result.data["adapter"]["steps"]):
        reading = result.data["reading"]
        ratios = {(r["source"], r["num_chars"]): round(r["ratio"], 1) for r in reading if r["arm"] == MEMORY_ARM}
        rows: dict[tuple[Any, ...], list[Row]] = {}
        for row in reading:
            key = (row["source"], row["num_chars"])
            rows.setdefault((*key, ratios.get(key)), []).append(row)
        found.update(rows)
    return [row for rows in found.values() for row in rows]


def svg(figure: Figure) -> str:
    """A figure as SVG, without dates and with the same ids every time."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ocrmem", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _using_figure(rows: Sequence[Row]) -> Figure:
    """One panel of bars for each task and source."""
    from matplotlib.figure import Figure

    groups = _by_task(rows)
    height = 0.6 + 0.3 * max(map(len, groups.values()))
    figure = Figure(figsize=(8, height * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for panel, ((task, source), group) in zip(panels, groups.items(), strict=True):
        for place, row in enumerate(group):
            gain = row["gain"]
            if gain is None:
                note = "an end of the scale" if row["arm"] in SCALE_ARMS else "not defined"
                panel.text(0.01, place, note, va="center", fontsize=8, color="#6e7781")
                continue
            colour = "#1a7f37" if row["arm"] == MEMORY_ARM else "#8c959f"
            means, errors = _with_errors([gain])
            panel.barh([place], means, xerr=errors, color=colour, capsize=3)
        panel.set_yticks(range(len(group)), [row["arm"] for row in group])
        panel.set_ylim(len(group) - 0.5, -0.5)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.axvline(1, color="black", linewidth=0.8, linestyle=":")
        panel.set_title(_heading(task, source), loc="left", fontsize=10)
    panels[-1].set_xlabel("G, gain recovered (0: no memory, 1: full text)")
    return figure


def _reading_figure(rows: Sequence[Row]) -> Figure:
    """Token accuracy above character error rate, one column for each length, against the compression ratio."""
    from matplotlib.figure import Figure

    lengths = sorted({row["num_chars"] for row in rows})
    figure = Figure(figsize=(2 + 3 * len(lengths), 6), layout="constrained")
    panels = figure.subplots(2, len(lengths), squeeze=False, sharex=True, sharey="row")
    for number, (arm, source) in enumerate(sorted({(row["arm"], row["source"]) for row in rows})):
        style = {"marker": "os^Dv"[number % 5], "color": f"C{number % 10}", "capsize": 3}
        for column, length in enumerate(lengths):
            line = [row for row in rows if (row["arm"], row["source"], row["num_chars"]) == (arm, source, length)]
            line.sort(key=lambda row: row["ratio"])
            for panel, key in zip(panels[:, column], ("token_accuracy", "cer"), strict=True):
                known = [row for row in line if row[key] is not None]
                means, errors = _with_errors(row[key] for row in known)
                panel.errorbar([row["ratio"] for row in known], means, errors, **style)
        panels[0, 0].plot([], [], label=f"{arm}, {source}", marker=style["marker"], color=style["color"])
    for column, length in enumerate(lengths):
        panels[0, column].set_title(f"{length:,} characters", fontsize=10)
        panels[1, column].set_xlabel("compression ratio")
        if all(row["cer"] is None for row in rows if row["num_chars"] == length):
            centre = panels[1, column].transAxes
            panels[1, column].text(0.5, 0.5, "not read aloud", transform=centre, ha="center", color="#6e7781")
    panels[0, 0].set_ylabel("token accuracy")
    panels[1, 0].set_ylabel("character error rate")
    figure.legend(loc="outside lower center", ncols=min(3, 1 + len(lengths)), fontsize=8)
    return figure


def _with_errors(intervals: Iterable[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Means [N], and how far the intervals reach below and above them [2, N]."""
    rows = [(value["mean"], value["low"], value["high"]) for value in intervals]
    mean, low, high = np.array(rows, dtype=float).reshape(-1, 3).T
    return mean, np.maximum(0, [mean - low, high - mean])


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    print(write_report(*given or (Path("results/fidelity"), Path("docs"))))
