"""`ocrmem encode`: the feature cache of a training config, written ahead."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def command(
    config: Annotated[Path, typer.Argument(help="YAML config of a training run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings that replace the config's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: this process's own GPU, or cpu.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pages that the encoder is given at once.")] = 16,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Encode on a Ray cluster: its address, auto, or local to start one."),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(min=1, help="Workers on the Ray cluster; default: one for each GPU, or CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Encode every page that `ocrmem train CONFIG` will ask for, into the feature cache that it reads.

    Started again after a kill, the same command goes on with what is missing. Several processes write the same files:
    torchrun --nproc-per-node 8 -m ocrmem encode CONFIG
    """
    from ocrmem.config.train import load_train_config
    from ocrmem.errors import ConfigError
    from ocrmem.training.workers import Workers

    settings = load_train_config(config, overrides or [])
    if ray_workers is not None and ray is None:
        raise ConfigError("--ray-workers is for a Ray cluster; give --ray ADDRESS with it, or leave it out.")
    workers = Workers()
    progress = _Progress(quiet=workers.rank > 0)
    try:
        if ray is not None:
            from ocrmem.training.encode_ray import encode_on_ray

            result = encode_on_ray(
                settings, address=ray, num_workers=ray_workers, batch_size=batch_size, progress=progress
            )
        else:
            from ocrmem.training.encode import encode
            from ocrmem.training.hardware import own_device

            result = encode(
                settings, device=own_device(device), batch_size=batch_size, workers=workers, progress=progress
            )
    finally:
        progress.close()
    if workers.rank == 0:
        print(json.dumps(result.as_json()) if as_json else result)


class _Progress:
    """A bar on stderr, or a line every half minute where no terminal is."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=sys.stderr)
        self._lines = not quiet and not console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or self._lines,
        )
        self._bar = self._bars.add_task("shards", total=None)
        self._said = time.monotonic()
        self._bars.start()

    def __call__(self, blocks: int, total: int, pages: int) -> None:
        self._bars.update(self._bar, completed=blocks, total=total, description=f"{pages} pages, shards")
        if self._lines and time.monotonic() - self._said > 30:
            self._said = time.monotonic()
            print(f"{blocks} of {total} shards, {pages} pages encoded", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bars.stop()
