"""Everything behind docs/fidelity.md: memories, their trained rivals and ablations, then the evaluation.

    python benchmarks/fidelity.py --gpus 0 1                    # all of it
    python benchmarks/fidelity.py --gpus 1 1 --only 2x-memory 2x-mean-pooling 2x-convolution
    python benchmarks/fidelity.py --list                        # the jobs, and the command of each

Rivals, and a memory to compare them with, are trained by the recipe with fewer steps (`--scale`), those of 4x from
those of 2x. Ablations leave a part of that recipe out; those of objectives go on from the compared memory.

A job runs as a process of its own on the next free GPU. Without `--only`, a job whose output is there already is left
out; a training that was stopped goes on where it was. Training logs go to `results/training` and `results/short`,
results of evaluations to `results/fidelity`; `python -m ocrmem.evaluation.report` then makes the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ocrmem.config.objectives import ObjectiveSettings
from ocrmem.config.train import load_train_config
from ocrmem.files import write_text

RATIOS = ("2x", "4x")
RIVALS = ("mean-pooling", "convolution")
COMPARED = {"memory": "ocr", **{kind: kind for kind in RIVALS}}
"""Short runs of each ratio by name, with what their projection reads."""
ABLATIONS: dict[str, tuple[str, ...]] = {
    "no-lexicon": ("objectives.lexicon=0", "objectives.warm_start_lexicon=0"),
    "no-warm-start": ("objectives.warm_start_steps=0",),
    "no-gain": ("projection.gain=false",),
    "no-merge": ("projection.merge=false", "projection.deal_tokens=false"),
    "no-dealing": ("projection.deal_tokens=false",),
    "no-text-layers": ("projection.text_layers=0",),
    "no-reading": (
        "projection.read_tokens=0",
        "projection.deal_tokens=false",
        "projection.text_layers=0",
        "projection.num_layers=2",
    ),
    "no-merged-layers": ("projection.merged_layers=0",),
    "adamw": ("optimizer=null", "training.learning_rate=1.0e-3"),
}
"""What is left out of the 2x recipe, as overrides."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "whole": {},
    "no-reconstruction": {"tasks": ("reconstruction",)},
    "no-questions": {"tasks": ("recall", "cloze")},
    "no-reply": {"tasks": ("reply",)},
    "no-continuation": {"tasks": ("continuation",)},
    "no-distillation": {"distillation": 0.0},
    "no-exact": {"exact": 0.0},
}
"""What is left out of the last stage: tasks, or a value in place of the recipe's."""
SCALE = 0.045
"""Steps of a short run, as a share of the whole recipe's."""
LEAST_STEPS = 300
"""A stage of a short run keeps so many of its steps; the warm start keeps all."""
MORE_STEPS = 400
"""Steps of `OBJECTIVES`."""
EVALUATIONS = 4
"""Of a short run, the last one at its end."""
SAVE_STEPS = 200
"""A short run has a checkpoint so often."""
ATTEMPTS = 5
"""A training that died is begun so often in all, each time from its last checkpoint: rivals' trainings met CUDA errors
that did not come back at the same step (docs/log.md)."""


@dataclass(frozen=True)
class Job:
    """One process."""

    name: str
    command: tuple[str, ...]
    output: Path
    """What it leaves; it is done where this is there."""
    after: tuple[str, ...] = ()
    """Jobs whose outputs it reads; without one of them it is left out."""
    rivals: tuple[str, ...] = ()
    """Jobs of its rivals; without one of them it has one arm less."""
    log: Path | None = None
    """Where what it prints is kept, with the command: a training's log."""


def train_job(name: str, ratio: str, overrides: tuple[str, ...], log: Path, *, start: str | None = None) -> Job:
    """A training by the config of a ratio, from the adapter of the job `start` if given."""
    config = f"configs/smollm2-pp-ocr-{ratio}.yaml"
    begin = () if start is None else (f"adapter=runs/{start}/adapter",)
    command = ("train", config, f"output_dir=runs/{name}", *begin, *overrides, "training.disable_tqdm=true", "--json")
    output = Path("runs") / name / "adapter" / "adapter.safetensors"
    return Job(name, command, output, after=() if start is None else (start,), log=log / f"{name}.json")


