"""SAM's attention: every way gives the reference's numbers, on full pages, cut windows and pages of several sizes."""

import copy
import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ocrmem.config.encoder import DeepSeekOCRSettings
from ocrmem.config.render import deepseek_ocr_page
from ocrmem.encoders import sam_attention
from ocrmem.encoders.deepencoder_clip import CLIPSizes
from ocrmem.encoders.deepencoder_sam import Block, SAMSizes
from ocrmem.encoders.deepseek_ocr import DeepSeekOCREncoder
from ocrmem.encoders.sam_attention import choose
from ocrmem.errors import ConfigError, PageSizeError

SHAPES = [(8, 8, 0), (10, 10, 0), (16, 16, 14), (10, 10, 5), (7, 12, 3), (5, 4, 2)]
"""Rows and columns of the page, and the window: 0 is the whole page; 14 and 3 cut the last windows."""
CPU = torch.device("cpu")


def block(window: int, grid: int, *, dtype: torch.dtype = torch.float32) -> Block:
    sizes = SAMSizes(width=48, num_heads=3, mlp_width=80, window=window or 5, grid=grid)
    layer = Block(sizes, window=window)
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return layer.to(dtype)


def hidden(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, height, width, 48, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize("attention", ["folded", "flex"])
@pytest.mark.parametrize(("height", "width", "window"), SHAPES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_every_way_gives_the_references_numbers(attention, height, width, window):
    layer, values = block(window, max(height, width)), hidden(height, width)
    expected = layer(values, "reference")
    torch.testing.assert_close(layer(values, attention), expected, rtol=0, atol=1e-4)
    layer.attn.rel_pos_w.zero_()  # the test can fail: without the columns' positions it is another result
    assert (layer(values, attention) - expected).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["reference", "folded"])
@pytest.mark.parametrize(("height", "width", "window"), SHAPES)
@torch.no_grad()
def test_in_bfloat16_they_are_as_near_to_the_exact_numbers(attention, height, width, window):
    exact = block(window, max(height, width))(hidden(height, width), "reference")
    layer, values = block(window, max(height, width), dtype=torch.bfloat16), hidden(height, width, torch.bfloat16)
    found = layer(values, attention).float()
    assert float((found - exact).square().mean().sqrt()) < 2**-6 * float(exact.square().mean().sqrt())


KERNEL = """
import sys, torch
sys.path.insert(0, {tests!r})
from encoders.test_sam_attention import SHAPES, block, hidden
from ocrmem.encoders import sam_attention_triton
torch.set_grad_enabled(False)
for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 2e-2)):
    for height, width, window in SHAPES:
        layer, values = block(window, max(height, width), dtype=dtype), hidden(height, width, dtype)
        expected = layer(values, "reference")
        scale = expected.float().square().mean().sqrt()
        apart = float((layer(values, "triton") - expected).float().abs().max() / scale)
        assert apart < tolerance, (dtype, height, width, window, apart)
        layer.attn.qkv.bias.zero_()
        if window in (2, 3, 14):  # the cut windows' padding has this bias as its keys and values
            layer.attn.rel_pos_w.zero_()
            assert float((layer(values, "triton") - expected).float().abs().max() / scale) > 0.02
kernel = sam_attention_triton._kernel
for split in (2, 4):
    kernel.configs = [sam_attention_triton.triton.Config({{"BLOCK_Q": 64, "SPLIT": split}})]
    for height, width, window in ((16, 16, 14), (10, 10, 5)):
        layer, values = block(window, 16), hidden(height, width)
        apart = float((layer(values, "triton") - layer(values, "reference")).abs().max())
        assert apart < 1e-4, (split, height, width, window, apart)
bias = sam_attention_triton._bias_kernel
for lines, side, height, width, window in ((1, 64, 7, 12, 3), (3, 16, 20, 24, 14), (8, 16, 18, 16, 0)):
    bias.configs = [sam_attention_triton.triton.Config({{"LINES": lines}})]
    sam_attention_triton.BLOCK_LINE = side
    layer, values = block(window, max(height, width)), hidden(height, width)
    apart = float((layer(values, "triton") - layer(values, "reference")).abs().max())
    assert apart < 1e-4, (lines, side, apart)
layer, values = block(14, 16), hidden(16, 16)
compiled = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
for pages in (values, torch.cat([values, values])):  # the second time with a batch of any size
    apart = (compiled(pages, "triton")[:2] - layer(values, "reference")).abs().max()
    assert apart < 1e-4, apart
print("the same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_gives_the_references_numbers():
    """In Triton's interpreter, which computes on the CPU what the kernel would; it knows no bfloat16 products."""
    code = KERNEL.format(tests=str(Path(__file__).parents[1]))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter tries nothing out")
@pytest.mark.parametrize(
    ("side", "window", "splits"), [(64, 14, {1, 2, 4}), (64, 64, {1}), (80, 80, {1}), (32, 32, {1, 2}), (4, 4, {1})]
)
def test_which_sizes_of_tiles_are_tried(monkeypatch, side, window, splits):
    """Through Triton's own autotuner, with nothing in place of the kernel."""
    from ocrmem.encoders.sam_attention_triton import CONFIGS, _kernel, tiles

    calls = []
    monkeypatch.setattr(_kernel, "cache", {})
    monkeypatch.setattr(_kernel.fn, "run", lambda *arguments, **options: calls.append(options))
    monkeypatch.setitem(vars(_kernel), "do_bench", lambda call, quantiles: [call(), 1.0, 1.0, 1.0][1:])
    sizes = tiles(side, side, (window, window))
    _kernel[(1,)](*[torch.zeros(1)] * 5, side, side, 1, 1, 1.0, HEADS=1, HEAD=64, **sizes)
    *tried, used = calls
    assert {call["SPLIT"] for call in tried} == splits
    assert len(tried) == (1 if side == 4 else sum(config.kwargs["SPLIT"] in splits for config in CONFIGS))
    assert used == tried[0]
    for call in tried:
        assert sizes["JOINED"] % call["SPLIT"] == 0


def test_what_cannot_run_falls_back(monkeypatch, caplog):
    def chosen(wanted, device, dtype=torch.bfloat16, head_width=64):
        choose.cache_clear()
        return choose(wanted, device=torch.device(device), dtype=dtype, head_width=head_width)

    assert [chosen(wanted, "cpu") for wanted in ("auto", "reference", "folded", "flex", "triton")] == [
        *("reference", "reference", "folded", "reference", "reference"),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(sam_attention.importlib.util, "find_spec", lambda name: name)
    assert chosen("auto", "cuda") == chosen("triton", "cuda") == "folded"
    assert chosen("flex", "cuda") == "flex"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert chosen("auto", "cuda", torch.float32) == "folded"
    assert chosen("auto", "cuda", head_width=48) == "folded"
    assert not caplog.records

    def fails(*arguments, **options):
        raise RuntimeError("ptxas exited with code 255")

    monkeypatch.setattr(torch, "zeros", lambda *sizes, **options: torch.ones(sizes))
    monkeypatch.setattr(sam_attention, "kernel_attention", fails)
    assert chosen("auto", "cuda") == "folded"
    assert "ptxas exited with code 255" in caplog.text
    assert "SAM's attention kernel does not run here, so the folded one is used" in caplog.text
    choose.cache_clear()


SAM = SAMSizes(
    width=48, num_layers=4, num_heads=3, mlp_width=80, window=5, global_layers=(1, 3), neck_width=20, mid_width=28,
    out_width=40, grid=32,
)  # fmt: skip
CLIP = CLIPSizes(width=40, num_layers=3, num_heads=4, mlp_width=72, grid=6)


def encoder(page_size: int = 512, **settings) -> DeepSeekOCREncoder:
    built = DeepSeekOCREncoder(
        DeepSeekOCRSettings(page_size=page_size, **settings),
        page=deepseek_ocr_page(page_size),
        sam_sizes=SAM,
        clip_sizes=CLIP,
    )
    generator = torch.Generator().manual_seed(5)
    for tensor in built.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.1, generator=generator)
    return built


def pages(page_size: int, count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, page_size, page_size), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_the_residual_stream_is_contiguous():
    """A transposed one, as a convolution's output is, would make every layer's norm and sum copy it across."""
    seen, built = [], encoder()
    for layer in built.sam_model.blocks:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    built(pages(512, 2))
    assert seen == [True] * 4


@torch.no_grad()
def test_attention_is_no_part_of_the_encoders_identity():
    reference, folded = encoder(attention="reference"), encoder(attention="folded")
    assert reference.identity() == folded.identity()
    pages_PHW = pages(512, 2)
    expected = reference(pages_PHW)
    assert expected.std() > 0.1
    torch.testing.assert_close(folded(pages_PHW), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_pages_of_several_sizes_at_once():
    sizes = (640, 512, 640, 1024, 512)
    mixed = [pages(size, 1, seed=number)[0] for number, size in enumerate(sizes)]
    calls = []
    whole = encoder(512, attention="folded")
    whole.sam_model.register_forward_pre_hook(lambda module, inputs: calls.append(tuple(inputs[0].shape)))
    found = whole.encode_mixed(mixed)
    assert calls == [(2, 3, 640, 640), (2, 3, 512, 512), (1, 3, 1024, 1024)]
    for size, page_HW, features_VE in zip(sizes, mixed, found, strict=True):
        alone = encoder(size, attention="folded") if size != 512 else whole
        torch.testing.assert_close(features_VE, alone(page_HW[None])[0], rtol=0, atol=1e-5)
    with pytest.raises(PageSizeError, match=r"page 1 has shape \(512, 500\) and type uint8; .* takes uint8 squares"):
        whole.encode_mixed([mixed[0], mixed[1][:, :500]])


@torch.no_grad()
def test_compiled_layers_give_the_same_features():
    plain, compiled = encoder(), encoder(compile=True)
    for count in (2, 3, 1):
        torch.testing.assert_close(compiled(pages(512, count)), plain(pages(512, count)), rtol=0, atol=1e-4)
    assert compiled.compile_layers
    assert all("forward" in vars(layer) for layer in compiled.sam_model.blocks)


@torch.no_grad()
def test_a_copy_of_a_compiled_encoder_has_its_own_weights(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda *arguments: function(*arguments))
    compiled, pages_PHW = encoder(compile=True), pages(512, 1)
    expected = compiled(pages_PHW)
    copied = copy.deepcopy(compiled)
    for weight in compiled.parameters():
        weight.zero_()
    assert torch.equal(copied(pages_PHW), expected)


@torch.no_grad()
def test_layers_that_cannot_be_compiled_run_as_they_are(monkeypatch, caplog):
    def refuse(function):
        def call(*arguments):
            raise torch._dynamo.exc.BackendCompilerFailed(refuse, RuntimeError("no C++ compiler"), None)

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    compiled, pages_PHW = encoder(compile=True), pages(512, 1)
    torch.testing.assert_close(compiled(pages_PHW), encoder()(pages_PHW), rtol=0, atol=0)
    assert "the encoder's layers cannot be compiled here and run as they are" in caplog.text
    assert not compiled.compile_layers


def test_bad_settings():
    with pytest.raises(ConfigError, match="attention='fast': expected one of auto, reference, folded, flex, triton"):
        DeepSeekOCRSettings(attention="fast")
    assert not dataclasses.asdict(DeepSeekOCRSettings())["compile"]
