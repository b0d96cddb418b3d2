"""The figures of docs/cost.md follow from the formulas in the code."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ocrmem.config.llm import LLM_CONFIGS
from ocrmem.encoders.deepencoder_clip import CLIPSizes
from ocrmem.encoders.deepencoder_sam import SAMSizes
from ocrmem.evaluation.bench.flops import clip_flops, llm_parameters, sam_flops, step_flops_per_position
from ocrmem.evaluation.bench.sizes import Sizes
from ocrmem.training.hardware import kept_values

PAGE = " ".join((Path(__file__).parents[1] / "docs" / "cost.md").read_text(encoding="utf-8").split())
RATE = 750e12
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def benched(part, figure):
    """Of each row of a recorded benchmark that has the figure."""
    rows = json.loads((RESULTS / f"bench-{part}.json").read_text(encoding="utf-8"))["rows"]
    return {row["name"]: row[figure] for row in rows if figure in row}


@pytest.mark.parametrize("side", [512, 640, 1024, 1280])
def test_pages(side):
    sam, clip = sam_flops(SAMSizes(), side), clip_flops(CLIPSizes(), side)
    tokens = (side // 64) ** 2
    row = f"| {side:,}² | {tokens} | {sam / 1e12:.3f}"
    assert row in PAGE
    rest = (
        f"| {clip / 1e12:.3f} | {(sam + clip) / 1e12:.3f} | {RATE / (sam + clip):,.0f} | {tokens * 4096 / 1e6:.2f} MB |"
    )
    assert rest in PAGE


@pytest.mark.parametrize("preset", ["qwen3-0.6b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "llama-3.1-8b"])
def test_llms(preset):
    config = LLM_CONFIGS[preset]
    weights = sum(llm_parameters(config).values())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    keys, width, layers = config["num_key_value_heads"] * head, config["hidden_size"], config["num_hidden_layers"]
    sizes = SimpleNamespace(**{"head_dim": None, **config})
    kept = 2 * layers * kept_values(sizes, compiled=True, memory_budget=0.9)
    row = (
        f"| {2 * weights / 1e9:.1f} GB | {RATE / step_flops_per_position(config):,.0f} | {kept / 1e6:.2f} GB | "
        f"{2 * layers * width / 1e6:.2f} GB | {4 * layers * keys / 1e6:.2f} GB |"
    )
    assert row in PAGE


@pytest.mark.parametrize("positions", [4096, 16384, 32768])
def test_prefill(positions):
    flops = step_flops_per_position(LLM_CONFIGS["qwen3-8b"]) / 2 * positions + 2 * positions**2 * 4096 * 36
    assert f"| {positions:,} | {flops / 1e15:.3f} × 10¹⁵ | {1e3 * flops / RATE:,.0f} ms |" in PAGE


def test_the_million():
    positions, pages = 2048e6, 4e6
    step, encoder = (
        benched(part, f"{unit}_per_second") for part, unit in (("step", "positions"), ("encoder", "pages"))
    )
    packed, plain = step["ocrmem, 30% short samples, packed"], step["plain Hugging Face"]
    ours, theirs = encoder["ocrmem triton, compiled, graphs"], encoder["transformers sdpa"]
    for row in (
        f"train at {packed:,.0f} positions/s",
        f"{positions / packed / 3600:.0f} hours | {positions / packed / 8 / 3600:.1f} hours",
        f"plain Hugging Face step, {plain:,.0f}",
        f"{positions / plain / 3600:.0f} hours | {positions / plain / 8 / 3600:.1f} hours",
        f"encode at {ours:.0f} pages/s",
        f"{pages / ours / 3600:.1f} hours | {pages / ours / 8 / 60:.0f} minutes",
        f"transformers with SDPA, {theirs:.0f} pages/s",
        f"{pages / theirs / 3600:.1f} hours | {pages / theirs / 8 / 3600:.1f} hours",
        f"{pages * 256 * 2048 * 2 / 1e12:.1f} TB",
        f"{positions * step_flops_per_position(LLM_CONFIGS['qwen3-8b']) / 1e19:.1f} × 10¹⁹ FLOP",
        f"{pages * 0.4e-3 / 60:.0f} minutes of one core",
    ):
        assert row in PAGE, row
    sizes = Sizes()
    run = (sizes.long_samples + sizes.short_samples) * sizes.positions
    needed = sizes.long_samples * sizes.positions + sizes.short_samples * sizes.short_positions
    assert f"{run // sizes.positions} / {needed // sizes.positions} = {run / needed:.2f}" in PAGE


def test_what_a_step_keeps():
    config = SimpleNamespace(**LLM_CONFIGS["qwen3-8b"])
    for row, options in (
        ("kept for the backward pass | 2 × S × L × (4D + 4Q + 4K + 3I)", {"compiled": False}),
        ("the same, compiled | 2 × S × L × (2D + 3Q + 3K + 2I)", {"compiled": True}),
        ("0.9` | 2 × S × L × (2D + Q + 2K + 2I)", {"compiled": True, "memory_budget": 0.9}),
    ):
        assert f"{row} | {2 * 4096 * 36 * kept_values(config, **options) / 1e9:.1f} GB |" in PAGE


def test_what_was_measured():
    pages, shares, peaks = (
        benched("encoder", figure) for figure in ("pages_per_second", "share_of_matrix_product_rate", "peak_gb")
    )
    for shown, name in (
        ("transformers, SDPA", "transformers sdpa"),
        ("`attention: triton`, `compile: true`, `graphs: true`", "ocrmem triton, compiled, graphs"),
        ("the same, `graphs: false`", "ocrmem triton, compiled"),
        ("`triton`, neither", "ocrmem triton"),
        ("`folded`, neither", "ocrmem folded"),
        ("`reference`, neither", "ocrmem reference"),
    ):
        assert f"| {shown} | {pages[name]:.0f} | {shares[name]:.2f} | {peaks[name]:.1f} GB |" in PAGE
    positions, shares, peaks = (
        benched("step", figure) for figure in ("positions_per_second", "share_of_limit", "peak_gb")
    )
    for shown, name in (
        ("plain Hugging Face step, labels passed to the model", "plain Hugging Face"),
        ("`compile: true`, `compile_memory_budget: 0.9`", "ocrmem, compiled, memory budget 0.9"),
        ("`compile: true`", "ocrmem, compiled"),
        ("compiled, `data.packing: true`", "ocrmem, compiled, packed"),
        ("compiled, `compile_memory_budget: 0.7`", "ocrmem, compiled, memory budget 0.7"),
        ("compiled, checkpointing", "ocrmem, compiled, checkpointing"),
        ("uncompiled", "ocrmem"),
        ("compiled, `llm.quantization: torchao-int8`", "ocrmem, 8-bit LLM by torchao"),
    ):
        assert f"| {shown} | {positions[name]:,.0f} | {shares[name]:.2f} | {peaks[name]:.1f} GB |" in PAGE
