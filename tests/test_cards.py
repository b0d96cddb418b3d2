"""The model cards of the shipped adapters say what the results files say."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIGURES = ("token_accuracy", "cer", "ce", "token_f1")


@pytest.mark.parametrize("name", ["smollm2-pp-ocr-2x", "smollm2-pp-ocr-4x"])
def test_the_figures_of_a_card(name):
    files = sorted((ROOT / "results" / "fidelity").glob(f"{name}*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    manifest = json.loads((ROOT / "adapters" / name / "training_manifest.json").read_text(encoding="utf-8"))
    assert {result["adapter"]["steps"] for result in results} == {manifest["steps"]}
    measured = set()
    for row in (row for result in results for table in ("reading", "using") for row in result[table]):
        what = f"{row['num_chars']:,} characters" if "num_chars" in row else row["task"]
        ratio = [f"{row['ratio']:.2f}×"] if "num_chars" in row else []
        figures = [interval(row[figure]) for figure in FIGURES if figure in row]
        measured.add((f"{what}, {row['source']}", row["arm"], *ratio, *figures))
    card = (ROOT / "adapters" / name / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("|")]
    cells = [tuple(cell.strip() for cell in line) for line in lines]
    rows = {row for row in cells if row[1] not in ("read from", "context", "---")}
    assert len(rows) > 20
    assert rows <= measured


def interval(value):
    return "–" if value is None else f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