def shorter(ratio: str, scale: float, overrides: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Overrides for a run of fewer steps, `overrides` among them."""
    objectives = recipe(ratio, overrides)
    stages = [dataclasses.asdict(stage) for stage in objectives.stages]
    for stage in stages:
        stage["steps"] = min(stage["steps"], max(LEAST_STEPS, round(stage["steps"] * scale)))
    return (*short_run(stages, warm_up=objectives.warm_start_steps), *overrides)


def without(changes: dict[str, Any]) -> tuple[str, ...]:
    """Overrides for `MORE_STEPS` of the last stage of 2x, changed as `OBJECTIVES` says."""
    stage = {**dataclasses.asdict(recipe("2x").stages[-1]), **changes, "steps": MORE_STEPS}
    shares = recipe("2x").stages[-1].tasks
    stage["tasks"] = {task: share for task, share in shares.items() if task not in changes.get("tasks", ())}
    return ("objectives.warm_start_steps=0", *short_run([stage]))


def short_run(stages: list[dict[str, Any]], *, warm_up: int = 0) -> tuple[str, ...]:
    """Overrides: the stages, the last one so much longer that the last evaluation is at the end, the rate falling over
    its second half."""
    stages[-1]["steps"] += -(warm_up + sum(stage["steps"] for stage in stages)) % EVALUATIONS
    total = warm_up + sum(stage["steps"] for stage in stages)
    return (
        f"objectives.stages={json.dumps(stages)}",
        f"training.lr_scheduler_kwargs.num_decay_steps={stages[-1]['steps'] // 2}",
        f"training.eval_steps={total // EVALUATIONS}",
        f"training.save_steps={SAVE_STEPS}",
    )


def recipe(ratio: str, overrides: tuple[str, ...] = ()) -> ObjectiveSettings:
    """Of a ratio's config."""
    objectives = load_train_config(Path(f"configs/smollm2-pp-ocr-{ratio}.yaml"), overrides).objectives
    assert objectives is not None
    return objectives


def all_jobs(scale: float = SCALE) -> list[Job]:
    """Every job, in the order in which it is best begun.

    Args:
        scale: steps of a short run, as a share of the whole recipe's.
    """
    training, short = Path("results/training"), Path("results/short")
    jobs = []
    for ratio in RATIOS:
        start = None if ratio == RATIOS[0] else "smollm2-pp-ocr-2x"
        jobs.append(train_job(f"smollm2-pp-ocr-{ratio}", ratio, (), training, start=start))
    for ratio in RATIOS:
        for name, features in COMPARED.items():
            start = None if ratio == RATIOS[0] else f"{RATIOS[0]}-{name}"
            overrides = shorter(ratio, scale, (f"objectives.features={features}",))
            jobs.append(train_job(f"{ratio}-{name}", ratio, overrides, short, start=start))
    for ratio in RATIOS:
        name = f"smollm2-pp-ocr-{ratio}"
        shipped = Path("adapters") / name
        adapter = shipped if shipped.exists() else Path("runs") / name / "adapter"
        needed = () if shipped.exists() else (name,)
        jobs.append(eval_job(f"eval-{ratio}", adapter, ratio, Path("results/fidelity") / f"{name}.json", needed))
        compared = f"{ratio}-memory"
        output = Path("results/fidelity") / f"{ratio}-same-steps.json"
        jobs.append(
            eval_job(f"eval-{ratio}-same-steps", Path("runs") / compared / "adapter", ratio, output, (compared,))
        )
    for name, overrides in ABLATIONS.items():
        jobs.append(train_job(f"2x-{name}", "2x", shorter("2x", scale, overrides), short))
    for name, changes in OBJECTIVES.items():
        jobs.append(train_job(f"2x-more-{name}", "2x", without(changes), short, start="2x-memory"))
    return jobs


def eval_job(name: str, adapter: Path, ratio: str, output: Path, needed: tuple[str, ...]) -> Job:
    """An evaluation with the rivals of a ratio, after the jobs `needed` too."""
    rivals = [f"--rival={kind}=runs/{ratio}-{kind}/adapter" for kind in RIVALS]
    command = ("eval", str(adapter), *rivals, "--device", "cuda", "--dtype", "bfloat16", "-o", str(output))
    return Job(name, command, output, after=needed, rivals=tuple(f"{ratio}-{kind}" for kind in RIVALS))


def without_rivals(job: Job, lost_jobs: Sequence[str]) -> Job:
    """An evaluation without the rivals that were not trained."""
    lost = [f"=runs/{name}/adapter" for name in job.rivals if name in lost_jobs]
    command = tuple(part for part in job.command if not part.endswith(tuple(lost)))
    return dataclasses.replace(job, command=command)


def run(job: Job, gpu: int) -> bool:
    """Run a job on a GPU; whether it went well."""
    folder = Path("runs/logs")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    command = [sys.executable, "-m", "ocrmem", *job.command]
    with (folder / f"{job.name}.err").open("w") as errors:
        for _ in range(1 if job.log is None else ATTEMPTS):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            if done.returncode >= 0:  # a signal ended it otherwise, as after a CUDA error
                break
    if done.returncode == 0 and job.log is not None:
        result = json.loads(done.stdout[done.stdout.index("{") :])
        shown = shlex.join(["ocrmem", *job.command])
        write_text(job.log, json.dumps({"command": shown, "device": device_name(gpu), **result}) + "\n")
    print(f"{job.name}: {'done' if done.returncode == 0 else f'failed, see {folder / job.name}.err'}", flush=True)
    return done.returncode == 0


def device_name(gpu: int) -> str:
    """What a GPU calls itself."""
    import torch

    return torch.cuda.get_device_name(gpu)


def main() -> None:
    """Run the jobs that are asked for and not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="their numbers, one as often as it has jobs")
    parser.add_argument("--only", nargs="*", help="names of jobs; without it, all")
    parser.add_argument("--scale", type=float, default=SCALE, help="steps of short runs, as a share of the recipe's")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    jobs = all_jobs(options.scale)
    outputs = {job.name: job.output for job in jobs}
    unknown = set(options.only or ()) - {job.name for job in jobs}
    if unknown:
        sys.exit(f"error: no job {', '.join(sorted(unknown))}; --list shows them.")
    jobs = [job for job in jobs if options.only is None or job.name in options.only]
    if options.list:
        for job in jobs:
            print(f"{job.name}{' (done)' if job.output.exists() else ''}: {shlex.join(['ocrmem', *job.command])}")
        return
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    finished = {job.name: threading.Event() for job in jobs}
    failed: list[str] = []
    for job in jobs:
        if options.only is None and job.output.exists():
            finished[job.name].set()
        else:
            waiting.put(job)

    def work(gpu: int) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            for name in (*job.after, *job.rivals):
                if name in finished:
                    finished[name].wait()
            missing = [name for name in job.after if name in failed]
            if missing:
                print(f"{job.name}: left out, {', '.join(missing)} failed", flush=True)
            lost = [name for name in job.rivals if name in failed or not outputs[name].exists()]
            if missing or not run(without_rivals(job, lost), gpu):
                failed.append(job.name)
            finished[job.name].set()

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in options.gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; runs/logs has what they said.")


if __name__ == "__main__":
    main()
