"""Trained rivals in an evaluation, on a tiny LLM with the real encoder and held-out text."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_rivals import PIECES, TOKENS_PER_PAGE, run_config, save_llm
from typer.testing import CliRunner

from ocrmem.cli import app
from ocrmem.data.bank import BankDocument, build_bank
from ocrmem.data.conversations import read_conversations
from ocrmem.data.documents import document_hash, read_documents
from ocrmem.errors import ConfigError, DataError
from ocrmem.evaluation.arms import Contexts
from ocrmem.evaluation.probes import cued_recall_probes
from ocrmem.evaluation.rivals import RIVALS, load_rival, parse_rivals
from ocrmem.evaluation.run import evaluate
from ocrmem.evaluation.scoring import Scorer, make_prompt
from ocrmem.evaluation.settings import EvalSettings
from ocrmem.training.build import build_model, find_data
from ocrmem.training.build_objectives import finest
from ocrmem.training.packing import rival_slots

SMALL = EvalSettings(
    samples=4, next_turn_samples=2, reading_chars=(200,), history_chars=700, answer_tokens=2, seeds=(0,)
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapter folders of a memory and its rivals, untrained: `memory`, `mean-pooling`, `convolution`."""
    root = tmp_path_factory.mktemp("adapters")
    llm = save_llm(root / "llm")
    for seed, name in enumerate(("memory", *RIVALS)):
        torch.manual_seed(seed)
        save(root, llm, name)
    return root


def save(root, llm, kind, *, name=None, documents=(), **sections):
    features = "ocr" if kind == "memory" else kind
    config = run_config(root / "configs", llm, corpus=root, features=features, **sections)
    model, _ = build_model(config, rival=None if kind == "memory" else kind)
    model.save_pretrained(root / (name or kind), manifest={"documents": list(documents), "steps": 7})
    return root / (name or kind)


@pytest.fixture(scope="module")
def model_and_processor(folders):
    model, processor = build_model(
        run_config(
            folders / "configs", folders / "llm", corpus=folders, features="ocr", adapter=str(folders / "memory")
        )
    )
    return model.eval(), processor


@pytest.fixture(scope="module")
def rivals(folders, model_and_processor):
    return [load_rival(kind, folders / kind, model=model_and_processor[0]) for kind in RIVALS]


@pytest.fixture(scope="module")
def probes():
    conversations = read_conversations(find_data("chitchat/heldout.jsonl"), max_conversations=20).conversations
    short = cued_recall_probes(conversations, history_chars=300, n=2, seed=0)
    return [*short, *cued_recall_probes(conversations, history_chars=3000, n=2, seed=0)]


@pytest.fixture(scope="module")
def contexts(probes, model_and_processor, rivals):
    return Contexts(probes, model_and_processor[1], device=torch.device("cpu"), rivals=rivals)


def test_a_rival_has_the_memorys_pages_and_all_text_tokens(contexts, probes, model_and_processor):
    tokenizer = model_and_processor[1].tokenizer
    assert contexts.arms[-2:] == RIVALS
    assert {len(memory.page_num_tokens) for memory in contexts.memories} >= {1, 3}
    for index, probe in enumerate(probes):
        memory = contexts.memories[index]
        ids = tokenizer(probe.history, add_special_tokens=False)["input_ids"]
        for kind in RIVALS:
            context = contexts.context(kind, index)
            slots_PVT = context.slots_PVT
            assert context.page_num_tokens == memory.page_num_tokens
            assert slots_PVT.shape[:2] == (len(memory.page_num_tokens), TOKENS_PER_PAGE)
            assert slots_PVT[slots_PVT >= 0].tolist() == ids
            for page, count in enumerate(memory.page_num_tokens):
                assert (slots_PVT[page, :count] >= 0).any(dim=1).all(), "a memory token in use reads nothing"
                assert (slots_PVT[page, count:] < 0).all()


