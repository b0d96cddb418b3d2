"""Everything behind docs/fidelity.md: memories, their trained rivals and ablations, then the evaluation.

    python benchmarks/fidelity.py --gpus 2                      # all of it
    python benchmarks/fidelity.py --gpus 2 --only 2x-mean-pooling 2x-convolution eval-2x
    python benchmarks/fidelity.py --list                        # the jobs, and the command of each

The memory and the rivals of 4x go on from those of 2x.

A job runs as a process of its own on the next free GPU. Without `--only`, a job whose output is there already is left
out; a training that was stopped goes on where it was. Training logs go to `results/training` and `results/ablation`,
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
from dataclasses import dataclass
from pathlib import Path

from ocrmem.config.train import load_train_config
from ocrmem.files import write_text

RATIOS = ("2x", "4x")
RIVALS = ("mean-pooling", "convolution")
ABLATIONS: dict[str, tuple[str, ...]] = {
    "full-recipe": (),
    "no-lexicon": ("objectives.lexicon=0",),
    "no-warm-start": ("objectives.warm_start_steps=0",),
    "no-gain": ("projection.gain=false",),
    "no-merge": ("projection.merge=false",),
    "no-merged-layers": ("projection.merged_layers=0",),
    "adamw": ("optimizer=null", "training.learning_rate=1.0e-3"),
    "no-distillation": ("distillation=0",),
    "reconstruction-alone": ("tasks=reconstruction",),
    "no-curriculum": ("stages=last",),
}
"""What is left out, as overrides of the 2x config; those of `CURRICULUM` change its stages."""
CURRICULUM = ("distillation", "tasks", "stages")
ABLATION_SCALE = 0.2
"""Steps of an ablation, as a share of the whole recipe's."""


@dataclass(frozen=True)
class Job:
    """One process."""

    name: str
    command: tuple[str, ...]
    output: Path
    """What it leaves; it is done where this is there."""
    after: tuple[str, ...] = ()
    """Jobs whose outputs it reads."""
    log: Path | None = None
    """Where what it prints is kept, with the command: a training's log."""


def train_job(name: str, ratio: str, overrides: tuple[str, ...], log: Path, *, start: str | None = None) -> Job:
    """A training by the config of a ratio, from the adapter of the job `start` if given."""
    config = f"configs/smollm2-pp-ocr-{ratio}.yaml"
    begin = () if start is None else (f"adapter=runs/{start}/adapter",)
    command = ("train", config, f"output_dir=runs/{name}", *begin, *overrides, "training.disable_tqdm=true", "--json")
    output = Path("runs") / name / "adapter" / "adapter.safetensors"
    return Job(name, command, output, after=() if start is None else (start,), log=log / f"{name}.json")


def shorter(ratio: str, overrides: tuple[str, ...], scale: float) -> tuple[str, ...]:
    """Overrides for a shorter run with the same shape, its curriculum changed as `ABLATIONS` says."""
    config = load_train_config(Path(f"configs/smollm2-pp-ocr-{ratio}.yaml"))
    assert config.objectives is not None
    stages = [dataclasses.asdict(stage) for stage in config.objectives.stages]
    plain = [override for override in overrides if override.partition("=")[0] not in CURRICULUM]
    if "stages=last" in overrides:
        total = sum(stage["steps"] for stage in stages)
        stages = [{**stages[-2], "steps": total - stages[-1]["steps"]}, stages[-1]]
    for stage in stages:
        stage["steps"] = max(1, round(stage["steps"] * scale))
        if "distillation=0" in overrides:
            stage["distillation"] = 0.0
        if "tasks=reconstruction" in overrides:
            stage["tasks"] = {"reconstruction": 1.0}
    warm = [f"objectives.warm_start_steps={round(config.objectives.warm_start_steps * scale)}"]
    decay = f"training.lr_scheduler_kwargs.num_decay_steps={stages[-1]['steps']}"
    warm = [] if any("warm_start_steps" in override for override in plain) else warm
    return (f"objectives.stages={json.dumps(stages)}", decay, *warm, *plain)


def all_jobs(rival_scale: float = 1.0) -> list[Job]:
    """Every job, in the order in which it is best begun.

    Args:
        rival_scale: steps of a rival, as a share of the memory's.
    """
    training, ablation = Path("results/training"), Path("results/ablation")
    jobs = []
    for features in ("ocr", *RIVALS):
        for ratio in RATIOS:
            name, before = (job_name(features, which) for which in (ratio, RATIOS[0]))
            overrides = () if features == "ocr" else (f"objectives.features={features}",)
            cut = () if features == "ocr" or rival_scale == 1 else shorter(ratio, (), rival_scale)
            start = None if ratio == RATIOS[0] else before
            jobs.append(train_job(name, ratio, (*overrides, *cut), training, start=start))
    for ratio in RATIOS:
        name = f"smollm2-pp-ocr-{ratio}"
        shipped = Path("adapters") / name
        adapter = shipped if shipped.exists() else Path("runs") / name / "adapter"
        rivals = [part for kind in RIVALS for part in ("--rival", f"{kind}=runs/{ratio}-{kind}/adapter")]
        output = Path("results/fidelity") / f"{name}.json"
        command = ("eval", str(adapter), *rivals, "--device", "cuda", "--dtype", "bfloat16", "-o", str(output))
        needed = [f"{ratio}-{kind}" for kind in RIVALS] + ([] if shipped.exists() else [name])
        jobs.append(Job(f"eval-{ratio}", command, output, after=tuple(needed)))
    jobs += [
        train_job(f"ablation-{name}", "2x", shorter("2x", overrides, ABLATION_SCALE), ablation)
        for name, overrides in ABLATIONS.items()
    ]
    return jobs


def job_name(features: str, ratio: str) -> str:
    """Of a training."""
    return f"smollm2-pp-ocr-{ratio}" if features == "ocr" else f"{ratio}-{features}"


def run(job: Job, gpu: int) -> bool:
    """Run a job on a GPU; whether it went well."""
    folder = Path("runs/logs")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    with (folder / f"{job.name}.err").open("w") as errors:
        command = [sys.executable, "-m", "ocrmem", *job.command]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
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
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of jobs; without it, all")
    parser.add_argument("--rival-scale", type=float, default=1.0, help="share of the steps of the rivals")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    jobs = all_jobs(options.rival_scale)
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
            for name in job.after:
                if name in finished:
                    finished[name].wait()
            if not run(job, gpu):
                failed.append(job.name)
            finished[job.name].set()

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in range(options.gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; runs/logs has what they said.")


if __name__ == "__main__":
    main()
