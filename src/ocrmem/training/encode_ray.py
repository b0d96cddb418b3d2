"""`ocrmem encode --ray`: the same blocks, encoded by the workers of a Ray cluster with Ray Data.

The workers must see the same files as the driver: the conversations, the weights and the feature cache lie on a
file system that all of them mount.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from ocrmem.config.train import TrainConfig
from ocrmem.errors import ConfigError, OcrmemError
from ocrmem.training.encode import (
    BATCH_SIZE,
    PAGES_PER_SHARD,
    BlockEncoder,
    BlockResult,
    EncodeResult,
    Progress,
    summary,
)
from ocrmem.training.hardware import own_device


def encode_on_ray(
    config: TrainConfig,
    *,
    address: str,
    num_workers: int | None = None,
    batch_size: int = BATCH_SIZE,
    pages_per_shard: int = PAGES_PER_SHARD,
    progress: Progress = lambda *_: None,
) -> EncodeResult:
    """Encode the pages of a config on a Ray cluster; see `encode.encode`.

    A worker that dies is replaced, and its block encoded again; blocks that are written stay.

    Args:
        address: of the cluster; `auto`: the one of this machine; `local`: a new one on this machine.
        num_workers: workers; None: one for each GPU of the cluster, or for each CPU where it has none.

    Raises:
        ConfigError: Ray is not installed, or no cluster is at that address.
    """
    ray = _import_ray()
    start = time.monotonic()
    driver = BlockEncoder(config, batch_size=batch_size, pages_per_shard=pages_per_shard)
    driver.prepare()
    mine = not ray.is_initialized()
    try:
        ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"no Ray cluster could be reached with --ray {address}: {reason}. Give its address, auto on a machine of "
            "the cluster, or local to start one here."
        ) from error
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        size = num_workers or gpus or max(1, int(resources.get("CPU", 1)))
        results, done, pages = [], 0, 0
        for row in _rows(ray, config, len(driver.blocks), size, gpus, batch_size, pages_per_shard):
            results.append(BlockResult(pages=int(row["pages"]), encoded=int(row["encoded"]), size=int(row["size"])))
            done, pages = done + 1, pages + results[-1].encoded
            progress(done, len(driver.blocks), pages)
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OcrmemError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            raise cause from error
        raise
    finally:
        if mine:
            ray.shutdown()
    return summary(results, driver.shards.folder, seconds=time.monotonic() - start, workers=size)


def _import_ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"--ray needs Ray ({error}); install it with `pip install ocrmem[ray]`.") from None
    return ray


def _rows(
    ray: Any, config: TrainConfig, num_blocks: int, size: int, gpus: int, batch_size: int, pages_per_shard: int
) -> Any:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    threads = os.environ.get("OMP_NUM_THREADS")
    # Not `range`: its reading would be a task of its own, which waits for a CPU that the workers hold.
    blocks = ray.data.from_items([{"id": number} for number in range(num_blocks)], override_num_blocks=num_blocks)
    encoded = blocks.map_batches(
        _Worker,
        fn_constructor_kwargs={
            "config": config,
            "options": {"batch_size": batch_size, "pages_per_shard": pages_per_shard},
        },
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size),
        num_gpus=min(1.0, gpus / size) if gpus else 0,
        num_cpus=1,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}} if threads else None,
    )
    return encoded.iter_rows()


class _Worker:
    """One worker: loads the encoder once, then encodes block after block."""

    def __init__(self, config: TrainConfig, options: dict[str, int]) -> None:
        self.encoder = BlockEncoder(config, device=own_device(), **options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = [dataclasses.asdict(self.encoder.run(int(number))) for number in batch["id"]]
        return {name: [result[name] for result in results] for name in results[0]}
