"""The encoder as a CUDA graph: the plain run's features bit for bit, whatever comes between."""

import threading

import pytest
import torch
from encoders.test_sam_attention import encoder, pages

from ocrmem.encoders.graphs import PLAIN_RUNS
from ocrmem.evaluation.bench.timing import kept_for_replays


def captured(whole, count, size=512):
    """Run so many pages until they are captured."""
    before = len(whole.graphs)
    for _ in range(PLAIN_RUNS + 1):
        whole._encode(pages(size, count).cuda())
    assert whole.graphs.enabled
    assert len(whole.graphs) == before + 1


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("features", ["concat", "sam"])
@torch.no_grad()
def test_a_replay_is_the_plain_run_bit_for_bit(features, compile):
    settings = {"features": features, "compile": compile}
    graphed, plain = (encoder(graphs=graphs, **settings).cuda().bfloat16().eval() for graphs in (True, False))
    captured(graphed, 3)
    first, second = (pages(512, 3, seed=seed).cuda() for seed in (7, 8))
    found = [graphed(batch) for batch in (first, second, first)]
    expected = [plain(batch) for batch in (first, second)]
    assert not torch.equal(*expected)
    assert [one.stride() for one in found[:2]] == [one.stride() for one in expected]
    assert torch.equal(found[0], expected[0])  # looked at after the others: no replay overwrites what was given out
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[0])


@torch.no_grad()
def test_shapes_in_turn():
    graphed, plain = (encoder(graphs=graphs).cuda().bfloat16().eval() for graphs in (True, False))
    batches = [pages(*shape, seed=9).cuda() for shape in ((512, 1), (512, 4), (640, 2))]
    for batch in batches:
        captured(graphed, batch.shape[0], batch.shape[1])
    assert kept_for_replays(torch.device("cuda")) > 0
    found = [graphed._encode(batch) for _ in range(2) for batch in batches]
    for one, batch in zip(found, batches * 2, strict=True):
        assert torch.equal(one, plain._encode(batch))


@torch.no_grad()
def test_weights_that_move_and_weights_that_change():
    graphed, batch = encoder().cuda().bfloat16().eval(), pages(512, 2).cuda()
    captured(graphed, 2)
    graphed.half()
    captured(graphed, 2)
    assert torch.equal(graphed(batch), encoder(graphs=False).cuda().bfloat16().half().eval()(batch))
    state = {name: value.cuda() * 1.5 for name, value in graphed.state_dict().items()}
    graphed.load_state_dict(state)
    assert len(graphed.graphs) == 1
    in_place = graphed(batch)
    graphed.load_state_dict(state, assign=True)
    assert torch.equal(graphed(batch), in_place)
    graphed.graphs = None
    assert torch.equal(graphed(batch), in_place)


def test_where_a_gradient_may_be_wanted_nothing_is_captured():
    graphed, batch = encoder().cuda().bfloat16().eval(), pages(512, 1).cuda()
    for _ in range(PLAIN_RUNS + 1):
        assert graphed(batch).requires_grad
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for _ in range(PLAIN_RUNS + 1):
            graphed(batch)
    graphed.train()
    with torch.no_grad():
        graphed(batch)
    assert not graphed.graphs._seen


@torch.no_grad()
def test_streams_and_threads():
    graphed = encoder().cuda().bfloat16().eval()
    captured(graphed, 2)
    batches = [pages(512, 2, seed=seed).cuda() for seed in range(6)]
    expected, found = [graphed(batch) for batch in batches], [None] * 6
    torch.cuda.synchronize()

    def work(number):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            found[number] = graphed(batches[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_capture_that_fails_leaves_everything_as_it_was(caplog, monkeypatch):
    graphed, batch = encoder().cuda().bfloat16().eval(), pages(512, 2).cuda()
    _, expected = (graphed(batch) for _ in range(PLAIN_RUNS))
    run, stream = graphed._features, torch.cuda.current_stream()

    def refused(pages_PHW):
        if torch.cuda.is_current_stream_capturing():
            pages_PHW.sum().item()  # waits for the GPU, which no capture can
        return run(pages_PHW)

    monkeypatch.setattr(graphed, "_features", refused)
    assert torch.equal(graphed(batch), expected)
    assert torch.rand(3, device="cuda").max() > 0  # the generator is usable, too
    assert "the encoder cannot be captured as a CUDA graph" in caplog.text
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()  # the allocator, which refuses while it takes a capture to be under way
    assert torch.equal(graphed(batch), expected)
