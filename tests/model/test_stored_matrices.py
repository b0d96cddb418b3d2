"""Adapters whose matrices are stored in fewer bits."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ConvEncoder, tiny_llm, tiny_model

from ocrmem.errors import CheckpointError, ConfigError
from ocrmem.model.adapter import load_projection
from ocrmem.model.mem_model import MEMModel
from ocrmem.model.stored_matrices import restored, to_int8


def test_int8_is_within_half_a_scale_of_every_weight():
    torch.manual_seed(0)
    matrix_RC = torch.randn(7, 1009) * torch.tensor([1.0, 1e-3, 0.0, 1e4, 1e-40, 1e-43, 1.0])[:, None]
    matrix_RC[6, 3] = -50.0  # one large weight makes its own row coarse, and no other
    steps_RC, scale_R = to_int8(matrix_RC)
    assert (steps_RC.dtype, scale_R.dtype, scale_R.shape) == (torch.int8, torch.float32, (7,))
    assert steps_RC.min() >= -127
    assert torch.equal(scale_R[[0, 1, 3, 6]], matrix_RC.abs().amax(dim=1)[[0, 1, 3, 6]] / 127)
    assert scale_R[2] == 1
    assert (steps_RC[2] == 0).all()
    found_RC = restored({"w": steps_RC, "w_scale": scale_R})[0]["w"]
    error_R = (found_RC - matrix_RC).abs().amax(dim=1)
    half_R = scale_R * (0.5 + 1e-4)  # the quotient is rounded before it is rounded to an integer
    assert (error_R <= half_R)[[0, 1, 2, 3, 6]].all()
    assert (error_R[[4, 5]] <= matrix_RC.abs().amax(dim=1)[[4, 5]]).all(), "subnormal scales are themselves rounded"


def test_a_row_that_is_not_finite_does_not_come_back_finite():
    matrix_RC = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [3.0, 4.0]])
    steps_RC, scale_R = to_int8(matrix_RC)
    found_RC = restored({"w": steps_RC, "w_scale": scale_R})[0]["w"]
    assert found_RC.isfinite().tolist() == [[False, False], [False, False], [True, True]]


def test_an_int8_adapter_loads_as_float32(tmp_path):
    model = tiny_model(kind="attention")
    model.save_pretrained(tmp_path, matrix_dtype=torch.int8)
    stored, weights = load_file(tmp_path / "adapter.safetensors"), model.proj.state_dict()
    matrices = {key for key, value in weights.items() if value.ndim == 2}
    assert {key for key, value in stored.items() if value.dtype == torch.int8} == matrices
    assert stored.keys() - weights.keys() == {f"{key}_scale" for key in matrices}
    loaded = MEMModel.from_pretrained(tmp_path, base_llm_model=tiny_llm(), ocr_embed=ConvEncoder())
    for key, value in loaded.proj.state_dict().items():
        assert value.dtype == torch.float32
        if key in matrices:
            half_R1 = stored[f"{key}_scale"][:, None] * (0.5 + 1e-4)
            assert ((value - weights[key]).abs() <= half_R1).all(), key
            assert not torch.equal(value, weights[key])
        else:
            assert torch.equal(value, weights[key])


def test_a_given_state_is_stored_in_int8(tmp_path):
    model = tiny_model()
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state, matrix_dtype=torch.int8)
    other = tiny_model(seed=5)
    load_projection(other, tmp_path)
    torch.testing.assert_close(other.proj.linear1.weight, model.proj.linear1.weight + 1, rtol=0, atol=0.006)


def test_an_adapter_stored_again_is_the_same(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, matrix_dtype=torch.int8)
    other = tiny_model(seed=5)
    load_projection(other, tmp_path)
    other.save_pretrained(tmp_path / "again", matrix_dtype=torch.int8)
    again = load_file(tmp_path / "again" / "adapter.safetensors")
    for key, value in load_file(tmp_path / "adapter.safetensors").items():
        torch.testing.assert_close(again[key], value, rtol=1e-6, atol=0)


def test_the_file_has_half_and_a_quarter_of_the_size(tmp_path):
    model = tiny_model(kind="attention", hidden_size=192)
    for name, dtype in {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}.items():
        model.save_pretrained(tmp_path / name, matrix_dtype=dtype)
    whole, half, quarter = (
        (tmp_path / name / "adapter.safetensors").stat().st_size for name in ("float32", "bfloat16", "int8")
    )
    assert half / whole == pytest.approx(0.5, abs=0.01)
    assert quarter / whole == pytest.approx(0.25, abs=0.015)


def test_another_type_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"matrix_dtype=torch.float16: expected torch.bfloat16, torch.int8 or None"):
        tiny_model().save_pretrained(tmp_path / "new", matrix_dtype=torch.float16)
    assert not (tmp_path / "new").exists()


BROKEN = {
    "no scale": (lambda w: w.pop("linear1.weight_scale"), r": missing linear1.weight_scale, the scales of .*int8 \[24"),
    "no matrix": (lambda w: w.pop("linear1.weight"), ": missing linear1.weight; unexpected linear1.weight_scale[.]"),
    "scale of a float": (
        lambda w: w.update({"linear1.weight": w["linear1.weight"].float()}),
        ": unexpected linear1.weight_scale[.]",
    ),
    "short scale": (
        lambda w: w.update({"linear1.weight_scale": w["linear1.weight_scale"][:23].clone()}),
        r": linear1.weight_scale is float32 \[23\], expected float32 \[24\][.]",
    ),
    "scale of two dimensions": (
        lambda w: w.update({"linear1.weight_scale": w["linear1.weight_scale"][:, None].clone()}),
        r": linear1.weight_scale is float32 \[24, 1\], expected float32 \[24\][.]",
    ),
    "half a scale": (
        lambda w: w.update({"linear1.weight_scale": w["linear1.weight_scale"].half()}),
        r": linear1.weight_scale is float16 \[24\], expected float32 \[24\][.]",
    ),
    "int8 bias": (
        lambda w: w.update({"linear1.bias": w["linear1.bias"].to(torch.int8)}),
        r": linear1.bias is int8 \[24\], expected float32 \[24\][.]",
    ),
    "other columns": (
        lambda w: w.update({"linear1.weight": w["linear1.weight"][:, :7].clone()}),
        r": linear1.weight is float32 \[24, 7\], expected float32 \[24, 11\][.]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_int8_is_loaded_strictly(case, tmp_path):
    breaking, message = BROKEN[case]
    model = tiny_model()
    model.save_pretrained(tmp_path, matrix_dtype=torch.int8)
    weights = load_file(tmp_path / "adapter.safetensors")
    breaking(weights)
    save_file(weights, tmp_path / "adapter.safetensors")
    before = model.proj.linear2.weight.clone()
    with pytest.raises(CheckpointError, match=f"does not fit this projection{message}"):
        load_projection(model, tmp_path)
    assert torch.equal(model.proj.linear2.weight, before)
