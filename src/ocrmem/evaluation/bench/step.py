"""Positions a second of a training step with a frozen LLM: ours beside a plain Hugging Face step, then packed rows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from transformers import PreTrainedModel

from ocrmem.data.collator import MEMCollator
from ocrmem.evaluation.bench.flops import step_flops_per_position
from ocrmem.evaluation.bench.models import bench_encoder_of, memory_model, placeholder_id, random_llm, sample
from ocrmem.evaluation.bench.sizes import Sizes
from ocrmem.evaluation.bench.timing import Results, measure, release
from ocrmem.model.llm import compile_layers
from ocrmem.model.mem_model import MEMModel
from ocrmem.model.packed_attention import PACKED

Batch = dict[str, Any]
LOSS_CHUNK_SIZE = 256
"""The default of `loss_chunk_size` in a training config."""
PLAIN, OURS, SHORT = "plain Hugging Face", "ocrmem", "ocrmem, 30% short samples"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One of our ways to do the step."""

    compiled: bool = True
    packed: bool = False
    checkpointing: bool = False
    memory_budget: float = 1.0
    """Of torch's partitioner of compiled layers: below 1 it computes some activations twice to keep less."""

    @property
    def name(self) -> str:
        """Of its row."""
        parts = [
            OURS,
            "compiled" if self.compiled else "",
            "packed" if self.packed else "",
            "checkpointing" if self.checkpointing else "",
            f"memory budget {self.memory_budget}" if self.memory_budget < 1 else "",
        ]
        return ", ".join(part for part in parts if part)


def ways(compiled: bool) -> list[Way]:
    """Our ways; what matters most comes first."""
    if not compiled:
        return [Way(compiled=False), Way(compiled=False, checkpointing=True), Way(compiled=False, packed=True)]
    budgets = [Way(memory_budget=budget) for budget in (0.9, 1.0, 0.7)]
    return [*budgets, Way(checkpointing=True), Way(compiled=False), Way(packed=True)]


def bench_step(results: Results, sizes: Sizes, device: torch.device, tflops: float) -> None:
    """Fill in the rows and ratios of the part."""
    limit = tflops * 1e12 / step_flops_per_position(sizes.llm)
    results.head |= {
        "llm": sizes.llm_name, "weights": "random", "dtype": str(sizes.dtype)[6:], "samples": sizes.batch,
        "positions_per_sample": sizes.positions, "memory_positions_per_sample": sizes.positions // 2,
        "labels_per_sample": sizes.labels, "limit_positions_per_second": round(limit),
        "limit": "matrix product rate / (4 FLOP x weights of the layers and the output layer)",
    }  # fmt: skip
    llm = random_llm(sizes, device)
    # Features are cached in training; the encoder stays out of the GPU, for both sides. It is only made there, faster.
    encoder = bench_encoder_of(sizes, device, attention="reference").cpu()
    release(device)
    encoder_width, per_page = encoder.feature_width, encoder.tokens_per_page
    long = [
        sample(
            sizes,
            positions=sizes.positions,
            memory=sizes.positions // 2,
            labels=sizes.labels,
            tokens_per_page=per_page,
            seed=number,
        )
        for number in range(sizes.batch)
    ]
    count = sizes.batch * sizes.positions

    def fill(row: dict[str, Any], step: Callable[[], Any]) -> None:
        found = measure(step, device, repeats=8, warm_up=3)
        rate = 1e3 * count / found["ms"]
        row |= {"positions_per_second": round(rate, 1), **found, "share_of_limit": round(rate / limit, 4)}

    def plain(name: str, checkpointing: bool) -> None:
        with results.row(name, device, checkpointing=checkpointing) as row, layers_as_they_were(llm):
            results.check_time()
            batch = on_device(MEMCollator(0)(long), encoder_width, per_page, sizes, device)
            fill(row, plain_step(llm, batch, encoder_width, sizes, checkpointing=checkpointing))

    def ours(way: Way) -> None:
        with results.row(way.name, device, **vars(way)) as row:
            results.check_time(needs=15.0 if way.compiled and way != first else 0.0)
            collator = packer(sizes, per_page) if way.packed else MEMCollator(0)
            batch = on_device(collator(long), encoder_width, per_page, sizes, device)
            with layers_as_they_were(llm), torch._functorch.config.patch(activation_memory_budget=way.memory_budget):
                fill(row, our_step(model, batch, way))

    first, *others = ways(sizes.compile_layers)
    plain(PLAIN, False)
    model = memory_model(llm, encoder, sizes)
    ours(first)
    note_ratios(results, [first])
    bench_packing(results, model, sizes, device, ("packed", "padded to the longest of all"))
    plain(f"{PLAIN}, checkpointing", True)
    for way in others:
        ours(way)
    note_ratios(results, [first, *others])
    bench_packing(results, model, sizes, device, ("padded to the longest of each batch",))
    with results.row(f"{OURS}, 8-bit LLM by torchao", device) as row, layers_as_they_were(llm):
        results.check_time()
        quantize_layers(llm)  # for good, so it comes last
        batch = on_device(MEMCollator(0)(long), encoder_width, per_page, sizes, device)
        fill(row, our_step(model, batch, Way(compiled=False)))
    results.ratio(
        "time: checkpointing over none",
        results.find(Way(compiled=sizes.compile_layers, checkpointing=True).name, "ms"),
        results.find(first.name, "ms"),
    )


