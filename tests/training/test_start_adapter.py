"""Runs that begin with the projection of another adapter."""

import dataclasses
import json

import pytest
import torch
from tiny_rivals import run_config, save_llm

from ocrmem.errors import CheckpointError
from ocrmem.model.adapter import load_projection, read_config
from ocrmem.model.mem_model import MEMModel
from ocrmem.training.build import build_model
from ocrmem.training.build_objectives import build_objective_trainer
from ocrmem.training.run import train

TEXT = "The geoid is the shape that the ocean surface would take under the influence of the gravity of Earth."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds an LLM, a corpus, and in `two` an adapter of two pieces, 10 steps to a memory token, in int8."""
    root = tmp_path_factory.mktemp("start")
    save_llm(root / "llm")
    (root / "corpus.jsonl").write_text(json.dumps({"id": "1", "text": TEXT}) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    model, _ = build_model(config(root, "two-run", steps_per_token=10, pieces=2))
    for matrix in model.proj.merge:
        torch.nn.init.normal_(matrix.weight, std=0.2)
    model.save_pretrained(root / "two", matrix_dtype=torch.int8)
    return root


def config(root, name, *, steps_per_token, pieces, **sections):
    return run_config(
        root / name,
        root / "llm",
        corpus=root / "corpus.jsonl",
        features="ocr",
        steps=1,
        encoder={"name": "pp-ocr", "settings": {"steps_per_token": steps_per_token}},
        projection={"kind": "attention", "num_layers": 1, "num_heads": 4, "pieces": pieces, "merge": True},
        **sections,
    )


def test_a_run_of_four_pieces_begins_as_the_adapter_of_two(folder):
    two, _ = build_model(config(folder, "two-run", steps_per_token=10, pieces=2, adapter=str(folder / "two")))
    four, _ = build_model(config(folder, "four", steps_per_token=20, pieces=4, adapter=str(folder / "two")))
    width = two.ocr_embed.feature_width
    assert four.ocr_embed.feature_width == 2 * width
    features_PVE = torch.randn(1, 6, width)
    of_two = two.proj(features_PVE)
    torch.testing.assert_close(four.proj(features_PVE), of_two)
    torch.testing.assert_close(four.proj(features_PVE.reshape(1, 3, 2 * width)), of_two[:, 1::2])


def test_the_pieces_that_it_lacks_are_learnt_and_saved(folder):
    begin = {"adapter": str(folder / "two")}
    result = train(config(folder, "learnt", steps_per_token=20, pieces=4, **begin))
    assert read_config(result.adapter).projection_settings.pieces == 4
    loaded = MEMModel.from_pretrained(result.adapter)
    assert all(matrix.weight.abs().max() > 0 for matrix in loaded.proj.merge)
    other, _ = build_model(config(folder, "four", steps_per_token=20, pieces=4, **begin))
    load_projection(other, result.adapter)  # strictly: nothing is missing any more


def test_an_adapter_of_fewer_pieces_is_no_adapter_of_more(folder, tmp_path):
    four, _ = build_model(config(folder, "four", steps_per_token=20, pieces=4))
    four.save_pretrained(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes((folder / "two" / "adapter.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="missing merge.2.weight; missing merge.3.weight"):
        MEMModel.from_pretrained(tmp_path)


def test_other_pieces_are_refused_at_the_start(folder):
    with pytest.raises(CheckpointError, match=r"linear1.weight is float32 \[32, \d+\], expected float32 \[32, \d+\]"):
        build_model(config(folder, "narrow", steps_per_token=10, pieces=4, adapter=str(folder / "two")))


def test_another_number_of_layers_over_pieces_is_refused_at_the_start(folder):
    none = config(folder, "none", steps_per_token=10, pieces=2, adapter=str(folder / "two"))
    none = dataclasses.replace(none, projection=dataclasses.replace(none.projection, num_layers=0))
    said = "has 1 attention layers over pieces, and this projection 0. Set projection.num_layers=1, or start from"
    with pytest.raises(CheckpointError, match=said):
        build_model(none)


@pytest.mark.parametrize("read_tokens", [0, 2])
def test_corpora_in_letters_that_are_not_read_are_named(folder, tmp_path, caplog, read_tokens):
    corpus = tmp_path / "corpus.jsonl"
    text = "Вчера мы ездили в деревню и купались в реке, а потом долго пили чай на веранде."
    corpus.write_text(json.dumps({"id": "1", "text": text}) + "\n", encoding="utf-8")
    given = config(folder, f"letters-{read_tokens}", steps_per_token=20, pieces=4)
    given = dataclasses.replace(
        given,
        projection=dataclasses.replace(given.projection, read_tokens=read_tokens),
        objectives=dataclasses.replace(given.objectives, corpora=[str(corpus)]),
    )
    with caplog.at_level("WARNING", logger="ocrmem.data.processor"):
        build_objective_trainer(given)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (1 if read_tokens else 0)
    assert all("characters are none that this projection reads (U+0412, U+0447, U+0435…)" in line for line in said)
