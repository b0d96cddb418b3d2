"""`ocrmem bench`: what full size costs on this machine, ours beside what a user would have instead."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    part: Annotated[str, typer.Argument(help="render, encoder, step, prefill or all; several joined by commas.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results files.")] = Path(
        "benchmarks/results"
    ),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: a GPU where there is one.")] = None,
    small: Annotated[
        bool | None,
        typer.Option("--small/--full", help="Small sizes, to see that it runs. Default: small on the CPU."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time of all parts; rows that come too late are left out.")] = 360.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure rendering, encoding, a training step and the time to the first token, with random weights.

    Each part writes bench-PART.json with device, versions and command, after every row. A row that fails says why, and
    the others go on. Exit code 1: no row gave a figure.
    """
    import torch

    from ocrmem.evaluation.bench.run import PARTS, run_bench
    from ocrmem.model.llm import usable_device

    place = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = run_bench(
        PARTS if part == "all" else part.split(","),
        folder=output,
        device=place,
        small=place.type == "cpu" if small is None else small,
        command=shlex.join(["ocrmem", *sys.argv[1:]]),
        seconds=seconds,
        progress=lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True),
    )
    if as_json:
        print(json.dumps(found))
    if not any("ms" in row for content in found.values() for row in content["rows"]):
        sys.exit(1)