def quantize_layers(llm: PreTrainedModel) -> None:
    """The layers' weights in 8 bits, as `llm.quantization: torchao-int8` has them.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    for module in llm.modules():
        if isinstance(module, nn.ModuleList):
            quantize_(module, Int8WeightOnlyConfig())


def note_ratios(results: Results, ours: Sequence[Way]) -> None:
    """Ours over the plain step."""
    theirs = results.find(PLAIN, "positions_per_second")
    for way in ours:
        rate = results.find(way.name, "positions_per_second")
        key = way.name
        results.ratio(f"positions_per_second: {key}", rate, theirs)
        results.ratio(f"peak_memory: {key}", results.find(way.name, "peak_gb"), results.find(PLAIN, "peak_gb"))
        results.ratio(f"share_of_limit: {key}", results.find(way.name, "share_of_limit"), 1.0, 4)


class layers_as_they_were:
    """Undo, at the end, what a way did to the LLM: compiled layers, checkpointing, the attention's implementation."""

    def __init__(self, llm: PreTrainedModel) -> None:
        self.llm = llm

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.llm.gradient_checkpointing_disable()
        self.llm.set_attn_implementation("sdpa")
        for module in self.llm.modules():
            vars(module).pop("forward", None)
        self.llm.train(False)


def plain_step(
    llm: PreTrainedModel, batch: Batch, feature_width: int, sizes: Sizes, *, checkpointing: bool
) -> Callable[[], Any]:
    """What a user would write: a projection, `masked_scatter`, the labels passed to the model, AdamW."""
    width, device = sizes.llm["hidden_size"], batch["input_ids"].device
    projection = nn.Sequential(nn.Linear(feature_width, width), nn.GELU(), nn.Linear(width, width))
    projection.to(device, sizes.dtype)
    optimizer = torch.optim.AdamW(projection.parameters(), lr=1e-4)
    if checkpointing:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    llm.train()

    def step() -> None:
        input_ids = batch["input_ids"]
        embeds = llm.get_input_embeddings()(input_ids)
        mask = (input_ids == placeholder_id(sizes))[..., None]
        embeds = embeds.masked_scatter(mask, projection(batch["features"]).to(embeds.dtype))
        loss = llm(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"], use_cache=False
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(model: MEMModel, batch: Batch, way: Way) -> Callable[[], Any]:
    """Forward, backward and AdamW of a `MEMModel`."""
    llm = model.base_llm_model
    if way.packed:
        llm.set_attn_implementation(PACKED)
    if way.compiled:
        compile_layers(llm)
    if way.checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    model.loss_chunk_size = LOSS_CHUNK_SIZE
    fused = batch["input_ids"].is_cuda
    optimizer = torch.optim.AdamW(model.proj.parameters(), lr=1e-4, fused=fused)

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def packer(sizes: Sizes, per_page: int) -> MEMCollator:
    """The collator of packed rows."""
    return MEMCollator(0, packing=True, memory_token_id=placeholder_id(sizes), tokens_per_page=per_page)


def on_device(batch: Batch, feature_width: int, per_page: int, sizes: Sizes, device: torch.device) -> Batch:
    """A collator's batch as `MEMTrainer` gives it to the model: features in place of pages."""
    batch = dict(batch)
    pages, keys = batch.pop("pages", None), batch.pop("page_keys", [])
    if pages is not None:
        torch.manual_seed(1)
        batch["features"] = torch.randn(len(keys), per_page, feature_width, device=device, dtype=sizes.dtype)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def bench_packing(results: Results, model: MEMModel, sizes: Sizes, device: torch.device, wanted: Sequence[str]) -> None:
    """Real positions a second where three samples in ten are short, packed and padded, all of them once."""
    feature_width, per_page = model.ocr_embed.feature_width, model.ocr_embed.tokens_per_page
    samples = mixture(sizes, per_page)
    real = sum(len(one["input_ids"]) for one in samples)
    longest = sizes.positions
    even, ragged = MEMCollator(0, pad_to_multiple_of=longest), MEMCollator(0)
    plans = (
        ("packed", packer(sizes, per_page), packed_plan(samples, sizes.batch * longest)),
        ("padded to the longest of all", even, in_order(samples, sizes.batch)),
        ("padded to the longest of each batch", ragged, in_order(samples, sizes.batch)),
    )
    about = {"samples": len(samples), "short_samples": sum(len(one["input_ids"]) < longest for one in samples)}
    for name, collator, plan in plans:
        if name not in wanted:
            continue
        as_they_were = layers_as_they_were(model.base_llm_model)
        way = Way(compiled=sizes.compile_layers, packed=collator.packing)
        with results.row(f"{SHORT}, {name}", device, **vars(way), **about) as row, as_they_were:
            results.check_time()
            batches = [on_device(collator(part), feature_width, per_page, sizes, device) for part in plan]
            run = steps_over(model, batches, way)
            shapes = {tuple(batch["input_ids"].shape): number for number, batch in enumerate(batches)}
            for number in (*shapes.values(), 0):
                run(number)
            seconds = timed(functools.partial(run_all, run, len(batches)), device)
            row |= {
                "ms": round(1e3 * seconds, 1),
                "positions_per_second": round(real / seconds, 1),
                "positions_run": sum(batch["input_ids"].numel() for batch in batches),
                "positions": real,
                "steps": len(batches),
            }
    packed = results.find(f"{SHORT}, packed", "positions_per_second")
    for other in set(wanted) - {"packed"}:
        results.ratio(f"packed over {other}", packed, results.find(f"{SHORT}, {other}", "positions_per_second"))


def steps_over(model: MEMModel, batches: Sequence[Batch], way: Way) -> Callable[[int], None]:
    """A step on the batch of that number; layers are compiled once."""
    current: Batch = dict(batches[0])
    step = our_step(model, current, way)

    def run(number: int) -> None:
        current.clear()
        current.update(batches[number])
        step()

    return run


def run_all(run: Callable[[int], None], count: int) -> None:
    """Every step once."""
    for number in range(count):
        run(number)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def mixture(sizes: Sizes, per_page: int) -> list[dict[str, Any]]:
    """Long samples and short ones without memory, in a random order that is always the same."""
    kinds = [False] * sizes.long_samples + [True] * sizes.short_samples
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        sample(
            sizes,
            positions=sizes.short_positions if kinds[index] else sizes.positions,
            memory=0 if kinds[index] else sizes.positions // 2,
            labels=sizes.short_positions // 4 if kinds[index] else sizes.labels,
            tokens_per_page=per_page,
            seed=index,
        )
        for index in order
    ]


def in_order(samples: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Batches of `size` samples as they come."""
    return [samples[begin : begin + size] for begin in range(0, len(samples), size)]


def packed_plan(samples: Sequence[dict[str, Any]], length: int) -> list[list[dict[str, Any]]]:
    """Samples dealt out to rows of at most `length` positions: the longest first, each into the first row with room."""
    rows: list[list[dict[str, Any]]] = []
    room: list[int] = []
    for one in sorted(samples, key=lambda one: -len(one["input_ids"])):
        size = len(one["input_ids"])
        place = next((row for row, left in enumerate(room) if left >= size), None)
        if place is None:
            rows.append([])
            room.append(length)
            place = len(rows) - 1
        rows[place].append(one)
        room[place] -= size
    return rows
