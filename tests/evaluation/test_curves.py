"""Learning curves: files of `ocrmem train --json` to the plot and the section of the results page."""

import json
from pathlib import Path

import pytest

from ocrmem.errors import DataError
from ocrmem.evaluation.curves import LOSSES, METRICS, learning_figure, learning_section, read_curves, short_section
from ocrmem.evaluation.report import svg, write_report

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = [
    {"step": 100, "loss": 3.0},
    {"step": 100, **dict.fromkeys(METRICS, 0.25)},
    {"step": 300, **dict.fromkeys(METRICS, 0.75), **dict.fromkeys(LOSSES, 1.5)},
]


def test_a_run_becomes_a_panel_with_its_stages(tmp_path):
    assert read_curves(tmp_path / "none") == {}
    assert learning_section({}) == ()
    run = {"command": "ocrmem train a.yaml --json", "device": "CPU", "log_history": ENTRIES}
    run["stages"] = [{"steps": 100}, {"steps": 200}]
    (tmp_path / "mine.json").write_text(json.dumps(run))
    runs = read_curves(tmp_path)
    (panel,) = learning_figure(runs).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert lines["cloze"] == [[100, 0.25], [300, 0.75]]
    assert [[100, 0], [100, 1]] in lines.values()  # where the first stage ends
    assert panel.get_title() == "mine"
    row = "| mine | 300 | 0.750 | 0.750 | 0.750 | 0.750 | 1.500 | 1.500 | `ocrmem train a.yaml --json` | CPU |"
    assert row in learning_section(runs)
    assert row.replace(" `ocrmem train a.yaml --json` |", "") in short_section(runs)
    assert short_section({}) == ()


def test_a_run_of_one_evaluation_has_a_row_and_no_panel():
    run = {"log_history": ENTRIES}
    short = {"log_history": ENTRIES[:2]}
    (panel,) = learning_figure({"short": short, "long": run}).axes
    assert panel.get_title() == "long"
    assert any(line.startswith("| short | 100 |") for line in learning_section({"short": short, "long": run}))
    (panel,) = learning_figure({"short": short}).axes
    assert panel.get_title() == "short"


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "bad.json").write_text('{"log_history": [{"loss": 1}]}')
    with pytest.raises(DataError, match="bad.json: no learning curve .KeyError: 'step'.; expected what `ocrmem"):
        read_curves(tmp_path)


def test_the_page_in_the_docs_is_made_of_the_results_in_the_repository(tmp_path):
    write_report(ROOT / "results" / "fidelity", tmp_path)
    assert (tmp_path / "fidelity.md").read_text() == (ROOT / "docs" / "fidelity.md").read_text()
    runs = read_curves(ROOT / "results" / "training")
    assert runs
    assert svg(learning_figure(runs)).startswith("<?xml")
    names = {path.name for path in (tmp_path / "fidelity").iterdir()}
    assert names == {path.name for path in (ROOT / "docs" / "fidelity").iterdir()}