def test_a_rival_reads_what_it_read_in_training(contexts, probes, model_and_processor, folders, tmp_path):
    """The bank of a training run, at its finest and joined, deals the same tokens to the same places."""
    model, processor = model_and_processor
    config = run_config(tmp_path, folders / "llm", corpus=tmp_path, features="convolution")
    bank = build_bank(
        [BankDocument(str(i), probe.history) for i, probe in enumerate(probes)],
        encoder=finest(config, model.ocr_embed),
        tokenizer=processor.tokenizer,
        folder=tmp_path,
        encode=False,
    ).joined(PIECES)
    for kind in RIVALS:
        for index in range(len(probes)):
            first = int(bank.first_unit_K[index])
            units_PU = np.arange(first, first + int(bank.num_units_K[index]))[None, : bank.units_per_page]
            trained = torch.from_numpy(rival_slots(bank, units_PU, kind, pieces=PIECES))
            assert torch.equal(contexts.context(kind, index).slots_PVT[:1, : trained.shape[1]], trained)


def test_every_rival_is_read_by_its_own_projection(contexts, probes, model_and_processor, rivals):
    model, processor = model_and_processor
    own = model.proj
    for rival in rivals:
        chosen = [contexts.context(rival.kind, i) for i in range(len(probes))]
        prompts = [make_prompt(p, c, processor.chat_format) for p, c in zip(probes, chosen, strict=True)]
        losses, _ = Scorer(model, processor).score(prompts)
        assert model.proj is own
        ids = torch.tensor([prompts[2].ids(processor.memory_token_id, with_target=True)])
        labels = torch.full_like(ids, -100)
        labels[0, -len(prompts[2].target) :] = ids[0, -len(prompts[2].target) :]
        with torch.no_grad():
            counts = torch.tensor(chosen[2].page_num_tokens)
            memory_PVD = rival.proj(rival.features(chosen[2].slots_PVT), counts)
            embeds_BSD = model.get_input_embeddings()(ids)
            places = ids[0] == processor.memory_token_id
            embeds_BSD[0, places] = torch.cat([page[:n] for page, n in zip(memory_PVD, counts, strict=True)])
            expected = model.base_llm_model(inputs_embeds=embeds_BSD, labels=labels).loss
        assert losses[2] == pytest.approx(float(expected), rel=1e-4)
        answer = Scorer(model, processor).answer(prompts, max_new_tokens=[3] * len(prompts))
        assert len(answer) == len(probes)


def prompts_of(arms, contexts, processor):
    return [
        make_prompt(probe, contexts.context(arm, index), processor.chat_format)
        for arm in arms
        for index, probe in enumerate(contexts.probes)
    ]


@pytest.fixture
def generated(model_and_processor, monkeypatch):
    """New token ids of every call of the LLM's `generate`, one list a row."""
    calls, llm = [], model_and_processor[0].base_llm_model
    generate = llm.generate

    def noted(**arguments):
        calls.append(generate(**arguments))
        return calls[-1]

    monkeypatch.setattr(llm, "generate", noted)
    return calls


def test_several_arms_in_one_call_answer_as_each_alone(contexts, model_and_processor, generated, monkeypatch):
    monkeypatch.setattr("ocrmem.evaluation.scoring.ANSWER_POSITIONS", 10**6)
    model, processor = model_and_processor
    arms = ("shuffled-memory", "convolution", "none", "memory", "full-text", "mean-pooling", "bm25")
    assert set(arms) <= set(contexts.arms)
    rooms = [5 + 3 * index for index in range(len(contexts.probes))]
    scorer, own = Scorer(model, processor), model.proj
    together = scorer.answer(prompts_of(arms, contexts, processor), max_new_tokens=rooms * len(arms))
    assert model.proj is own
    assert len(generated) == 1
    alone = {arm: scorer.answer(prompts_of([arm], contexts, processor), max_new_tokens=rooms) for arm in arms}
    assert together == [answer for arm in arms for answer in alone[arm]]
    assert len({tuple(answers) for answers in alone.values()}) == len(arms), "the arms cannot be told apart"


def test_several_arms_in_one_call_score_as_each_alone(contexts, model_and_processor):
    model, processor = model_and_processor
    arms = ("convolution", "memory", "full-text", "mean-pooling")
    scorer = Scorer(model, processor)
    together, _ = scorer.score(prompts_of(arms, contexts, processor))
    alone = [scorer.score(prompts_of([arm], contexts, processor))[0] for arm in arms]
    assert together == pytest.approx(np.concatenate(alone), rel=1e-4)


