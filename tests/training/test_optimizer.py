"""Muon with matrices of one shape together, beside torch's own."""

import copy

import pytest
import torch

from ocrmem.training.optimizer import BatchedMuon

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has the first Muon of torch's own")

SHAPES = [(24, 24), (24, 48), (48, 24), (24, 24), (30, 24), (24, 24)]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def steps(optimizer, params, number, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        for index, parameter in enumerate(params):
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if index == 5 else grad  # one that takes no part
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_same_as_torchs(weight_decay):
    options = {"lr": 0.02, "weight_decay": weight_decay}
    before, ours, theirs = parameters(), parameters(), parameters()
    steps(BatchedMuon(ours, **options), ours, 4)
    steps(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options), theirs, 4)
    for start, found, expected in zip(before, ours, theirs, strict=True):
        moved, off = (expected - start).norm(), (found - expected).norm()
        assert off <= 1e-3 * moved  # both round to bfloat16
    assert torch.equal(ours[5], before[5])
    assert all(not torch.equal(found, start) for found, start in zip(ours[:5], before[:5], strict=True))


def test_the_state_is_torchs():
    ours, theirs = parameters(), parameters()
    batched, single = BatchedMuon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn="match_rms_adamw")
    steps(single, theirs, 3)
    for parameter, source in zip(ours, theirs, strict=True):
        parameter.data.copy_(source.data)
    batched.load_state_dict(copy.deepcopy(single.state_dict()))
    assert batched.state_dict()["state"].keys() == single.state_dict()["state"].keys() == {0, 1, 2, 3, 4}
    steps(batched, ours, 1, seed=2)
    steps(single, theirs, 1, seed=2)
    for number in range(5):
        torch.testing.assert_close(
            batched.state_dict()["state"][number]["momentum_buffer"],
            single.state_dict()["state"][number]["momentum_buffer"],
        )
        torch.testing.assert_close(ours[number], theirs[number], rtol=1e-3, atol=1e-4)
