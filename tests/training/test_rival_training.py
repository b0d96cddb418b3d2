"""Trained rivals: what they read at every stage of a curriculum, and that they learn from it."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_rivals import PIECES, TOKENS_PER_PAGE, run_config, save_llm

from ocrmem.config.encoder import EncoderSettings
from ocrmem.data.bank import BankDocument, build_bank
from ocrmem.data.documents import read_documents
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import CheckpointError
from ocrmem.model.adapter import read_config
from ocrmem.model.llm import load_tokenizer
from ocrmem.model.mem_model import MEMModel
from ocrmem.training.build import build_model, find_data
from ocrmem.training.objectives import text_features
from ocrmem.training.packing import TOKENS_PER_PIECE, TOKENS_PER_SLOT, rival_slots
from ocrmem.training.run import train

TEXT = (
    "The geoid is the shape that the ocean surface would take under the influence of the gravity of Earth. It was "
    "described in 1828 by Gauss, who called"
)
WIDTH = 32


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Held-out leads at one piece to a memory token."""
    fine = build_encoder(EncoderSettings(settings={"steps_per_token": 5}))
    page = dataclasses.replace(fine.page, page_width=1600, page_height=384)
    encoder = build_encoder(EncoderSettings(settings={"steps_per_token": 5}), page=page)
    documents = [BankDocument(d.id, d.text) for d in read_documents(find_data("wiki-leads/heldout.jsonl"))[:20]]
    return build_bank(
        documents,
        encoder=encoder,
        tokenizer=load_tokenizer("smollm2-135m-instruct"),
        folder=tmp_path_factory.mktemp("banks"),
        encode=False,
    )


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "one-line.jsonl"
    path.write_text(json.dumps({"id": "1", "text": TEXT}) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["convolution", "mean-pooling"])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_every_text_token_is_dealt_once_and_in_order_at_every_stage(bank, kind, pieces):
    stage = bank.joined(pieces)
    tokens = pieces * TOKENS_PER_PIECE if kind == "convolution" else TOKENS_PER_SLOT
    for document in range(len(bank.documents)):
        first, count = int(bank.first_unit_K[document]), int(bank.num_units_K[document])
        units_PU = np.arange(first, first + count)[None]
        slots_PVT = rival_slots(stage, units_PU, kind, pieces=pieces)
        assert slots_PVT.shape == (1, count * 40 // pieces, tokens)
        begin, end = bank.token_range(document, 0, int(bank.unit_end_U[first + count - 1]))
        assert slots_PVT[slots_PVT >= 0].tolist() == bank.token_ids_T[begin:end].tolist()
        used = (slots_PVT[0] >= 0).any(axis=1)
        last = (count - 1) * 40 // pieces + int(stage.unit_tokens_U[first + count - 1])
        assert not used[last:].any(), "a token lies beyond the memory tokens in use"


def test_the_pieces_of_a_convolution_are_those_of_the_finest_stage(bank):
    units_PU = np.array([[0, 1]])  # whole lines
    slots = {p: rival_slots(bank.joined(p), units_PU, "convolution", pieces=p) for p in (1, 2, 4)}
    embedding = torch.nn.Embedding(50000, 3)
    features = {p: text_features(torch.from_numpy(found), embedding, "convolution") for p, found in slots.items()}
    for pieces in (2, 4):
        assert features[pieces].shape == (1, 80 // pieces, pieces * TOKENS_PER_PIECE * 3)
        assert torch.equal(features[pieces].reshape(features[1].shape), features[1])


def test_without_pieces_a_convolution_has_one_memory_token_as_kernel_and_stride(bank):
    slots_PVT = rival_slots(bank.joined(4), np.array([[0, 1]]), "convolution", pieces=None)
    assert np.array_equal(slots_PVT, rival_slots(bank.joined(4), np.array([[0, 1]]), "mean-pooling", pieces=None))
    assert slots_PVT.shape == (1, 20, TOKENS_PER_SLOT)


@pytest.mark.parametrize("kind", ["convolution", "mean-pooling"])
def test_a_rival_trains_through_the_curriculum(kind, llm, corpus, tmp_path):
    steps = 12
    config = run_config(tmp_path, llm, corpus=corpus, features=kind, steps=steps)
    result = train(config)
    losses = [entry["reconstruction_loss"] for entry in result.log_history if "reconstruction_loss" in entry]
    assert len(losses) == 3 * steps
    for stage in range(3):
        first, *_, last = losses[stage * steps : (stage + 1) * steps]
        assert last < first - 0.15, f"stage {stage} did not learn: {losses}"
    names = {key for entry in result.log_history for key in entry}
    assert {f"eval_reconstruction-1{name}_loss" for name in ("", "-pieces-1", "-pieces-2")} <= names

    torch.manual_seed(0)
    memory, _ = build_model(config)
    found, wanted = load_file(result.adapter / "adapter.safetensors"), memory.proj.state_dict()
    assert {key for key in wanted if found[key].shape != wanted[key].shape} == {"linear1.weight"}
    assert found["linear1.weight"].shape[1] == WIDTH * (TOKENS_PER_PIECE if kind == "convolution" else 1)

    written = json.loads((result.adapter / "config.json").read_text())
    assert written["rival"] == {"kind": kind, "pieces": PIECES, "tokens_per_page": TOKENS_PER_PAGE}
    assert read_config(result.adapter).projection_settings.pieces == (PIECES if kind == "convolution" else 1)
    assert f"--rival {kind}=" in (result.adapter / "README.md").read_text()
    with pytest.raises(CheckpointError, match=f"is a trained rival of a memory .{kind}.*ocrmem eval ADAPTER --rival"):
        MEMModel.from_pretrained(result.adapter)


@pytest.mark.parametrize("kind", ["convolution", "mean-pooling"])
def test_a_rival_goes_on_from_one_of_half_the_compression(kind, llm, corpus, tmp_path):
    half: dict[str, Any] = {
        "encoder": {"name": "pp-ocr", "settings": {"steps_per_token": 10}},
        "projection": {"kind": "attention", "num_layers": 1, "num_heads": 4, "pieces": 2, "gain": True},
    }
    first, _ = build_model(run_config(tmp_path, llm, corpus=corpus, features=kind, **half), rival=kind)
    first.save_pretrained(tmp_path / "half")
    config = run_config(tmp_path, llm, corpus=corpus, features=kind, adapter=str(tmp_path / "half"))
    second, _ = build_model(config, rival=kind)
    weights = first.proj.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in second.proj.state_dict().items())


def test_two_processes_learn_what_one_learns_from_as_many_rows(llm, corpus, tmp_path):
    """Row for row: two processes with a row each, and one that accumulates two."""
    training = {
        "learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1,
        "eval_strategy": "no", "save_strategy": "no", "seed": 0, "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip

    def config(name: str, **further: Any):
        values = {**training, **further}
        return run_config(
            tmp_path / name, llm, corpus=corpus, features="convolution", steps=2, training=values, optimizer=None
        )

    one = train(config("one", gradient_accumulation_steps=2))
    for entry in one.log_history:
        if "reconstruction_loss" in entry:
            assert entry["loss"] == pytest.approx(entry["reconstruction_loss"], rel=1e-3)
    config("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launcher, "-m", "ocrmem", "train", str(tmp_path / "two" / "config.yaml")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    weights = [load_file(tmp_path / name / "run" / "adapter" / "adapter.safetensors") for name in ("one", "two")]
    fresh, _ = build_model(config("fresh"), rival="convolution")
    assert not torch.allclose(weights[0]["linear1.weight"], fresh.proj.linear1.weight, atol=1e-3)
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)
