"""The projection's pieces and gain, adapters stored at half the size, and a start from fewer pieces."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from ocrmem.config.projection import ProjectionSettings
from ocrmem.errors import CheckpointError, ConfigError, SpliceError
from ocrmem.model.adapter import load_projection, read_manifest
from ocrmem.model.mem_model import MEMModel
from ocrmem.model.projection import Projection, compile_projection, rotary, turned


def projection(**settings):
    torch.manual_seed(0)
    values = {"kind": "attention", "num_layers": 1, "num_heads": 2, **settings}
    return Projection(ProjectionSettings(**values), feature_width=12, embedding_width=8, embedding_rms=0.1)


def test_fewer_pieces_to_a_token_give_the_tokens_in_between():
    proj = projection(pieces=4)
    features_PVE = torch.randn(2, 5, 12)
    used = torch.tensor([5, 3])
    whole = proj(features_PVE, used)
    halves = proj(features_PVE.reshape(2, 10, 6), used * 2)
    quarters = proj(features_PVE.reshape(2, 20, 3), used * 4)
    assert (whole.shape, halves.shape, quarters.shape) == ((2, 5, 8), (2, 10, 8), (2, 20, 8))
    torch.testing.assert_close(whole, halves[:, 1::2])
    torch.testing.assert_close(whole, quarters[:, 3::4])
    fresh = projection(pieces=4, merge=True)
    torch.testing.assert_close(fresh(features_PVE, used), whole)  # it begins as the last piece alone


def test_every_piece_goes_through_its_own_matrix():
    proj = projection(pieces=2, merge=True)
    proj.attention.layers = torch.nn.ModuleList()
    with torch.no_grad():
        proj.merge[1].weight.copy_(torch.randn(8, 8))
    features_PVE = torch.randn(1, 3, 12)
    pieces_PVD = proj.linear2(torch.nn.functional.gelu(proj.linear1(features_PVE.reshape(1, 6, 6))))
    expected = pieces_PVD[:, 1::2] + pieces_PVD[:, ::2] @ proj.merge[1].weight.T
    expected = torch.nn.functional.rms_norm(expected, (8,), eps=1e-6) * 0.1
    torch.testing.assert_close(proj(features_PVE), expected)
    changed = features_PVE.clone()
    changed[0, 0, :6] += 1
    after = proj(changed)
    assert not torch.allclose(after[0, 0], expected[0, 0])
    torch.testing.assert_close(after[0, 1:], expected[0, 1:])


def test_merged_layers_attend_over_whole_memory_tokens_in_use():
    proj = projection(pieces=2, merge=True, merged_layers=2)
    features_PVE, used = torch.randn(2, 5, 12), torch.tensor([5, 3])
    memory_PVD = proj(features_PVE, used)
    assert memory_PVD.shape == (2, 5, 8)
    before = proj.merged
    proj.merged = None
    pieces_PVD = proj.attention(
        proj.linear2(torch.nn.functional.gelu(proj.linear1(features_PVE.reshape(2, 10, 6)))),
        torch.arange(10) < 2 * used[:, None],
    )
    assert not torch.allclose(proj(features_PVE, used), memory_PVD)
    expected = before(proj._merged(pieces_PVD, 2), torch.arange(5) < used[:, None])
    torch.testing.assert_close(memory_PVD, torch.nn.functional.rms_norm(expected, (8,), eps=1e-6) * 0.1)
    proj.merged = before
    changed = features_PVE.clone()
    changed[1, 3:] += 1  # not in use on the second page
    torch.testing.assert_close(proj(changed, used)[1, :3], memory_PVD[1, :3])
    with pytest.raises(ConfigError, match="merged_layers=1 needs kind 'attention'"):
        ProjectionSettings(merged_layers=1)
    with pytest.raises(ConfigError, match="merged_layers=-1: expected 0 or more"):
        ProjectionSettings(kind="attention", merged_layers=-1)


def test_more_pieces_than_the_projection_has_are_refused():
    with pytest.raises(
        SpliceError, match="features of 8 pieces to a memory token, expected projection.pieces=4 at most"
    ):
        projection(pieces=4, merge=True)._merged(torch.randn(1, 16, 8), 8)


def test_only_the_distance_between_pieces_counts():
    angles_2PVH = rotary(torch.stack([torch.arange(6), torch.arange(3, 9)]), 4)  # from the start, and after blanks
    query, key = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    scores = [
        turned(query, angles) @ turned(key, angles).transpose(-1, -2)
        for angles in angles_2PVH[:, :, None, None].unbind(1)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def test_pieces_see_each_other_within_the_used_part_of_a_page_only():
    proj = projection(pieces=4)
    features_PVE = torch.randn(1, 5, 12)
    used = torch.tensor([3])
    before = proj(features_PVE, used)
    changed = features_PVE.clone()
    changed[0, 0, :3] += 1
    assert not torch.allclose(proj(changed, used)[0, 2], before[0, 2]), "the first piece reaches the third token"
    changed = features_PVE.clone()
    changed[0, 3:] += 1
    torch.testing.assert_close(proj(changed, used)[0, :3], before[0, :3])


def test_the_gain_starts_at_the_embeddings_size_and_learns():
    proj = projection(gain=True)
    memory = proj(torch.randn(2, 5, 12))
    torch.testing.assert_close(memory.pow(2).mean(-1).sqrt(), torch.full((2, 5), 0.1), rtol=1e-3, atol=1e-4)
    memory.sum().backward()
    assert proj.gain_D.grad.abs().sum() > 0
    assert sum(p.numel() for p in proj.parameters()) == 8 + sum(p.numel() for p in projection().parameters())


def test_pieces_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="pieces=5 does not divide the encoder's feature width 12"):
        projection(pieces=5)
    with pytest.raises(ConfigError, match="pieces=2 needs kind 'attention'"):
        ProjectionSettings(kind="mlp", pieces=2)


def test_an_adapter_of_half_the_size_loads_as_float32(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, matrix_dtype=torch.bfloat16, manifest={"documents": ["ab"], "steps": 3})
    stored = load_file(tmp_path / "adapter.safetensors")
    assert {value.dtype for value in stored.values() if value.ndim == 2} == {torch.bfloat16}
    other = tiny_model(seed=5)
    load_projection(other, tmp_path)
    for key, value in other.proj.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, model.proj.state_dict()[key], rtol=1e-2, atol=1e-3)
    assert read_manifest(tmp_path) == {"documents": ["ab"], "steps": 3}


def test_a_broken_manifest_is_named(tmp_path):
    assert read_manifest(tmp_path) == {}
    (tmp_path / "training_manifest.json").write_text(json.dumps({"documents": []}))
    with pytest.raises(CheckpointError, match="is no training manifest"):
        read_manifest(tmp_path)


def with_pieces(pieces: int, *, merge: bool = True, seed: int = 0, piece_width: int = 3) -> MEMModel:
    """A tiny model whose projection has this many pieces, and merge matrices that are not those of a fresh one."""
    model = tiny_model()
    torch.manual_seed(seed)
    settings = ProjectionSettings(kind="attention", num_layers=1, num_heads=2, pieces=pieces, merge=merge)
    model.proj = Projection(settings, feature_width=piece_width * pieces, embedding_width=24, embedding_rms=0.1)
    for matrix in model.proj.merge:
        torch.nn.init.normal_(matrix.weight)
    return model


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_a_projection_of_more_pieces_begins_as_the_one_of_fewer(dtype, tmp_path):
    two, four = with_pieces(2), with_pieces(4, seed=1)
    two.save_pretrained(tmp_path, matrix_dtype=dtype)
    load_projection(two, tmp_path)
    load_projection(four, tmp_path, start=True)
    assert all(torch.equal(value, four.proj.state_dict()[key]) for key, value in two.proj.state_dict().items())
    features_PVE, used = torch.randn(2, 5, 12), torch.tensor([5, 3])
    of_two = two.proj(features_PVE.reshape(2, 10, 6), used * 2)
    torch.testing.assert_close(four.proj(features_PVE.reshape(2, 10, 6), used * 2), of_two)
    torch.testing.assert_close(four.proj(features_PVE, used), of_two[:, 1::2])
    assert not four.proj.merge[2].weight.any()
    assert not four.proj.merge[3].weight.any()


def test_fewer_pieces_are_refused_where_nothing_asks_for_them(tmp_path):
    with_pieces(2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="projection: missing merge.2.weight; missing merge.3.weight[.]"):
        load_projection(with_pieces(4), tmp_path)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"pieces": 8}, r"unexpected merge.4.weight; .* unexpected merge.7.weight[.]"),
        ({"pieces": 2, "merge": False}, "missing merge.0.weight; missing merge.1.weight; .* missing merge.3.weight[.]"),
        ({"pieces": 2, "piece_width": 6}, r"linear1.weight is float32 \[24, 6\], expected float32 \[24, 3\][.]"),
    ],
)
def test_whatever_else_differs_is_refused(saved, message, tmp_path):
    with_pieces(**saved).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"projection: {message}"):
        load_projection(with_pieces(4), tmp_path, start=True)


@pytest.mark.parametrize(("lost", "missing"), [(0, "merge.0.weight; .*merge.3.weight"), (1, "merge.1.weight")])
def test_a_gap_among_the_pieces_is_refused(lost, missing, tmp_path):
    with_pieces(3).save_pretrained(tmp_path)
    path = tmp_path / "adapter.safetensors"
    weights = load_file(path)
    weights.pop(f"merge.{lost}.weight")
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=f"projection: missing {missing}[.]"):
        load_projection(with_pieces(4), tmp_path, start=True)


def test_compiled_layers_take_pages_of_any_number_and_length_without_being_compiled_anew():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.manual_seed(0)
    settings = ProjectionSettings(kind="attention", num_layers=2, pieces=2, merge=True, merged_layers=1, num_heads=2)
    parts = {"feature_width": 8, "embedding_width": 16, "embedding_rms": 0.1}
    plain, compiled = Projection(settings, **parts), Projection(settings, **parts)
    compiled.load_state_dict(plain.state_dict())
    backend = CompileCounterWithBackend("aot_eager")
    compile_projection(compiled, backend=backend)
    graphs = []
    for pages, tokens in ((3, 6), (7, 4), (5, 9)):
        features, used = torch.randn(pages, tokens, 8), torch.randint(1, tokens + 1, (pages,))
        memories = [proj(features, used) for proj in (plain, compiled)]
        torch.testing.assert_close(*memories)
        for memory in memories:
            memory.square().sum().backward()
        for (name, expected), found in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")
        graphs.append(backend.frame_count)
    with torch.no_grad():
        torch.testing.assert_close(compiled(features, used), plain(features, used))
    assert [graphs[0]] * 4 == [*graphs, backend.frame_count]
    assert graphs[0] > 0
    copied = copy.deepcopy(compiled)
    expected = copied(features, used)
    with torch.no_grad():
        for weight in compiled.parameters():
            weight.zero_()
    torch.testing.assert_close(copied(features, used), expected, msg="a copy reads the original's weights")
