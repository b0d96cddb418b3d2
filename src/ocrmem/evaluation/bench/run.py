"""All parts, one after the other, each with a results file of its own."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ocrmem.errors import ConfigError
from ocrmem.evaluation.bench.sizes import Sizes, small_sizes
from ocrmem.evaluation.bench.timing import Results, environment, matrix_product_rate, release

PARTS = {"render": 0.03, "encoder": 0.27, "prefill": 0.15, "step": 0.55}
"""Each part's share of the time. The longest comes last: it has its most important rows first. In 300 s on an H100 the
rows from which ratios are made have room; what only compares, and takes long to compile, is left out first."""


def run_bench(
    parts: Iterable[str],
    *,
    folder: Path,
    device: torch.device,
    small: bool,
    command: str,
    seconds: float = 360.0,
    progress: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Run parts; `folder` gets `bench-PART.json` of each, written after every row.

    Args:
        small: small sizes, which say nothing of full size: for tests, and to see that it runs.
        seconds: of all parts together. A part leaves out the rows that have not begun when its share of what is left is
            over.
        progress: is given a line for each row.

    Returns:
        what the files hold, by part.

    Raises:
        ConfigError: an unknown part.
    """
    wanted = list(parts)
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        raise ConfigError(f"unknown part of the benchmark {', '.join(unknown)}: expected {', '.join(PARTS)} or all.")
    sizes = small_sizes() if small else Sizes()
    product = matrix_product_rate(device, sizes.dtype, size=sizes.product)
    progress(f"matrix product: {product['tflops']} TFLOP/s")
    deadline = time.perf_counter() + seconds
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(wanted):
        share = PARTS[name] / sum(PARTS[later] for later in wanted[number:])
        head = {"command": command, **environment(device), "small": small, "matrix_product": product}
        results = Results(
            part=name,
            path=folder / f"bench-{name}.json",
            head=head,
            seconds=max(0.0, deadline - time.perf_counter()) * share,
            progress=progress,
        )
        try:
            part = importlib.import_module(f"ocrmem.evaluation.bench.{name}")
            getattr(part, f"bench_{name}")(results, sizes, device, product["tflops"])
        except Exception as error:  # a part's models could not be built or imported; the other parts still run
            results.head["error"] = f"{type(error).__name__}: {error}"
            progress(f"{name}: {results.head['error']}")
        results.write()
        release(device)
        found[name] = {"part": name, **results.head, "ratios": results.ratios, "rows": results.rows}
        for key, value in results.ratios.items():
            progress(f"{name}: {key}: {'not measured' if value is None else value}")
    return found
