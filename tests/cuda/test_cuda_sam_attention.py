"""SAM's attention on CUDA: every way is as near to the exact numbers as the reference is."""

import pytest
import torch
from encoders.test_sam_attention import encoder, pages

from ocrmem.encoders.deepencoder_sam import Block, SAMSizes
from ocrmem.encoders.sam_attention import choose

WIDTH, HEADS = 192, 3


def layer(window: int, grid: int) -> Block:
    block = Block(SAMSizes(width=WIDTH, num_heads=HEADS, mlp_width=256, window=window or 5, grid=grid), window=window)
    generator = torch.Generator().manual_seed(3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return block.cuda()


SHAPES = [(64, 0), (40, 0), (80, 0), (32, 0), (64, 14), (40, 14), (32, 14)]
CASES = [
    *((torch.bfloat16, way, *shape) for way in ("folded", "triton") for shape in SHAPES),
    *((torch.float16, way, *shape) for way in ("folded", "triton") for shape in ((40, 0), (40, 14))),
    *((torch.bfloat16, "flex", *shape) for shape in ((40, 0), (40, 14))),
]
"""Type, way, side of the page and window; few where each takes seconds to compile."""


@pytest.mark.parametrize(("dtype", "attention", "side", "window"), CASES)
@torch.no_grad()
def test_as_near_to_the_exact_numbers_as_the_reference(dtype, attention, side, window):
    torch.manual_seed(0)
    hidden = torch.randn(2, side, side, WIDTH, device="cuda")
    exact = layer(window, side)(hidden, "reference")
    block = layer(window, side).to(dtype)

    def apart(way):
        return float((block(hidden.to(dtype), way).float() - exact).square().mean().sqrt())

    assert 0 < apart(attention) < 1.1 * apart("reference")


def test_the_kernel_is_what_a_gpu_gets():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs Ampere or newer")
    assert choose("auto", device=torch.device("cuda:0"), dtype=torch.bfloat16, head_width=64) == "triton"
    assert choose("auto", device=torch.device("cuda:0"), dtype=torch.float32, head_width=64) == "folded"


@pytest.mark.parametrize("compile", [False, True])
@torch.no_grad()
def test_the_whole_encoder(compile):
    pages_PHW = pages(512, 3).cuda()
    exact = encoder().cuda()(pages_PHW)
    reference = encoder(attention="reference").cuda().bfloat16()(pages_PHW).float()
    found = encoder(compile=compile).cuda().bfloat16()(pages_PHW).float()
    distance = (exact - reference).square().mean().sqrt()
    assert float((exact - found).square().mean().sqrt()) < 1.2 * float(distance)
