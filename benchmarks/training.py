"""Label tokens a second of a training run with objectives, and where the GPU's and the host's time goes.

    python benchmarks/training.py configs/smollm2-pp-ocr-2x.yaml feature_cache=features

Builds the run of the config and goes to the stage asked for (by default the one before the last, which is
reconstruction alone at the full compression; `--warm-start` for the steps before the first), times `STEPS` steps after
`WARM_UP`, and lets torch's profiler watch `PROFILED` more. Writes `benchmarks/results/training.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from ocrmem import __version__
from ocrmem.config.train import load_train_config
from ocrmem.files import write_text
from ocrmem.training.build_objectives import build_objective_trainer

WARM_UP, STEPS, PROFILED = 40, 100, 10
KINDS = (
    ("attention", r"flash|fmha|attn|attention"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|splitK|cublas"),
    ("cross entropy", r"softmax|nll_loss|cross_entropy|logsumexp"),
    ("compiled element-wise", r"^triton_"),
    ("copies and gathers", r"[Mm]em(cpy|set)|index|gather|scatter|copy|cat_array|CatArray"),
    ("other", r""),
)
"""Kernels by a part of their name; the first that fits."""


class Watch(TrainerCallback):
    """Times steps after the warm-up, profiles some more, then ends the run."""

    def __init__(self) -> None:
        self.begun = self.first = self.mean_seconds = self.profiled_seconds = 0.0
        kinds = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """After each optimizer step."""
        step = state.global_step
        if step == WARM_UP + STEPS:
            torch.cuda.synchronize()
            self.mean_seconds = (time.perf_counter() - self.first) / STEPS
            self.profiler.start()
            self.begun = time.perf_counter()
        elif step == WARM_UP + STEPS + PROFILED:
            torch.cuda.synchronize()
            self.profiled_seconds = time.perf_counter() - self.begun
            self.profiler.stop()
            control.should_training_stop = True
        elif step == WARM_UP:
            torch.cuda.synchronize()
            self.first = time.perf_counter()
        return control


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--stage", type=int, default=-2, help="which stage of the curriculum, as a Python index")
    parser.add_argument("--warm-start", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU is visible; this benchmark times one.")
    config = load_train_config(options.config, [*options.overrides, "output_dir=runs/benchmark"])
    assert config.objectives is not None
    stage = dataclasses.replace(config.objectives.stages[options.stage], steps=WARM_UP + STEPS + PROFILED + 1)
    warm = stage.steps if options.warm_start else 0
    objectives = dataclasses.replace(config.objectives, warm_start_steps=warm, stages=(stage,), eval_corpora=())
    training = {**config.training, "save_strategy": "no", "eval_strategy": "no", "logging_steps": 10_000}
    config = dataclasses.replace(config, objectives=objectives, training=training, gradient_check="off")
    trainer, rows = build_objective_trainer(config)
    counts = [len(rows[index].get("task_of_label", ())) for index in range(0, STEPS, 5)]
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    result = {
        "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "versions": {"ocrmem": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "stage": "warm start" if warm else dataclasses.asdict(stage),
        "positions_per_step": objectives.packed_length,
        "labels_per_step": statistics.median(counts),
        "milliseconds_per_step": 1000 * watch.mean_seconds,
        "label_tokens_per_second": statistics.fmean(counts) / watch.mean_seconds,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        "gpu_milliseconds_per_step": by_kind(watch.profiler),
        "host_milliseconds_per_step": longest_on_host(watch.profiler),
        "profiled_milliseconds_per_step": 1000 * watch.profiled_seconds / PROFILED,
    }
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def by_kind(profiler: torch.profiler.profile) -> dict[str, float]:
    """GPU time of a step in milliseconds, by kind of kernel, and in all."""
    totals = {name: 0.0 for name, _ in KINDS}
    for event in profiler.key_averages():
        spent = event.self_device_time_total / 1000 / PROFILED
        if spent:
            totals[next(name for name, pattern in KINDS if re.search(pattern, event.key))] += spent
    return {**totals, "all": sum(totals.values())}


def longest_on_host(profiler: torch.profiler.profile, *, number: int = 12) -> dict[str, float]:
    """The operations with the most time of their own on the host, in milliseconds a step."""
    spent = {event.key: event.self_cpu_time_total / 1000 / PROFILED for event in profiler.key_averages()}
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:number])


if __name__ == "__main__":
    main()
