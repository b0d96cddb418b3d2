"""Packed rows on CUDA: the variable-length kernel keeps samples apart, and captured layers give what eager ones do."""

import pytest
import torch
from tiny import tiny_llm

from ocrmem.model import packed_pieces
from ocrmem.model.packed_attention import PACKED
from ocrmem.model.packed_pieces import attention_by_pieces, cudnn_runs
from ocrmem.training.graphs import GraphedLayers

WIDTH, ROW = 64, 256


def packed_llm():
    llm = tiny_llm(
        "llama", attn_implementation=PACKED, hidden_size=WIDTH, head_dim=16, max_position_embeddings=ROW
    )  # head widths of 8 or more, as the kernel demands
    return llm.to("cuda", torch.bfloat16).eval().requires_grad_(False)


def row(*lengths, seed=0):
    assert sum(lengths) == ROW
    generator = torch.Generator("cuda").manual_seed(seed)
    return {
        "inputs_embeds": torch.randn(1, ROW, WIDTH, device="cuda", generator=generator).bfloat16(),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].cuda(),
        "cu_seq_lens_q": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().cuda(),
        "max_length_q": max(lengths),
    }


def run(llm, batch, *, learns):
    edges = batch["cu_seq_lens_q"]
    embeds = batch["inputs_embeds"].clone().requires_grad_(learns)
    packing = {"cu_seq_lens_k": edges, "max_length_k": batch["max_length_q"], "use_cache": False}
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device="cuda")
    with torch.set_grad_enabled(learns):
        arguments = {**batch, **packing, "inputs_embeds": embeds, "attention_mask": mask}
        hidden = llm.base_model(**arguments).last_hidden_state
        if not learns:
            return hidden.clone(), None
        (hidden.float() ** 2).mean().backward()
    return hidden.detach().clone(), embeds.grad


def test_no_sample_of_a_packed_row_sees_another():
    llm, lengths = packed_llm(), (100, 1, 59, 96)
    batch = row(*lengths)
    packed, _ = run(llm, batch, learns=False)
    begin = 0
    for length in lengths:
        alone = llm.base_model(inputs_embeds=batch["inputs_embeds"][:, begin : begin + length]).last_hidden_state
        torch.testing.assert_close(packed[:, begin : begin + length], alone, rtol=2e-2, atol=2e-2)
        begin += length


@pytest.mark.parametrize("learns", [True, False])
def test_captured_layers_give_what_eager_ones_do(learns):
    rows = [row(100, 60, 96, seed=1), row(*[4] * 64, seed=2), row(256, seed=3), row(128, 128, seed=4)]
    expected = [run(packed_llm(), batch, learns=learns) for batch in rows]
    llm = packed_llm()
    layers = GraphedLayers(llm)
    for batch, (hidden, grad) in zip(rows, expected, strict=True):
        found, found_grad = run(llm, batch, learns=learns)
        torch.testing.assert_close(found, hidden, rtol=2e-2, atol=2e-2)
        if learns:
            torch.testing.assert_close(found_grad, grad, rtol=5e-2, atol=1e-5)
    assert layers.enabled, "the capture failed"
    assert set(layers.graphs) == {(learns, ROW)}


def test_students_and_teachers_rows_do_not_disturb_each_other():
    """As in a distilled step: a teacher's row between the rows that learn."""
    student, teacher = row(100, 60, 96, seed=1), row(128, 128, seed=4)
    expected, expected_grad = run(packed_llm(), student, learns=True)
    taught, _ = run(packed_llm(), teacher, learns=False)
    llm = packed_llm()
    layers = GraphedLayers(llm)
    for _ in range(3):
        found_taught, _ = run(llm, teacher, learns=False)
        found, grad = run(llm, student, learns=True)
        torch.testing.assert_close(found_taught, taught, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grad, expected_grad, rtol=5e-2, atol=1e-5)
    assert set(layers.graphs) == {(True, ROW), (False, ROW)}


def states_of(size, heads, key_heads, width):
    generator = torch.Generator("cuda").manual_seed(5)
    return [torch.randn(size, n, width, device="cuda", generator=generator) for n in (heads, key_heads, key_heads)]


def one_by_one(query, key, value, lengths):
    """Each sample as a product of matrices, in the type of the arguments."""
    outs = []
    for parts in zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True):
        query_HSW, *others = parts
        key_HSW, value_HSW = (part.repeat_interleave(len(query_HSW) // len(part), 0) for part in others)
        scores = query_HSW @ key_HSW.transpose(1, 2) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
        outs.append((scores.softmax(-1) @ value_HSW).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64)], ids=str)
@pytest.mark.parametrize(
    "lengths", [(2048, 2048), (2048, 1920, 128), (1531, 77, 1903, 585), (1, 600, 3), (128,) * 8], ids=str
)
@pytest.mark.parametrize("cudnn", [True, False])
def test_pieces_of_a_row_give_the_dense_numbers(monkeypatch, heads, lengths, cudnn):
    if not cudnn:
        monkeypatch.setattr(packed_pieces, "cudnn_runs", lambda *_: False)
    exact = [tensor.requires_grad_() for tensor in states_of(sum(lengths), *heads)]
    states = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    expected = one_by_one(*exact, lengths)
    found, _ = attention_by_pieces(*states, edges.cuda(), edges, heads[2] ** -0.5)
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, exact, weights)
    grads = torch.autograd.grad(found, states, weights.bfloat16())
    for one, wanted in zip((found, *grads), (expected, *expected_grads), strict=True):
        distance = (one.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert float(distance) < 2e-2


def test_cudnn_is_what_a_hopper_gpu_gets():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    assert cudnn_runs(torch.device("cuda:0"), torch.bfloat16, 32, 8, 128)
