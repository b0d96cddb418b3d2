"""The benchmarks' jobs: every command is one that the command line and the configs know."""

import dataclasses
import json
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

    configs, longer = trainings(), trainings(scale=0.5)
    for ratio in ("2x", "4x"):
        memory, whole = configs[f"{ratio}-memory"], configs[f"smollm2-pp-ocr-{ratio}"]
        assert memory.objectives.stages[-1].tasks == whole.objectives.stages[-1].tasks
        assert memory.projection == whole.projection
        for kind in fidelity["RIVALS"]:
            rival = configs[f"{ratio}-{kind}"]
            assert rival.adapter == (f"runs/2x-{kind}/adapter" if ratio == "4x" else None)
            assert rival.objectives.features == kind
            assert rival.objectives.stages == memory.objectives.stages
            assert rival.projection == memory.projection
            assert rival.training == memory.training
    whole = configs["smollm2-pp-ocr-2x"]
    assert longer["smollm2-pp-ocr-2x"] == whole
    half = whole.objectives.total_steps / 2
    assert longer["2x-mean-pooling"].objectives.total_steps == pytest.approx(half, abs=500)  # the warm start
    for config in configs.values():
        if config.output_dir.startswith("runs/smollm2"):
            continue
        total, every = config.objectives.total_steps, config.training["eval_steps"]
        assert total % every < 4, config.output_dir
        assert total // every == fidelity["EVALUATIONS"], config.output_dir
    for start, names in (("2x-memory", fidelity["ABLATIONS"]), ("2x-more-whole", fidelity["OBJECTIVES"])):
        full = configs[start]
        for name in set(names) - {"whole"}:
            left_out = configs[f"2x-{name}" if start == "2x-memory" else f"2x-more-{name}"]
            assert (left_out.objectives, left_out.projection, left_out.optimizer) != (
                full.objectives,
                full.projection,
                full.optimizer,
            ), name
        assert len(names) > 5


def test_the_list_of_jobs_can_be_pasted_into_a_shell():
    def run(*arguments):
        command = [sys.executable, "benchmarks/fidelity.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    listed = run("--list", "--only", "eval-4x", "2x-adamw")
    assert listed.returncode == 0, listed.stderr
    for line in listed.stdout.splitlines():
        assert shlex.split(line.partition(": ")[2])[0] == "ocrmem"
    assert "--rival=mean-pooling=runs/4x-mean-pooling/adapter" in listed.stdout
    unknown = run("--list", "--only", "eval-8x")
    assert unknown.returncode == 1
    assert "no job eval-8x; --list shows them" in unknown.stderr


def test_an_evaluation_does_not_need_every_rival(fidelity):
    (job,) = [job for job in fidelity["all_jobs"]() if job.name == "eval-2x"]
    left = fidelity["without_rivals"](job, ["2x-mean-pooling", "4x-convolution"]).command
    assert set(job.command) - set(left) == {"--rival=mean-pooling=runs/2x-mean-pooling/adapter"}
    assert fidelity["without_rivals"](job, []).command == job.command


@pytest.mark.parametrize(("codes", "well"), [([-6, -6, 0], True), ([1], False), ([-9] * 5, False)])
def test_a_training_that_was_ended_by_a_signal_is_begun_again(fidelity, tmp_path, monkeypatch, codes, well):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fidelity["run"].__globals__, "device_name", lambda _: "a GPU")
    left = list(codes)

    def ended(command, **_):
        return subprocess.CompletedProcess(command, left.pop(0), stdout='one line\n{"steps": 7}')

    monkeypatch.setattr(subprocess, "run", ended)
    job = fidelity["Job"]("name", ("train", "config"), Path("adapter"), log=Path("log.json"))
    assert fidelity["run"](job, 0) is well
    assert left == []
    assert (Path("log.json").exists() and json.loads(Path("log.json").read_text())["steps"] == 7) is well
    evaluation = dataclasses.replace(job, log=None)
    left.append(-6)
    assert fidelity["run"](evaluation, 0) is False  # what it measured is kept, and a GPU's memory may be too small
