"""Packed rows of a data run on CUDA: the padded batch's loss and gradients, and a step of compiled layers."""

import pytest
import torch
from data.test_collator_packing import packer, run, samples
from tiny import tiny_model

from ocrmem.data.collator import MEMCollator
from ocrmem.model.llm import compile_layers
from ocrmem.model.packed_attention import PACKED


def model(attention: str, *, compiled: bool = False):
    """Head widths of 8 or more, as the kernel demands."""
    made = tiny_model(
        "qwen3", attn_implementation=attention, max_position_embeddings=256, hidden_size=64, head_dim=16
    ).to("cuda")
    made.base_llm_model.to(torch.bfloat16)
    if compiled:
        compile_layers(made.base_llm_model)
    return made


def on_gpu(batch):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_padded_loss_and_gradients(compiled):
    padded, expected = run(model("sdpa"), on_gpu(MEMCollator(0)(samples())))
    packed = model(PACKED, compiled=compiled)
    for options in ({"pad_to_multiple_of": 64},) if compiled else ({}, {"pad_to_multiple_of": 64}):
        output, found = run(packed, on_gpu(packer(**options)(samples())))
        assert float(output.loss) == pytest.approx(float(padded.loss), abs=5e-3)
        for name, grad in expected.items():
            similarity = torch.nn.functional.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0)
            assert similarity > 0.99, name
