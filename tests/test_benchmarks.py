"""The benchmarks' jobs: every command is one that the command line and the configs know."""

import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ocrmem.config.train import load_train_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def fidelity():
    return runpy.run_path(str(ROOT / "benchmarks" / "fidelity.py"))


def test_trainings_of_the_results_page_have_the_recipe_and_ablations_leave_something_out(fidelity, monkeypatch):
    monkeypatch.chdir(ROOT)

    def trainings(**arguments):
        configs = {}
        for job in fidelity["all_jobs"](**arguments):
            if job.command[0] == "train":
                overrides = [part for part in job.command[2:] if "=" in part]
                configs[job.name] = load_train_config(Path(job.command[1]), overrides)
        return configs

    configs, halved = trainings(), trainings(rival_scale=0.5)
    for ratio in ("2x", "4x"):
        memory = configs[f"smollm2-pp-ocr-{ratio}"]
        for kind in fidelity["RIVALS"]:
            rival = configs[f"{ratio}-{kind}"]
            assert rival.adapter == (f"runs/2x-{kind}/adapter" if ratio == "4x" else None)
            assert rival.objectives.features == kind
            assert rival.objectives.stages == memory.objectives.stages
            assert rival.projection == memory.projection
            assert rival.training == memory.training
    steps = configs["2x-mean-pooling"].objectives.total_steps
    assert halved["2x-mean-pooling"].objectives.total_steps == pytest.approx(steps / 2, abs=3)
    assert halved["smollm2-pp-ocr-2x"] == configs["smollm2-pp-ocr-2x"]
    memory, whole = configs["smollm2-pp-ocr-2x"], configs["ablation-full-recipe"]
    scale = fidelity["ABLATION_SCALE"]
    assert whole.objectives.total_steps == pytest.approx(scale * memory.objectives.total_steps, abs=3)
    ablations = [name for name in configs if name.startswith("ablation-")]
    assert len(ablations) == len(fidelity["ABLATIONS"]) > 5
    for name in set(ablations) - {"ablation-full-recipe"}:
        left_out = configs[name]
        assert (left_out.objectives, left_out.projection, left_out.optimizer) != (
            whole.objectives,
            whole.projection,
            whole.optimizer,
        ), name


def test_the_list_of_jobs_can_be_pasted_into_a_shell():
    def run(*arguments):
        command = [sys.executable, "benchmarks/fidelity.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    listed = run("--list", "--only", "eval-4x", "ablation-adamw")
    assert listed.returncode == 0, listed.stderr
    for line in listed.stdout.splitlines():
        assert shlex.split(line.partition(": ")[2])[0] == "ocrmem"
    assert "--rival mean-pooling=runs/4x-mean-pooling/adapter" in listed.stdout
    unknown = run("--list", "--only", "eval-8x")
    assert unknown.returncode == 1
    assert "no job eval-8x; --list shows them" in unknown.stderr
