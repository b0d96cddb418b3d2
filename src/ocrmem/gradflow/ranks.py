"""Distributed runs: what each process saw, told to the others before anything can hang.

One process whose batch has no memory leaves the others waiting in a collective for a gradient or a weight
that never comes. The probe therefore exchanges facts on a channel of its own: before each sharded module
gathers its weights, and once more before the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ocrmem.gradflow.report import ParallelFacts, RankFacts, Wrapper
from ocrmem.gradflow.target import unwrap

TIMEOUT = timedelta(seconds=60)
"""How long a process waits for the others' facts; they come right after their own forward."""

_END = "(the end of the forward)"


class CollectivesDiffer(Exception):
    """The processes are about to gather different modules. Caught by the probe."""

    def __init__(self, places: list[str]) -> None:
        super().__init__(", ".join(places))
        self.places = tuple(places)


class Ranks:
    """The processes that run the probe together; a single one if torch.distributed is not in use."""

    def __init__(self, model: nn.Module) -> None:
        self.active = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.active else 0
        self.wrapper: Wrapper = _wrapper(model)
        self.find_unused = (
            bool(model.find_unused_parameters) if isinstance(model, nn.parallel.DistributedDataParallel) else None
        )
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.active else None
        self._names = {module: name or "(model)" for name, module in unwrap(model).named_modules()}
        self._sharded = {module for module in model.modules() if _is_sharded(module)} if self.active else set()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        if not self.active:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def comparing_collectives(self) -> Iterator[None]:
        """Raise `CollectivesDiffer` on every process before one of them gathers a module that another does
        not."""
        handles = [module.register_forward_pre_hook(self._meet, prepend=True) for module in self._sharded]
        try:
            yield
            if handles:
                self._compare(_END)
        finally:
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        """Give the channel back."""
        if isinstance(self._group, dist.ProcessGroup):
            dist.destroy_process_group(self._group)

    def facts(self, ranks: tuple[RankFacts, ...], *, skipped: bool, places: tuple[str, ...] | None) -> ParallelFacts:
        """For the report."""
        return ParallelFacts(
            wrapper=self.wrapper,
            rank=self.rank,
            find_unused_parameters=self.find_unused,
            ranks=ranks,
            backward_skipped=skipped,
            collectives_differ=places,
        )

    def _meet(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._compare(self._names.get(module, "(wrapper)"))

    def _compare(self, place: str) -> None:
        with torch._C.DisableTorchFunction():
            places = self.gather(place)
        if len(set(places)) > 1:
            raise CollectivesDiffer(places)


def would_hang(ranks: tuple[RankFacts, ...], *, find_unused: bool | None) -> bool:
    """Whether a backward would leave some process waiting: not all of them have the same gradients to
    reduce."""
    if len(ranks) < 2:
        return False
    able = {fact.loss_requires_grad and fact.error is None for fact in ranks}
    # DDP without find_unused_parameters waits for every single tensor, otherwise for a process's first one.
    reaching = {fact.reached if find_unused is False else bool(fact.reached) for fact in ranks}
    return len(able) > 1 or len(reaching) > 1


def _wrapper(model: nn.Module) -> Wrapper:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "DDP"
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    if "FullyShardedDataParallel" in kinds:
        return "FSDP1"
    return "FSDP2" if "FSDPModule" in kinds else "none"


def _is_sharded(module: nn.Module) -> bool:
    return any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__)
