"""Pages a second of the whole DeepEncoder, every way of ours beside transformers' parts, with the same weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ocrmem.config.encoder import DeepSeekOCRSettings
from ocrmem.config.render import deepseek_ocr_page
from ocrmem.encoders.deepencoder_sam import Block
from ocrmem.encoders.deepseek_ocr import DeepSeekOCREncoder
from ocrmem.encoders.graphs import PLAIN_RUNS
from ocrmem.encoders.sam_attention import Implementation, choose
from ocrmem.errors import ConfigError
from ocrmem.evaluation.bench.deepencoder import TransformersDeepEncoder, random_encoder
from ocrmem.evaluation.bench.flops import clip_flops, sam_flops
from ocrmem.evaluation.bench.sizes import Sizes
from ocrmem.evaluation.bench.timing import Results, measure


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of ours to encode, as `DeepSeekOCRSettings` has it."""

    attention: Implementation
    compile: bool = False
    graphs: bool = False

    @property
    def name(self) -> str:
        """Of its row."""
        return f"ocrmem {self.attention}" + ", compiled" * self.compile + ", graphs" * self.graphs


AUTO = Way(attention="auto", graphs=True)
"""What a user gets who sets nothing."""
WAYS = (
    Way(attention="triton", compile=True), Way(attention="triton", compile=True, graphs=True),
    Way(attention="triton"), Way(attention="folded"), Way(attention="reference"),
)  # fmt: skip
"""What matters most comes first."""
LATER_WAYS = (Way(attention="folded", compile=True), Way(attention="flex", compile=True))
"""Those that take half a minute to compile and are there for comparison."""
WARM_UP = PLAIN_RUNS + 1
"""Calls before those that are timed: in the last of them a graph is captured."""


def bench_encoder(results: Results, sizes: Sizes, device: torch.device, tflops: float) -> None:
    """Fill in the rows and ratios of the part."""
    dtype = sizes.dtype
    pages_PHW = torch.randint(0, 256, (sizes.pages, sizes.page_size, sizes.page_size), dtype=torch.uint8, device=device)
    flops = sam_flops(sizes.sam, sizes.page_size) + clip_flops(sizes.clip, sizes.page_size)
    results.head |= {
        "page_size": sizes.page_size, "batch": sizes.pages, "weights": "random", "dtype": str(dtype)[6:],
        "flops_per_page": flops,
    }  # fmt: skip
    encoder = random_encoder(
        DeepSeekOCRSettings(page_size=sizes.page_size, attention="reference"),
        deepseek_ocr_page(sizes.page_size),
        sizes.sam,
        sizes.clip,
        device=device,
        dtype=dtype,
    )
    exact_PVE = exact_features(encoder, pages_PHW[:1])

    @torch.no_grad()
    def fill(
        row: dict[str, Any],
        run: Callable[[torch.Tensor], torch.Tensor],
        batch: torch.Tensor = pages_PHW,
        *,
        compare: bool = True,
    ) -> None:
        found = measure(lambda: run(batch), device, repeats=10, warm_up=WARM_UP)
        rate = 1e3 * batch.shape[0] / found["ms"]
        row |= {"pages_per_second": round(rate, 2), **found}
        row["share_of_matrix_product_rate"] = round(rate * flops / 1e12 / tflops, 4)
        if compare:
            row["apart"] = apart(run(batch)[:1], exact_PVE)

    with results.row("transformers sdpa", device) as row:
        results.check_time()
        fill(row, TransformersDeepEncoder(encoder, sizes.sam, sizes.clip))

    def fill_ways(ways: tuple[Way, ...], *, needs: float = 0.0) -> None:
        for way in ways:
            about = {"attention": way.attention, "compiled": way.compile, "graphs": way.graphs}
            with results.row(way.name, device, **about) as row:
                results.check_time(needs=needs)
                check_way(way.attention, device, sizes)
                fill(row, captured(variant(encoder, sizes, way), pages_PHW))

    fill_ways(WAYS)
    note_ratios(results)
    with results.row("deepseek-ocr-encoder, one page at a time", device) as row:
        results.check_time()
        # It leaves CLIP's class token out and gives the sum, so its features are others.
        way = from_pypi(TransformersDeepEncoder(encoder, sizes.sam, sizes.clip), device, dtype)
        fill(row, way, pages_PHW[:1], compare=False)
    for batch in sizes.batches:
        with results.row(f"ocrmem auto, batch {batch}", device) as row:
            results.check_time()
            fill(row, variant(encoder, sizes, AUTO), pages_PHW[:batch])
    with results.row("ocrmem, mixed page sizes", device, page_sizes=list(sizes.mixed)) as row:
        results.check_time()
        mixed = [torch.randint(0, 256, (side, side), dtype=torch.uint8, device=device) for side in sizes.mixed]
        with torch.no_grad():
            run = functools.partial(variant(encoder, sizes, AUTO).encode_mixed, mixed)
            found = measure(run, device, repeats=5, warm_up=WARM_UP)
            del run  # it holds the encoder, and so the memory of graphs that later rows do not need
        row |= {"pages_per_second": round(1e3 * len(mixed) / found["ms"], 2), **found}
    attention_rows(results, sizes, device)
    fill_ways(LATER_WAYS, needs=compiling(30.0, device))
    note_ratios(results)


