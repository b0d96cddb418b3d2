"""Arms and scoring with the real LLM, encoder and held-out text."""

import dataclasses
import json

import pytest
import torch

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.projection import ProjectionSettings
from ocrmem.config.train import TrainConfig
from ocrmem.data.conversations import read_conversations
from ocrmem.data.documents import document_hash, read_documents
from ocrmem.errors import ConfigError, DataError
from ocrmem.evaluation import arms
from ocrmem.evaluation.arms import Contexts
from ocrmem.evaluation.probes import cued_recall_probes
from ocrmem.evaluation.report import check_schema, write_report
from ocrmem.evaluation.run import evaluate
from ocrmem.evaluation.scoring import Scorer, make_prompt
from ocrmem.evaluation.settings import EvalSettings
from ocrmem.memory.features import FeatureStore
from ocrmem.training.build import build_model, find_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_and_processor(tmp_path_factory):
    torch.manual_seed(0)
    config = TrainConfig(
        output_dir="x",
        encoder=EncoderSettings(settings={"steps_per_token": 20}),
        page={"page_width": 1600, "page_height": 384},
        projection=ProjectionSettings(kind="attention", num_layers=1, pieces=4, gain=True),
    )
    model, processor = build_model(config)
    processor.store = FeatureStore(tmp_path_factory.mktemp("features"))
    return model.eval(), processor


@pytest.fixture(scope="module")
def probes():
    conversations = read_conversations(find_data("chitchat/heldout.jsonl"), max_conversations=20).conversations
    return cued_recall_probes(conversations, history_chars=700, n=3, seed=0)


@pytest.fixture(scope="module")
def contexts(model_and_processor, probes):
    return Contexts(probes, model_and_processor[1], device=torch.device("cpu"))


def test_no_arm_but_the_full_text_has_more_tokens_than_the_memory(contexts, probes):
    for index in range(len(probes)):
        budget = contexts.budget(index)
        assert 0 < budget < len(contexts.history_ids[index])
        for arm in contexts.arms:
            used = contexts.context(arm, index).num_tokens
            if arm == "full-text":
                assert used == len(contexts.history_ids[index])
            elif arm == "none":
                assert used == 0
            elif arm == "other-memory":
                assert used == contexts.budget((index + 1) % len(probes))
            else:
                assert used <= budget
        for arm in ("first-n", "last-n", "bm25", "memory", "shuffled-memory"):
            assert contexts.context(arm, index).num_tokens == budget


def test_the_retriever_finds_the_sentence(contexts, probes, model_and_processor):
    tokenizer = model_and_processor[1].tokenizer
    found = sum(
        probe.target[:20] in tokenizer.decode(contexts.snippets(index, contexts.budget(index)))
        for index, probe in enumerate(probes)
    )
    assert found >= 2


def test_scores_are_those_of_one_prompt_alone(model_and_processor, contexts, probes):
    model, processor = model_and_processor
    scorer = Scorer(model, processor)
    for arm in ("full-text", "memory"):
        prompts = [make_prompt(p, contexts.context(arm, i), processor.chat_format) for i, p in enumerate(probes)]
        losses, accuracies = scorer.score(prompts)
        alone, _ = scorer.score(prompts[1:2])
        assert losses[1] == pytest.approx(alone[0], rel=1e-4)
        ids = torch.tensor([prompts[1].ids(processor.memory_token_id, with_target=True)])
        context = prompts[1].context
        memory = {}
        if context.features_PVE is not None:
            memory = {
                "features": context.features_PVE,
                "page_num_tokens": torch.tensor(context.page_num_tokens),
                "num_pages": torch.tensor([len(context.page_num_tokens)]),
            }
        labels = torch.full_like(ids, -100)
        labels[0, -len(prompts[1].target) :] = ids[0, -len(prompts[1].target) :]
        with torch.no_grad():
            assert losses[1] == pytest.approx(float(model(input_ids=ids, labels=labels, **memory).loss), rel=1e-4)
        assert ((accuracies >= 0) & (accuracies <= 1)).all()
        assert processor.tokenizer.decode(prompts[1].target) == probes[1].target + "<|im_end|>"


def test_the_full_text_helps_and_a_shuffled_memory_is_another(model_and_processor, contexts, probes):
    model, processor = model_and_processor
    scorer = Scorer(model, processor)

    def losses(arm):
        prompts = [make_prompt(p, contexts.context(arm, i), processor.chat_format) for i, p in enumerate(probes)]
        return scorer.score(prompts)[0]

    assert losses("full-text").mean() < losses("none").mean() - 0.5
    assert (abs(losses("shuffled-memory") - losses("memory")) > 1e-5).any()


