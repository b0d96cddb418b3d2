"""`ocrmem eval`: how well an adapter reads, and of what use that is, against its rivals."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Results file; None: results/fidelity/ADAPTER.json.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Probes of cued recall and of cloze questions.")] = 400,
    next_turn_samples: Annotated[int, typer.Option(help="Probes of the next turn.")] = 2000,
    reading_chars: Annotated[
        str, typer.Option(help="Lengths of the texts to reconstruct, in characters.")
    ] = "256,1024,4096",
    parts: Annotated[
        str, typer.Option(help="Parts to run; if not all, they replace those of an output file that is there.")
    ] = "reading,using,cost",
    arms: Annotated[
        str, typer.Option(help="Arms of using besides none, full-text, memory and rivals, such as bm25; none: all.")
    ] = "",
    answers: Annotated[bool, typer.Option(help="Answer, and read aloud, too; without, teacher-forced alone.")] = True,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=FOLDER",
            help="A trained rival, mean-pooling or convolution, and its adapter folder; may be given for each.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Type of the LLM: float32, bfloat16. None: as stored.")] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of the GPU's memory to use; less where another process works beside it.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Evaluate on held-out text only, and write a results file.

    What is done so far is kept beside it as `….json.unfinished`. A run of some parts or arms, or without answers, joins
    that file and the results file, if they are there.

    `python -m ocrmem.evaluation.report` makes the page and the plots of all results files.
    """
    import torch
    from rich.progress import Progress

    from ocrmem.errors import ConfigError
    from ocrmem.evaluation.merge import merge_results
    from ocrmem.evaluation.report import read_file
    from ocrmem.evaluation.rivals import parse_rivals
    from ocrmem.evaluation.run import evaluate
    from ocrmem.evaluation.settings import EvalSettings
    from ocrmem.files import write_text
    from ocrmem.model.llm import usable_device

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}: expected float32, bfloat16 or float16.")
    if not 0 < gpu_memory_utilization <= 1:
        raise ConfigError(f"--gpu-memory-utilization {gpu_memory_utilization}: expected more than 0, at most 1.")
    place = usable_device(device)
    if place.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(gpu_memory_utilization, place.index)
    try:
        lengths = tuple(int(part) for part in reading_chars.split(","))
    except ValueError:
        raise ConfigError(f"--reading-chars {reading_chars}: expected numbers, such as 256,1024,4096.") from None
    rivals = parse_rivals(rival or [])
    settings = EvalSettings(
        samples=samples,
        next_turn_samples=next_turn_samples,
        reading_chars=lengths,
        parts=tuple(parts.split(",")),
        arms=tuple(arms.split(",")) if arms else (),
        answers=answers,
    )
    path = output or Path("results/fidelity") / f"{adapter.name}.json"
    unfinished = path.with_name(f"{path.name}.unfinished")
    before = None
    kept = [] if settings.whole else [file for file in (path, unfinished) if file.exists()]
    source = " and ".join(map(str, kept))
    for file in kept:  # what was measured before this run, and before one that was stopped, stays
        found = read_file(file)
        before = found if before is None else merge_results(before, found, source=source)

    def whole(results: dict[str, Any]) -> dict[str, Any]:
        return results if before is None else merge_results(before, results, source=source)

    def keep(results: dict[str, Any]) -> None:
        found = whole(results)
        if results["reading"] or results["using"]:  # else only what was there, which this run's command did not measure
            write_text(unfinished, json.dumps(found, indent=1) + "\n")

    console = _stderr()
    lines = None if console.is_terminal else _Lines()
    with Progress(console=console, transient=True, disable=lines is not None) as bars:
        bar = bars.add_task("", total=None)

        def progress(name: str, done: int, total: int) -> None:
            bars.update(bar, description=name, completed=done, total=total)
            if lines is not None:
                lines(name, done, total)

        results = evaluate(
            adapter,
            settings,
            rivals=rivals,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype),
            progress=progress,
            keep=keep,
        )
    write_text(path, json.dumps(whole(results), indent=1) + "\n")
    unfinished.unlink(missing_ok=True)
    if as_json:
        print(json.dumps(results))
        return
    for row in results["reading"]:
        if row["arm"] == "memory" or row["arm"] in rivals:
            errors = "" if row["cer"] is None else f", character error rate {row['cer']['mean']:.3f}"
            print(
                f"reading {row['num_chars']} characters, {row['source']}, {row['arm']}: {row['ratio']:.2f}x, token "
                f"accuracy {row['token_accuracy']['mean']:.3f}{errors}"
            )
    for row in results["using"]:
        if row["gain"] is not None:
            gain = row["gain"]
            print(
                f"{row['task']}, {row['source']}, {row['arm']}: G {gain['mean']:.3f} "
                f"[{gain['low']:.3f}, {gain['high']:.3f}]"
            )
    print(f"results: {path}")


class _Lines:
    """Progress where no terminal is: a line on stderr for each thing done, with its seconds."""

    def __init__(self) -> None:
        self.since = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        if done == 0 and total:
            self.since = time.monotonic()
        elif done == total:
            print(f"{name}: {total} in {time.monotonic() - self.since:.1f} s", file=sys.stderr, flush=True)


def _stderr():
    from rich.console import Console

    return Console(file=sys.stderr)