@pytest.mark.parametrize("has_end", [True, False])
def test_an_answer_has_no_more_than_its_own_length(has_end, contexts, model_and_processor, generated, monkeypatch):
    """Also where no token ends an answer, and `generate` goes on with one that is full."""
    model, processor = model_and_processor
    if not has_end:
        monkeypatch.setattr(model.base_llm_model.generation_config, "eos_token_id", None)
    prompts = prompts_of(["memory"], contexts, processor)[:2]
    scorer = Scorer(model, processor)
    for prompt in prompts:
        scorer.answer([prompt], max_new_tokens=[12])
    (short,), (long,) = (ids_BS.tolist() for ids_BS in generated)
    expected = [processor.tokenizer.decode(short[:3]), processor.tokenizer.decode(long)]
    assert scorer.answer(prompts, max_new_tokens=[3, 12]) == expected
    if has_end:
        assert sorted(generated[-1].tolist()) == sorted([short[:3] + [processor.pad_token_id] * 9, long])


def test_a_batch_ends_when_every_answer_has_ended_or_is_full(contexts, model_and_processor, generated, monkeypatch):
    """One answer may be long but ends itself soon: the other, which would go on, does not keep the batch going."""
    model, processor = model_and_processor
    prompts = prompts_of(["memory"], contexts, processor)[:2]
    scorer = Scorer(model, processor)
    for prompt in prompts:
        scorer.answer([prompt], max_new_tokens=[12])
    (ends,), (goes_on,) = (ids_BS.tolist() for ids_BS in generated)
    last = next(step for step in range(1, 5) if ends[step] not in (*ends[:step], *goes_on))
    monkeypatch.setattr(model.base_llm_model.generation_config, "eos_token_id", ends[last])
    answers = scorer.answer(prompts, max_new_tokens=[12, 6])
    assert generated[-1].shape == (2, 6)
    assert answers == [processor.tokenizer.decode(ends[: last + 1]), processor.tokenizer.decode(goes_on[:6])]


def test_the_command_writes_the_arms(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("ocrmem.evaluation.settings.EvalSettings", lambda **_: SMALL)
    given = [f"--rival={kind}={folders / kind}" for kind in RIVALS]
    output = tmp_path / "results.json"
    done = CliRunner().invoke(app, ["eval", str(folders / "memory"), *given, "--output", str(output)])
    assert done.exit_code == 0, done.output
    results = json.loads(output.read_text())
    assert {row["arm"] for row in results["left_out"]} == {"llmlingua-2"}
    assert results["rivals"] == [{"arm": kind, "steps": 7} for kind in RIVALS]
    reading = {(row["source"], row["arm"]): row for row in results["reading"]}
    for source in ("prose", "conversations"):
        for kind in RIVALS:
            row = reading[source, kind]
            assert row["ratio"] == reading[source, "memory"]["ratio"] > 1
            assert row["token_accuracy"]
            assert row["cer"]
    using = {(row["task"], row["source"], row["arm"]): row for row in results["using"]}
    for task, source, arm in list(using):
        if arm == "memory":
            for kind in RIVALS:
                row = using[task, source, kind]
                assert row["budget_tokens"] == using[task, source, "memory"]["budget_tokens"]
                assert row["ce"]["mean"] != using[task, source, "memory"]["ce"]["mean"]
                assert (row["exact_match"] is None) == (task == "next-turn")
    assert "prose, convolution:" in done.output


OTHER_PAGE = {"page": {"page_width": 1600, "page_height": 432}}
OTHER_STEPS = {"encoder": {"name": "pp-ocr", "settings": {"steps_per_token": 40}}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (OTHER_PAGE, r"--rival mean-pooling=.* trained on another page than the adapter .page_height=432 and not 384."),
        (OTHER_STEPS, "it has 40 memory tokens a page, and the adapter 80; .* encoder.settings.steps_per_token"),
    ],
)
def test_a_rival_of_another_memory_is_refused(sections, message, folders, model_and_processor):
    folder = save(folders, folders / "llm", "mean-pooling", name="other", **sections)
    with pytest.raises(ConfigError, match=message):
        load_rival("mean-pooling", folder, model=model_and_processor[0])