def note_ratios(results: Results) -> None:
    """Our fastest way so far over transformers'."""
    ours = {
        row["name"]: row["pages_per_second"]
        for row in results.rows
        if row["name"].startswith("ocrmem") and "pages_per_second" in row
    }
    best = max(ours, key=lambda name: ours[name], default="")
    theirs = "transformers sdpa"
    results.head["best"] = best
    results.ratio("pages_per_second", results.find(best, "pages_per_second"), results.find(theirs, "pages_per_second"))
    results.ratio("peak_memory", results.find(best, "peak_gb"), results.find(theirs, "peak_gb"))
    results.ratio("share_of_matrix_product_rate", results.find(best, "share_of_matrix_product_rate"), 1.0)


def compiling(seconds: float, device: torch.device) -> float:
    """Seconds that a row needs to compile: at the small sizes of a CPU, hardly any."""
    return seconds if device.type == "cuda" else 0.0


def check_way(attention: Implementation, device: torch.device, sizes: Sizes) -> None:
    """Raise where this way would fall back to another, which has a row of its own."""
    head_width = sizes.sam.width // sizes.sam.num_heads
    runs = choose(attention, device=device, dtype=sizes.dtype, head_width=head_width)
    if runs != attention:
        raise ConfigError(f"attention={attention!r} does not run here; {runs!r} would run in its place.")


def variant(encoder: DeepSeekOCREncoder, sizes: Sizes, way: Way) -> DeepSeekOCREncoder:
    """An encoder that shares another's weights and encodes in another way."""
    settings = DeepSeekOCRSettings(page_size=sizes.page_size, **dataclasses.asdict(way))
    with torch.device("meta"):
        other = DeepSeekOCREncoder(settings, page=encoder.page, sam_sizes=sizes.sam, clip_sizes=sizes.clip)
    other.load_state_dict(encoder.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


@torch.no_grad()
def captured(encoder: DeepSeekOCREncoder, pages_PHW: torch.Tensor) -> DeepSeekOCREncoder:
    """The encoder, which has a graph for such pages if it was to have one.

    Raises:
        ConfigError: they could not be captured, so that the row would be one without graphs.
    """
    if encoder.graphs is not None:
        for _ in range(WARM_UP):
            encoder(pages_PHW)
        if len(encoder.graphs) == 0:
            raise ConfigError("the encoder cannot be captured as a CUDA graph here.")
    return encoder


@torch.no_grad()
def exact_features(encoder: DeepSeekOCREncoder, pages_PHW: torch.Tensor) -> torch.Tensor:
    """Features of the same weights in float32."""
    dtype = encoder.sam_model.pos_embed.dtype
    encoder.float()
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        features_PVE = encoder(pages_PHW)
    encoder.to(dtype)
    return features_PVE


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact values."""
    return float(f"{float((found.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()):.3g}")


@torch.no_grad()
def attention_rows(results: Results, sizes: Sizes, device: torch.device) -> None:
    """Each way's attention alone, of a global and of a windowed layer."""
    side = sizes.page_size // sizes.sam.patch
    hidden = torch.randn(sizes.pages, side, side, sizes.sam.width, device=device, dtype=sizes.dtype)
    for name, window in (("global", 0), ("windowed", sizes.sam.window)):
        block = Block(dataclasses.replace(sizes.sam, grid=side), window=window).to(device, sizes.dtype)
        for part in ("norm1", "norm2", "mlp"):
            setattr(block, part, nn.Identity())
        for attention in ("triton", "folded", "reference", "flex"):
            with results.row(f"{name} attention, {attention}", device, attention=attention) as row:
                results.check_time(needs=compiling(15.0, device) if attention == "flex" else 0.0)
                check_way(attention, device, sizes)
                row |= measure(lambda block=block, way=attention: block(hidden, way), device, repeats=10)


def from_pypi(theirs: TransformersDeepEncoder, device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """The `deepseek-ocr-encoder` package around transformers' SAM and CLIP; it takes one page at a time.

    Raises:
        ImportError: it is not installed.
    """
    from deepseek_ocr_encoder import (  # pyright: ignore[reportMissingImports]
        DeepSeekOCREncoder as PackageEncoder,
    )

    package = PackageEncoder(theirs, device=device, dtype=dtype)

    def run(pages_PHW: torch.Tensor) -> torch.Tensor:
        pixels = (pages_PHW.to(dtype) / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
        return package._forward_core(pixels.contiguous(memory_format=torch.channels_last))

    return run
