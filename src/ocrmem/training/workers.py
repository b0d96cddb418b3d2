"""Processes that share a list of jobs: claimed one by one, counted together.

They talk through the key-value store of their launcher (`torchrun`, `accelerate launch`), with no process group and so
no collective in which one could wait for another. Without a launcher there is one process.
"""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] - documented
from torch.distributed.rendezvous import rendezvous

from ocrmem.errors import TrainingError

PATIENCE = timedelta(minutes=30)
"""How long the first process waits for another's last job."""


class Workers:
    """The processes of one launch; each makes one.

    Args:
        environment: the launcher's variables (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`); None: `os.environ`.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        values = os.environ if environment is None else environment
        self.rank, self.size = int(values.get("RANK", 0)), int(values.get("WORLD_SIZE", 1))
        self._store: Store | None = None
        self._claimed = 0
        self._counts = [0, 0]
        if self.size > 1:
            store, self.rank, self.size = next(rendezvous("env://", self.rank, self.size))
            self._store = PrefixStore("ocrmem", store)

    def claim(self) -> int:
        """The next job, from 0; every number is given to one process."""
        if self._store is None:
            self._claimed += 1
            return self._claimed - 1
        return self._store.add("claimed", 1) - 1

    def count(self, jobs: int, pages: int) -> tuple[int, int]:
        """Add to what all processes have done; the sums."""
        if self._store is None:
            self._counts = [self._counts[0] + jobs, self._counts[1] + pages]
            return self._counts[0], self._counts[1]
        return self._store.add("jobs", jobs), self._store.add("pages", pages)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank, on the first; on the others their own. Values go through JSON.

        Raises:
            TrainingError: a process did not finish in time.
        """
        if self._store is None or self.rank:
            if self._store is not None:
                self._store.set(f"result{self.rank}", json.dumps(value))
                self._wait(["read"])  # where the first process is the store's home, it must not leave before us
            return [value]
        others = [f"result{rank}" for rank in range(1, self.size)]
        self._wait(others)
        values = [value, *(json.loads(self._store.get(name)) for name in others)]
        self._store.set("read", "1")
        return values

    def _wait(self, names: list[str]) -> None:
        assert self._store is not None
        deadline = time.monotonic() + PATIENCE.total_seconds()
        while not self._store.check(names):
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"process {self.rank} of {self.size} waited {PATIENCE} for another that did not finish. What was "
                    "written is kept; start the same command again to go on."
                )
            time.sleep(0.05)
