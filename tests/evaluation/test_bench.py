"""`ocrmem bench` for real, on small sizes; its reference has our encoder's numbers; a failed row costs no other."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from ocrmem.config.encoder import DeepSeekOCRSettings
from ocrmem.config.llm import LLM_CONFIGS
from ocrmem.config.render import deepseek_ocr_page
from ocrmem.encoders.deepencoder_clip import CLIPSizes
from ocrmem.encoders.deepencoder_sam import SAMSizes
from ocrmem.evaluation.bench.deepencoder import TransformersDeepEncoder, random_encoder
from ocrmem.evaluation.bench.encoder import AUTO, Way
from ocrmem.evaluation.bench.flops import clip_flops, llm_parameters, sam_flops
from ocrmem.evaluation.bench.models import memory_model, random_llm
from ocrmem.evaluation.bench.sizes import Sizes, small_sizes
from ocrmem.evaluation.bench.step import layers_as_they_were, mixture, packed_plan
from ocrmem.evaluation.bench.timing import Results
from ocrmem.model.llm import empty_llm

CPU = torch.device("cpu")


def ocrmem(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ocrmem", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """All parts but the encoder's, whose compiled rows take longest and have a test of their own."""
    folder = tmp_path_factory.mktemp("results")
    done = ocrmem("bench", "render,step,prefill", "--output", folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for part, content in found.items():
        assert json.loads((folder / f"bench-{part}.json").read_text()) == content
    return found


def test_every_row_has_a_figure(results):
    assert list(results) == ["render", "step", "prefill"]
    for content in results.values():
        assert content["device"].startswith("CPU")
        assert content["small"]
        assert content["versions"]["torch"] == torch.__version__
        assert content["command"].startswith("ocrmem bench render,step,prefill --output")
        assert content["matrix_product"]["tflops"] > 0
        assert content["rows"]
        for row in content["rows"]:
            if "torchao" in row["name"] and "torchao" not in content["versions"]:
                assert row["error"] == "ModuleNotFoundError: No module named 'torchao'"
                continue
            assert "error" not in row, row
            assert row["ms"] > 0
    ratios = results["step"]["ratios"]
    assert ratios["positions_per_second: ocrmem"] > 0
    assert ratios["peak_memory: ocrmem"] is None  # no GPU
    assert results["prefill"]["ratios"]["time to first token: memory, pages cached"] > 1
    assert results["render"]["ratios"]["pages_per_second"] > 1


def test_packed_rows_run_no_position_in_vain(results):
    rows = {row["name"]: row for row in results["step"]["rows"]}
    packed = rows["ocrmem, 30% short samples, packed"]
    padded = rows["ocrmem, 30% short samples, padded to the longest of all"]
    assert packed["positions_run"] == packed["positions"] == padded["positions"]
    assert padded["positions_run"] / packed["positions"] == pytest.approx(1.35, abs=0.001)
    assert packed["short_samples"] / packed["samples"] == pytest.approx(0.3, abs=0.01)


@torch.no_grad()
def test_the_reference_encoder_has_our_numbers():
    sizes = small_sizes()
    encoder = random_encoder(
        DeepSeekOCRSettings(page_size=512, attention="folded"),
        deepseek_ocr_page(512),
        sizes.sam,
        sizes.clip,
        device=CPU,
        dtype=torch.float32,
    )
    theirs = TransformersDeepEncoder(encoder, sizes.sam, sizes.clip)
    pages_PHW = torch.randint(0, 256, (2, 512, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = theirs(pages_PHW)
    assert expected.std() > 0.1
    torch.testing.assert_close(encoder(pages_PHW), expected, rtol=0, atol=1e-4)
    shared = theirs.sam_model.net_2.weight.data_ptr() == encoder.sam_model.net_2.weight.data_ptr()
    assert shared, "the peak memory of one side would hold the other's weights"


def test_a_failed_row_and_one_that_comes_too_late_cost_no_other(tmp_path):
    lines = []
    results = Results(part="x", path=tmp_path / "x.json", head={}, seconds=60, progress=lines.append)
    with results.row("fails", CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")
    with results.row("works", CPU) as row:
        row["ms"] = 3.0
    results.seconds = 0.0
    with results.row("late", CPU) as row:
        results.check_time()
        row["ms"] = 3.0
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == results.rows
    assert results.rows[0]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB."
    assert results.find("works", "ms") == 3.0
    assert results.rows[2]["error"] == "TimeoutError: left out: x had used its 0 s"
    results.ratio("a", results.find("works", "ms"), results.find("fails", "ms"))
    assert results.ratios == {"a": None}
    assert lines[1].startswith("x: works: 3.0 ms")


def test_bad_input():
    done = ocrmem("bench", "everything")
    assert done.returncode == 1
    assert done.stderr == (
        "error: unknown part of the benchmark everything: expected render, encoder, prefill, step or all.\n"
    )


def test_arithmetic_against_torchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    sizes = small_sizes()
    sam = dataclasses.replace(sizes.sam, window=16)  # windows without padding, which the formula leaves out
    settings = DeepSeekOCRSettings(page_size=512, attention="reference")
    with torch.device("meta"):
        encoder = random_encoder(
            settings, deepseek_ocr_page(512), sam, sizes.clip, device=torch.device("meta"), dtype=torch.float32
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 512, 512, dtype=torch.uint8, device="meta"))
    bias = 2 * 32 * 32 * 64 * (2 * (32 + 32) + 2 * (16 + 16))  # the einsums of the position tables, four layers
    expected = sam_flops(sam, 512) + clip_flops(sizes.clip, 512)
    assert counter.get_total_flops() - bias == pytest.approx(expected, rel=0.002)
    full = sam_flops(SAMSizes(), 1024)
    assert full == pytest.approx(0.93e12, rel=0.02)
    assert clip_flops(CLIPSizes(), 1024) == pytest.approx(0.16e12, rel=0.03)


@pytest.mark.parametrize("preset", ["qwen3-8b", "qwen3-0.6b", "llama-3.1-8b", "smollm2-135m"])
def test_parameters_of_the_presets(preset):
    parts = llm_parameters(LLM_CONFIGS[preset])
    counted = sum(parameter.numel() for parameter in empty_llm(preset).parameters())
    assert sum(parts.values()) == pytest.approx(counted, rel=1e-3)  # the norms' few are left out


def test_a_way_to_encode_is_named_by_its_settings():
    assert Way(attention="triton", compile=True, graphs=True).name == "ocrmem triton, compiled, graphs"
    assert Way(attention="folded").name == "ocrmem folded"
    assert dataclasses.asdict(AUTO) | {"page_size": 1024, "features": "concat"} == dataclasses.asdict(
        DeepSeekOCRSettings()
    )


def test_rows_of_full_size_are_full():
    sizes = Sizes()
    lengths = [
        *([{"input_ids": torch.zeros(sizes.positions)}] * sizes.long_samples),
        *([{"input_ids": torch.zeros(sizes.short_positions)}] * sizes.short_samples),
    ]
    rows = packed_plan(lengths, sizes.batch * sizes.positions)
    assert {sum(len(one["input_ids"]) for one in row) for row in rows} == {sizes.batch * sizes.positions}
    assert len(lengths) % sizes.batch == 0
    assert sizes.short_samples / len(lengths) == pytest.approx(0.3, abs=0.01)
    assert len(mixture(small_sizes(), 64)) == 54


def test_a_way_leaves_the_llm_as_it_was():
    from ocrmem.model.llm import compile_layers

    sizes = small_sizes()
    llm = random_llm(sizes, CPU)
    with torch.device("meta"):
        encoder = random_encoder(
            DeepSeekOCRSettings(page_size=512), deepseek_ocr_page(512), sizes.sam, sizes.clip,
            device=torch.device("meta"), dtype=torch.float32,
        )  # fmt: skip
    encoder.identity = lambda: "none"
    model = memory_model(llm, encoder, sizes)
    with layers_as_they_were(llm):
        compile_layers(llm)
        model.gradient_checkpointing_enable()
        llm.set_attn_implementation("eager")
        model.train()
    layer = llm.base_model.layers[0]
    assert "forward" not in vars(layer)
    assert not layer.gradient_checkpointing
    assert llm.config._attn_implementation == "sdpa"
    assert not llm.training
