"""`ocrmem train`: train a projection from a YAML config."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    config: Annotated[Path, typer.Argument(help="YAML config; docs/configuration.md lists its keys.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings that replace the config's.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint although settings have changed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train the projection; everything else stays frozen.

    Started again after a kill, the same command goes on from the last checkpoint. Several processes:
    torchrun --nproc-per-node 8 -m ocrmem train CONFIG
    """
    from ocrmem.config.train import load_train_config
    from ocrmem.training.run import train
    from ocrmem.training.trainer import leave_process_group

    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its log; stdout is for the result
        result = train(load_train_config(config, overrides or []), resume=resume)
    leave_process_group()
    losses = [entry["loss"] for entry in result.log_history if "loss" in entry]
    if as_json:
        print(json.dumps(result.as_json()))
        return
    print(f"adapter: {result.adapter}")
    begun = f", {result.resumed_from} of them in earlier pieces" if result.resumed_from else ""
    print(f"steps: {result.steps}{begun}; samples: {result.num_samples}")
    if losses:
        print(f"loss: {losses[0]:.4f} -> {losses[-1]:.4f}")