def test_a_rival_of_another_llm_is_refused(folders, model_and_processor, tmp_path):
    folder = save(tmp_path, save_llm(tmp_path / "llm", seed=5), "convolution")
    with pytest.raises(ConfigError, match="--rival convolution=.* does not fit the adapter: .* other weights"):
        load_rival("convolution", folder, model=model_and_processor[0])


def test_what_is_no_rival_of_the_kind_is_refused(folders, model_and_processor):
    model, _ = model_and_processor
    with pytest.raises(ConfigError, match="holds an adapter that reads pages, expected a trained rival of kind conv"):
        load_rival("convolution", folders / "memory", model=model)
    with pytest.raises(ConfigError, match="holds mean-pooling, expected .* objectives.features=convolution"):
        load_rival("convolution", folders / "mean-pooling", model=model)


def test_a_rival_that_was_trained_on_held_out_text_is_refused(folders):
    documents = read_documents(find_data("wiki-leads/heldout.jsonl"))[:1]
    hashes = [document_hash(document.text)[:16] for document in documents]
    folder = save(folders, folders / "llm", "convolution", name="seen", documents=hashes)
    settings = dataclasses.replace(SMALL, samples=1)
    with pytest.raises(DataError, match="the rival convolution was trained on 1 of"):
        evaluate(folders / "memory", settings, rivals={"convolution": folder})


@pytest.mark.parametrize("values", [["pooling=x"], ["convolution"], ["convolution="], ["ocr=x"]])
def test_the_option_is_a_kind_and_a_folder(values):
    with pytest.raises(ConfigError, match="expected KIND=FOLDER, with a kind of mean-pooling, convolution"):
        parse_rivals(values)


def test_a_kind_is_given_once():
    with pytest.raises(ConfigError, match="convolution was given already, as 'a'; give it once"):
        parse_rivals(["convolution=a", "convolution=b"])


def test_what_a_stopped_run_measured_is_taken_over(folders, tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    unfinished = tmp_path / "results.json.unfinished"

    def run(parts):
        monkeypatch.setattr(
            "ocrmem.evaluation.settings.EvalSettings", lambda **_: dataclasses.replace(SMALL, parts=parts)
        )
        given = ["eval", str(folders / "memory"), "--parts", ",".join(parts), "--output", str(output)]
        return CliRunner().invoke(app, given)

    with monkeypatch.context() as patch:
        patch.setattr("ocrmem.evaluation.run._Run.using", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(("reading", "using")).exit_code != 0
        stopped = unfinished.read_text()
        unfinished.write_text(json.dumps({**json.loads(stopped), "device": "another"}))
        refused = run(("using",))  # before anything is measured
        assert f"{unfinished} holds an evaluation with device another" in f"{refused.output} {refused.exception}"
        unfinished.write_text(stopped)
    assert not output.exists()
    reading = json.loads(stopped)["reading"]
    assert reading
    done = run(("using",))
    assert done.exit_code == 0, done.output
    results = json.loads(output.read_text())
    assert results["reading"] == reading
    assert results["using"]
    assert not unfinished.exists()
    monkeypatch.setattr("ocrmem.evaluation.run._Run.reading", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(("reading",)).exit_code != 0
    assert not unfinished.exists()  # it measured nothing
    assert json.loads(output.read_text()) == results


def test_what_was_not_read_aloud_is_printed_without_an_error_rate(folders, tmp_path, monkeypatch):
    asked = dataclasses.replace(SMALL, parts=("reading",), answers=False)
    monkeypatch.setattr("ocrmem.evaluation.settings.EvalSettings", lambda **_: asked)
    output = tmp_path / "results.json"
    done = CliRunner().invoke(app, ["eval", str(folders / "memory"), "--no-answers", "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "memory" in done.stdout
    assert "token accuracy" in done.stdout
    assert "character error rate" not in done.stdout
