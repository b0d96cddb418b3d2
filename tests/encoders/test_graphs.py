"""When an encoder's run is captured and when a graph ends. The replays themselves: tests/cuda/test_cuda_graphs.py."""

import copy
import pickle

import pytest
import torch
from encoders.test_sam_attention import encoder, pages

from ocrmem.encoders import graphs
from ocrmem.encoders.graphs import MAX_GRAPHS, PLAIN_RUNS, Graphs


@pytest.fixture
def captured(monkeypatch):
    """Shapes that would have been captured on a GPU, in order; a replay adds 100."""
    shapes = []

    class Fake:
        def __init__(self, run, pages_PHW, *, beside):
            shapes.append(tuple(pages_PHW.shape))
            self.run, self.beside = run, beside

        def __call__(self, pages_PHW):
            return self.run(pages_PHW) + 100

    monkeypatch.setattr(graphs, "_Graph", Fake)
    monkeypatch.setattr(graphs, "can_replay", lambda pages_PHW, module, dtype: True)
    return shapes


class Doubler:
    """A module with a weight 2, run `times` on as many pages as it says."""

    def __init__(self):
        self.module = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(3))
        self.graphs = Graphs()

    def __call__(self, size, times=1):
        values = [
            self.graphs(lambda x: 2 * x, torch.ones(size), module=self.module, dtype=torch.float32)
            for _ in range(times)
        ]
        return [int(value[0]) for value in values]


def test_a_shape_is_captured_when_it_comes_again(captured):
    double = Doubler()
    assert double(3, PLAIN_RUNS) == [2] * PLAIN_RUNS
    assert captured == []
    assert double(3, 2) == [102, 102]
    assert captured == [(3,)]
    assert double(5, PLAIN_RUNS + 1)[-1] == 102
    first, second = double.graphs._graphs.values()
    assert first.beside is None
    assert second.beside is first
    with torch.inference_mode():
        assert double(3) == [2]  # tensors of inference mode are another kind


def test_no_graph_makes_room_for_another(captured):
    double = Doubler()
    for size in range(1, MAX_GRAPHS + 3):
        double(size, PLAIN_RUNS + 1)
    assert captured == [(size,) for size in range(1, MAX_GRAPHS + 1)]
    assert double(1) == [102]
    assert double(MAX_GRAPHS + 1) == [2]


def moved(module):
    module.double()


def another_weight(module):
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)


def another_buffer(module):
    module[1].running_mean = torch.ones(3)


def another_part(module):
    module[0] = torch.nn.Linear(1, 1)


def a_weight_less(module):
    del module[0].bias


def watched(module):
    module[0].register_forward_hook(lambda *arguments: None)


@pytest.mark.parametrize("change", [moved, another_weight, another_buffer, another_part, a_weight_less, watched])
def test_what_ends_a_graph(captured, change):
    double = Doubler()
    double(3, PLAIN_RUNS + 1)
    double(5, PLAIN_RUNS + 1)
    change(double.module)
    assert double(3, PLAIN_RUNS) == [2] * PLAIN_RUNS
    assert double(5) == [2]
    assert double(3) == ([2] if change is watched else [102])


def test_a_module_that_shares_them_is_not_taken_for_the_one_that_was_captured(captured):
    double = Doubler()
    double(3, PLAIN_RUNS + 1)
    whole, double.module = double.module, copy.copy(double.module)
    assert double(3, PLAIN_RUNS) == [2] * PLAIN_RUNS
    double.module = whole
    assert double(3, PLAIN_RUNS + 1) == [2] * PLAIN_RUNS + [102]


def test_weights_that_change_in_place_end_none(captured):
    double = Doubler()
    double(3, PLAIN_RUNS + 1)
    with torch.no_grad():
        double.module[0].weight.fill_(7.0)
    double.module.load_state_dict(double.module.state_dict())
    assert double(3) == [102]


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch, caplog, captured):
    def refuse(*arguments, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_Graph", refuse)
    double = Doubler()
    assert double(3, 6) == [2] * 6
    assert caplog.text.count("cannot be captured as a CUDA graph and runs without one: operation not permitted") == 1


@torch.no_grad()
def test_the_setting_changes_nothing_on_the_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "_Graph", None)
    plain, graphed = encoder(graphs=False).bfloat16().eval(), encoder().bfloat16().eval()
    assert plain.graphs is None
    for _ in range(PLAIN_RUNS + 2):
        assert torch.equal(graphed(pages(512, 1)), plain(pages(512, 1)))
    assert graphed.identity() == plain.identity()
    assert graphed.state_dict().keys() == plain.state_dict().keys()


@torch.no_grad()
def test_an_encoder_replays_and_its_copies_begin_anew(captured):
    whole, batch = encoder(), pages(512, 1)
    expected = whole(batch)
    for _ in range(PLAIN_RUNS):
        found = whole(batch)
    assert torch.equal(found, expected + 100)
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(other(batch), expected)
        assert other.graphs is not whole.graphs
    assert len(whole.graphs) == 1
    whole.eval()
    assert len(whole.graphs) == 1
    whole.train()
    assert len(whole.graphs) == 0
    for _ in range(PLAIN_RUNS + 1):
        whole(batch)
    assert len(whole.graphs) == 1
    whole.to(torch.float64)
    assert len(whole.graphs) == 0
