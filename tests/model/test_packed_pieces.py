"""Packed rows in pieces, with kernels of plain arithmetic in place of the GPU's; tests/cuda has the GPU's own."""

import itertools
import types

import pytest
import torch

from ocrmem.model import packed_pieces
from ocrmem.model.packed_pieces import GRANULE, attention_by_pieces, pieces

WIDTH, SCALE = 5, 0.3
ROWS = [(700,), (3, 640, 130, 2, 1, 517), (512, 512, 9), (7, 5, 1), (515, 512, 512, 600), (640, 5, 640, 7)]
"""Lengths of the samples: long and short, exact and not, at the row's end and before it."""


def arithmetic() -> types.SimpleNamespace:
    """Kernels as torch names them, on [..., heads, S, width]; backward passes from `out` and the log-sum-exps alone."""

    def expanded(query, tensor):
        return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3)

    def scores(query, key, scale):
        found = query @ expanded(query, key).transpose(-1, -2) * scale
        return found.masked_fill(torch.ones_like(found).triu(1).bool(), float("-inf"))

    def forward(query, key, value, scale):
        score = scores(query, key, scale)
        return score.softmax(-1) @ expanded(query, value), score.logsumexp(-1)

    def backward(grad, query, key, value, out, lse, scale):
        weights = (scores(query, key, scale) - lse[..., None]).exp()
        delta = (grad * out).sum(-1, keepdim=True)
        by_score = weights * (grad @ expanded(query, value).transpose(-1, -2) - delta) * scale
        parts = by_score.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad
        by_key, by_value = (part.unflatten(-3, (key.shape[-3], -1)).sum(-3) for part in parts)
        return by_score @ expanded(query, key), by_key, by_value

    def cudnn(query, key, value, bias, keep, dropout, causal, debug, *, scale):
        assert (bias, keep, dropout, causal, debug) == (None, True, 0.0, True, False)
        assert query.shape[2] % GRANULE == 0
        out, lse = forward(query, key, value, scale)
        return out, lse[..., None]

    def cudnn_backward(grad, query, key, value, out, lse, seed, offset, bias, q, k, max_q, max_k, p, causal, *, scale):
        assert (bias, q, k, max_q, max_k, p, causal) == (None, None, None, *query.shape[2:3] * 2, 0.0, True)
        return backward(grad, query, key, value, out, lse[..., 0], scale)

    def each(edges, *tensors):
        bounds = edges.tolist()
        assert (bounds[0], bounds[-1]) == (0, len(tensors[0]))
        for begin, end in itertools.pairwise(bounds):
            yield tuple(tensor[begin:end].transpose(0, 1) for tensor in tensors)

    def flash(query, key, value, q, k, max_q, max_k, dropout, causal, debug, *, scale):
        assert torch.equal(q, k)
        assert (max_q, max_k, dropout, causal, debug) == (*[int(q.diff().max())] * 2, 0.0, True, False)
        found = [forward(*part, scale) for part in each(q, query, key, value)]
        return torch.cat([out.transpose(0, 1) for out, _ in found]), torch.cat([lse for _, lse in found], dim=1)

    def flash_backward(grad, query, key, value, out, lse, q, k, max_q, max_k, p, causal, random, unused, *, scale):
        parts = each(q, grad, query, key, value, out, lse.T)
        grads = [backward(*part, scale) for part in parts]
        return tuple(torch.cat([part.transpose(0, 1) for part in found]) for found in zip(*grads, strict=True))

    return types.SimpleNamespace(
        _scaled_dot_product_cudnn_attention=cudnn,
        _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
        _flash_attention_forward=flash,
        _flash_attention_backward=flash_backward,
    )


def leaves(size, heads=6, key_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, n, WIDTH, generator=generator).requires_grad_() for n in (heads, key_heads, key_heads)]


def dense(query, key, value, lengths):
    """The same as one product with a mask."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (sample[:, None] == sample) & torch.ones(len(sample), len(sample)).tril().bool()
    heads = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, scale=SCALE, enable_gqa=True)
    return out[0].transpose(0, 1)


def edges_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.fixture(params=[True, False], ids=["cudnn", "without"])
def kernels(request, monkeypatch):
    monkeypatch.setattr(packed_pieces, "aten", arithmetic())
    monkeypatch.setattr(packed_pieces, "cudnn_runs", lambda *_: request.param)


@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_every_row_and_its_gradients(kernels, lengths):
    states, edges = leaves(sum(lengths)), edges_of(lengths)
    weights = torch.randn(sum(lengths), 6, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = dense(*states, lengths)
    found, _ = attention_by_pieces(*states, edges, edges, SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    expected_grads = torch.autograd.grad(expected, states, weights)
    for grad, wanted in zip(torch.autograd.grad(found, states, weights), expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lengths", [(3, 520, 7), (512, 512, 9)], ids=str)
def test_the_operator_is_what_it_says_to_torch(kernels, lengths):
    """Its schema, shapes, aliases and gradients, of inputs that are not contiguous."""
    states = [part.detach().transpose(0, 1).contiguous().transpose(0, 1) for part in leaves(sum(lengths))]
    edges = edges_of(lengths)
    torch.library.opcheck(attention_by_pieces, (*(part.requires_grad_() for part in states), edges, edges, SCALE))


def test_compiled_layers_take_rows_of_any_lengths(kernels):
    torch._dynamo.reset()

    def layer(query, key, value, edges, host_edges):
        return attention_by_pieces(query * 2, key, value, edges, host_edges, SCALE)[0] * 2

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for lengths in ROWS[1:]:
        states, edges = leaves(sum(lengths)), edges_of(lengths)
        found, expected = compiled(*states, edges, edges), layer(*states, edges, edges)
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(out.sum(), states) for out in (found, expected))
        for grad, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(grad, wanted)
    assert len(graphs) == 2  # one for the first row, one for all others


def test_which_samples_are_a_call():
    def calls(*lengths, **options):
        return [(p.first, p.end, p.start, p.stop, p.size) for p in pieces(edges_of(lengths).tolist(), **options)]

    assert calls(3, 640, 130, 2, 517) == [
        (0, 1, 0, 3, 0),
        (1, 2, 3, 643, 640),
        (2, 4, 643, 775, 0),
        (4, 5, 775, 1292, 640),
    ]
    assert calls(640, 640, 639, 640) == [(0, 2, 0, 1280, 640), (2, 3, 1280, 1919, 640), (3, 4, 1919, 2559, 640)]
    assert calls(700, 900, dense=False) == [(0, 2, 0, 1600, 0)]
    starts = [piece.lse_start for piece in pieces(edges_of([700, 5, 6, 512]).tolist())]
    assert starts == [0, 768, 768 + 2 * GRANULE]
