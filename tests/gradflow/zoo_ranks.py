"""Table E: two real processes (gloo), rank 1 without memory in its batch; `python
tests/gradflow/zoo_ranks.py`.

Each scenario builds its model on both ranks and lets both run the probe. The broken ones would hang for real;
that none of them does is part of what is shown.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from zoo_parts import Composite, batch

from ocrmem.gradflow.doctor import Subject, make_subject
from ocrmem.gradflow.explain import explain
from ocrmem.gradflow.report import GradientReport


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A two-process case and what both ranks must say."""

    cause: str | None
    verdict: str
    make: Callable[[int], Subject]


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    cause: str | None, verdict: str = "hangs"
) -> Callable[[Callable[[int], Subject]], Callable[[int], Subject]]:
    """Register a scenario; None: healthy."""

    def register(make: Callable[[int], Subject]) -> Callable[[int], Subject]:
        SCENARIOS[make.__name__] = Scenario(cause=cause, verdict="healthy" if cause is None else verdict, make=make)
        return make

    return register


class Anchored(Composite):
    """A batch without memory runs the projection on zeros, at weight 0."""

    place = "loss"

    def zero(self) -> torch.Tensor:
        return 0 * self.proj(self.encoder(torch.zeros(1, 1, 8, 8))).sum()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeds = super().embed(input_ids)
        return embeds + self.zero() if self.place == "embeds" and not self.has_images else embeds

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, images: Any = None) -> Any:
        self.has_images = images is not None
        outputs = super().forward(input_ids, labels, images)
        if self.place == "loss" and images is None:
            outputs.loss = outputs.loss + self.zero()
        return outputs


class WithGate(Composite):
    """A second trainable tensor that every batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().embed(input_ids) * self.gate


class ReentrantProjection(Composite):
    def project(self, features: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.proj, features.requires_grad_(True), use_reentrant=True)


def data_of(rank: int) -> dict[str, torch.Tensor]:
    return batch(images=rank == 0)


def ddp(
    model: nn.Module, rank: int, *, find_unused: bool = False, data: Any = None, trainable: Any = "proj"
) -> Subject:
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    return Subject(model=wrapped, batch=data_of(rank) if data is None else data, trainable=trainable)


def sharded(model: Composite, data: Any) -> Subject:
    for layer in (model.proj, *model.llm.model.layers):
        fully_shard(layer)
    fully_shard(model)
    return Subject(model=model, batch=data, trainable="proj")


@scenario("rank-without-memory")
def ddp_projection_only(rank: int) -> Subject:
    return ddp(Composite(), rank)


@scenario("rank-without-memory")
def ddp_find_unused_does_not_help(rank: int) -> Subject:
    return ddp(Composite(), rank, find_unused=True)


@scenario("rank-outside-graph")
def ddp_with_input_grads(rank: int) -> Subject:
    model = Composite()
    model.llm.enable_input_require_grads()
    return ddp(model, rank)


@scenario("rank-outside-graph")
def ddp_with_input_grads_and_find_unused(rank: int) -> Subject:
    model = Composite()
    model.llm.enable_input_require_grads()
    return ddp(model, rank, find_unused=True)


@scenario("ddp-unused-parameters")
def ddp_second_trainable(rank: int) -> Subject:
    return ddp(WithGate(), rank, trainable=None)


@scenario(None)
def ddp_second_trainable_find_unused(rank: int) -> Subject:
    return ddp(WithGate(), rank, find_unused=True, trainable=None)


@scenario(None)
def ddp_anchor_at_the_loss(rank: int) -> Subject:
    return ddp(Anchored(), rank)


@scenario(None)
def ddp_all_with_memory(rank: int) -> Subject:
    return ddp(Composite(), rank, data=batch())


@scenario("ddp-reentrant-twice", verdict="raises")
def ddp_reentrant_projection(rank: int) -> Subject:
    return ddp(ReentrantProjection(), rank, find_unused=True, data=batch())


@scenario("ranks-gather-differently")
def fsdp2_anchor_at_the_loss(rank: int) -> Subject:
    return sharded(Anchored(), data_of(rank))


@scenario(None)
def fsdp2_anchor_at_the_embeddings(rank: int) -> Subject:
    model = Anchored()
    model.place = "embeds"
    return sharded(model, data_of(rank))


@scenario(None)
def fsdp2_frozen_and_trainable(rank: int) -> Subject:
    return sharded(Composite(), batch())


@scenario("fsdp1-mixed-flat", verdict="raises")
def fsdp1_flattening_frozen_and_trainable(rank: int) -> Subject:
    wrapped = FullyShardedDataParallel(Composite(), use_orig_params=False, device_id=torch.device("cpu"))
    return Subject(model=wrapped, batch=batch(), trainable="proj")


def work(rank: int, folder: str) -> None:
    """One process: all scenarios, one after the other; results go to a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=15)
    )
    results = {}
    for name, case in SCENARIOS.items():
        torch.manual_seed(0)
        made = make_subject(lambda case=case: case.make(rank), target=name)
        report = made if isinstance(made, GradientReport) else made.examine()
        explanation = explain(report)
        results[name] = {
            "cause": explanation.cause,
            "verdict": explanation.verdict,
            "sentence": explanation.sentence,
        }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def run_all() -> list[dict[str, dict[str, Any]]]:
    """Results of rank 0 and rank 1, by scenario."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(folder,), nprocs=2)
        return [json.loads(Path(folder, f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def main() -> int:
    """Print the confusion table of both ranks."""
    first, second = run_all()
    wrong = 0
    print(f"{'scenario':40} {'expected':26} {'rank 0':26} {'rank 1':26}")
    for name, case in SCENARIOS.items():
        good = all(r[name]["cause"] == case.cause and r[name]["verdict"] == case.verdict for r in (first, second))
        wrong += not good
        named = [result[name]["cause"] or result[name]["verdict"] for result in (first, second)]
        print(f"{name:40} {case.cause or 'healthy':26} {named[0]:26} {named[1]:26}{'' if good else '  <--'}")
    for name in SCENARIOS:
        print(f"{name}: {first[name]['sentence']}")
    print(f"{len(SCENARIOS)} scenarios, {wrong} off the diagonal")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