def test_an_arm_without_its_package_is_named_and_left_out(contexts, monkeypatch):
    monkeypatch.setattr(arms, "bm25s", None)
    assert "bm25" not in contexts.arms
    assert "memory" in contexts.arms
    assert arms.arms_left_out()[0] == ("bm25", "the package bm25s is not installed; pip install ocrmem[eval]")


SMALL = EvalSettings(
    samples=2,
    next_turn_samples=2,
    reading_chars=(200,),
    history_chars=900,
    answer_tokens=4,
    seeds=(0, 1),
    cost_repeats=1,
)


def test_an_evaluation_fills_every_table(model_and_processor, tmp_path):
    model, _ = model_and_processor
    model.save_pretrained(tmp_path / "adapter", manifest={"documents": [], "steps": 7})
    steps, kept = [], []
    results = evaluate(
        tmp_path / "adapter",
        SMALL,
        progress=lambda name, done, total: steps.append((name, done, total)),
        keep=kept.append,
    )
    # Nothing yet, one length and four tasks; whoever stops after the third has the rows of three.
    assert [len({(row["task"], row["source"]) for row in found["using"]}) for found in kept] == [0, 0, 1, 2, 3, 4]
    assert kept[1]["reading"] == results["reading"]
    assert kept[3]["using"] == results["using"][: len(kept[3]["using"])]
    assert check_schema(json.loads(json.dumps(results)), source="results")["adapter"]["steps"] == 7
    assert {row["arm"] for row in results["reading"]} == {"memory", "full-text", "none"}
    assert {row["arm"] for row in results["using"]} >= {"none", "full-text", "memory", "bm25", "untrained-projection"}
    assert {row["task"] for row in results["using"]} == {"cued-recall", "cloze", "next-turn"}
    assert {row["arm"] for row in results["left_out"]} == {"llmlingua-2", "mean-pooling", "convolution"}
    assert all(done <= total for _, done, total in steps)
    assert steps.index(("reading 200: answers", 0, 4)) < steps.index(("reading 200: answers", 4, 4))
    page = write_report(_written(results, tmp_path), tmp_path / "docs")
    assert "untrained-projection" in page.read_text()


def test_arms_that_are_not_asked_for_are_named(model_and_processor, tmp_path):
    model_and_processor[0].save_pretrained(tmp_path / "adapter", manifest={"documents": [], "steps": 7})
    asked = dataclasses.replace(SMALL, parts=("using",), arms=("memory-ledger", "bm25"), answers=False)
    results = evaluate(tmp_path / "adapter", asked)
    found = {row["arm"] for row in results["using"]}
    assert found == {"none", "full-text", "bm25", "memory", "memory-ledger"}
    assert all(row["token_f1"] is None for row in results["using"])
    read = evaluate(tmp_path / "adapter", dataclasses.replace(asked, parts=("reading",)))["reading"]
    assert {row["arm"] for row in read if row["token_accuracy"]["mean"] >= 0} == {"memory", "full-text", "none"}
    assert all(row["cer"] is None and row["identifier_recall"] is None for row in read)
    reasons = {row["arm"]: row["reason"] for row in results["left_out"]}
    assert reasons["untrained-projection"] == reasons["last-n"] == "not asked for"
    assert not found & set(reasons)
    assert dataclasses.replace(asked, parts=("reading",)).not_asked_for() == []
    assert asked.asks_for("convolution"), "a rival that is given takes part"
    given = ({"parts": ("using",)}, {"arms": ("bm25",)}, {"answers": False}, {"samples": 7})
    assert [EvalSettings(**one).whole for one in given] == [False, False, False, True]
    with pytest.raises(ConfigError, match="unknown arms bm52: expected some of none, full-text"):
        EvalSettings(arms=("bm52",))


def _written(results, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(results))
    return folder


def test_text_that_it_was_trained_on_is_refused(model_and_processor, tmp_path):
    documents = read_documents(find_data("wiki-leads/heldout.jsonl"))
    trained = [document_hash(document.text)[:16] for document in documents]
    model_and_processor[0].save_pretrained(tmp_path / "adapter", manifest={"documents": trained, "steps": 7})
    with pytest.raises(DataError, match="trained on"):
        evaluate(tmp_path / "adapter", SMALL)
