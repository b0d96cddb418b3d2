"""Clocks, memory and the rows of a results file."""

from __future__ import annotations

import gc
import json
import logging
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ocrmem import __version__
from ocrmem.files import write_text

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "triton", "accelerate", "numpy", "bitsandbytes", "torchao", "deepseek-ocr-encoder")


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions, as every results file has them."""
    versions = {"ocrmem": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device.type != "cuda":
        return {"device": f"CPU, {torch.get_num_threads()} threads", "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "device_memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def release(device: torch.device) -> None:
    """Give back what nothing holds any more, so that the next row's peak is its own; forget what was compiled."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    run: Callable[[], Any], device: torch.device, *, repeats: int, warm_up: int = 2, seconds: float = 20.0
) -> dict[str, Any]:
    """Milliseconds of a call (CUDA events on a GPU) and its peak memory.

    Args:
        repeats: calls that are timed; fewer once `seconds` are over, but at least two.
        warm_up: calls before, in which kernels are compiled and chosen.

    Returns:
        `ms` (the median), `ms_least`, `ms_most`, `repeats`, `warm_up_seconds`; on a GPU `peak_gb`, of everything that
        is allocated while it runs, weights and CUDA graphs' memory included, and `own_peak_gb`, without what was there
        before.
    """
    started = time.perf_counter()
    for _ in range(warm_up):
        run()
    _wait(device)
    warmed = time.perf_counter() - started
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < repeats and (len(times) < 2 or time.perf_counter() - started < seconds):
        times.append(_once(run, device))
    found: dict[str, Any] = {
        "ms": round(statistics.median(times), 3),
        "ms_least": round(min(times), 3),
        "ms_most": round(max(times), 3),
        "repeats": len(times),
        "warm_up_seconds": round(warmed, 2),
    }
    if cuda:
        peak = torch.cuda.max_memory_allocated(device) + kept_for_replays(device)
        found |= {"peak_gb": round(peak / 1e9, 3), "own_peak_gb": round((peak - before) / 1e9, 3)}
    return found


def kept_for_replays(device: torch.device) -> int:
    """Bytes of CUDA graphs' pools that no tensor holds: a replay writes there, but torch counts them as allocated only
    while the graph is captured."""
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device.index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _once(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_product_rate(device: torch.device, dtype: torch.dtype, *, size: int) -> dict[str, Any]:
    """FLOP/s of a product of two square matrices: what the arithmetic of everything else is compared with."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    # Long enough for the clocks to settle where they stay under load.
    found = measure(lambda: a @ b, device, repeats=100, warm_up=50)
    tera = 2 * size**3 / found["ms"] / 1e9
    return {"size": size, "dtype": str(dtype).removeprefix("torch."), "ms": found["ms"], "tflops": round(tera, 2)}


@dataclass
class Results:
    """The results file of one part: written anew after each row, so that a crash keeps the rows before it."""

    part: str
    path: Path
    head: dict[str, Any]
    seconds: float
    """Rows that have not begun when so much time is over are left out, and named."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: dict[str, float | None] = field(default_factory=dict)
    progress: Callable[[str], None] = print
    _started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def row(self, name: str, device: torch.device, **about: Any) -> Iterator[dict[str, Any]]:
        """A row that the block fills in. What goes wrong in it is written in the row, and the part goes on."""
        row: dict[str, Any] = {"name": name, **about}
        started = time.perf_counter()
        try:
            yield row
        except Exception as error:  # a benchmark of many ways keeps what it has
            row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            log.info("%s, %s", name, row["error"], exc_info=not isinstance(error, TimeoutError))
            traceback.clear_frames(error.__traceback__)  # they hold the row's tensors
        row["seconds"] = round(time.perf_counter() - started, 1)
        self.rows.append(row)
        self.write()
        self.progress(f"{self.part}: {line(row)}")
        release(device)

    def check_time(self, *, needs: float = 0.0) -> None:
        """Begin a row with this: where the part's time is over, the row is left out.

        Args:
            needs: seconds that the row takes at full size; it is left out, too, where it would end too late.
        """
        used = time.perf_counter() - self._started
        if used > self.seconds:
            raise TimeoutError(f"left out: {self.part} had used its {self.seconds:.0f} s")
        if used + needs > self.seconds:
            raise TimeoutError(f"left out: {self.part} had {self.seconds - used:.0f} s left, of about {needs:.0f} s")

    def find(self, name: str, key: str) -> float | None:
        """A figure of a row; None where the row is missing or failed."""
        value = next((row.get(key) for row in self.rows if row["name"] == name), None)
        return float(value) if isinstance(value, (int, float)) else None

    def ratio(self, name: str, over: float | None, under: float | None, digits: int = 3) -> None:
        """Note `over / under`; None where one is missing."""
        self.ratios[name] = None if over is None or not under else round(over / under, digits)
        self.write()

    def write(self) -> None:
        """Write the file."""
        content = {"part": self.part, **self.head, "ratios": self.ratios, "rows": self.rows}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    shown = {key: value for key, value in row.items() if key in SHOWN and value is not None}
    return f"{row['name']}: " + (row.get("error") or ", ".join(f"{value} {SHOWN[key]}" for key, value in shown.items()))


SHOWN = {
    "pages_per_second": "pages/s",
    "positions_per_second": "positions/s",
    "ms": "ms",
    "tflops": "TFLOP/s",
    "share_of_matrix_product_rate": "of the matrix product rate",
    "share_of_limit": "of the limit",
    "peak_gb": "GB",
    "apart": "from exact",
}
"""Keys that a row's line shows, with what stands behind the figure."""
