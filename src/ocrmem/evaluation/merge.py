"""Parts of an evaluation that were run one by one, to one results file."""

from __future__ import annotations

import statistics
from typing import Any

from ocrmem.errors import DataError
from ocrmem.evaluation.report import MEMORY_ARM, check_schema

SAME = ("schema", "probes", "adapter", "device", "versions", "seeds")
"""What must be equal; of the adapter its name and steps."""
TABLES = {
    "reading": ("source", "num_chars", "arm"),
    "using": ("task", "source", "arm"),
    "mean_gain": ("arm",),
    "cost": ("arm", "cached"),
    "left_out": ("arm",),
}
"""Tables, and the fields that tell their rows apart."""

ANSWERED = {"reading": ("cer", "identifier_recall"), "using": ("exact_match", "token_f1", "transcribes")}
"""Fields of tables that come from answers, which a later run need not ask for again."""


def merge_results(before: dict[str, Any], new: dict[str, Any], *, source: str) -> dict[str, Any]:
    """The results in a file with those of further parts: rows of the same name are replaced, the others stay.

    Arms that one of them left out and the other did not are there.

    Args:
        source: the file, for error messages.

    Raises:
        DataError: the file is broken, or of another adapter, device, seeds or versions.
    """
    check_schema(before, source=source)
    for key in SAME:
        given, there = (_identity(results[key]) for results in (new, before))
        if given != there:
            raise DataError(
                f"{source} holds an evaluation with {key} {there}, and these results have {given}; they cannot be one "
                "file. Name another with --output, or remove it."
            )
    merged = {**before, "created": new["created"]}
    later = new["command"].split(" && ")
    earlier = [command for command in before["command"].split(" && ") if command not in later]
    merged["command"] = " && ".join([*earlier, *later])
    merged["rivals"] = list({row["arm"]: row for row in (*before.get("rivals", ()), *new.get("rivals", ()))}.values())
    for table, fields in TABLES.items():
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in (*before[table], *new[table]):
            name = tuple(row[field] for field in fields)
            rows[name] = _with_answers(row, rows[name], ANSWERED.get(table, ())) if name in rows else row
        merged[table] = list(rows.values())
    present = {row["arm"] for table in ("reading", "using") for row in merged[table]}
    merged["left_out"] = [row for row in merged["left_out"] if row["arm"] not in present]
    ratios = [row["ratio"] for row in merged["reading"] if row["arm"] == MEMORY_ARM]
    merged["adapter"] = {**before["adapter"], "memory_ratio": statistics.fmean(ratios) if ratios else 1.0}
    return check_schema(merged, source=source)


def _with_answers(row: dict[str, Any], before: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """A row; where it has no answers, with the `fields` of those to the same probes from before."""
    if any(row[field] is not None for field in fields) or row.get("n") != before.get("n"):
        return row
    return {**row, **{field: before[field] for field in fields}}


def _identity(value: Any) -> Any:
    return {key: value[key] for key in ("name", "steps")} if isinstance(value, dict) and "steps" in value else value
