"""Objectives: the tasks, packed rows, and a run with the real LLM, encoder and corpora."""

import copy
import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_batch, tiny_model
from training.bank_parts import PAGE, PROSE, documents_of, memory_id, text_of

from ocrmem.config.memory import MemorySettings
from ocrmem.config.objectives import TASKS, ObjectiveSettings, Stage
from ocrmem.config.train import TrainConfig, load_train_config
from ocrmem.data.processor import MEMProcessor
from ocrmem.errors import ConfigError, DataError, SpliceError
from ocrmem.model.adapter import read_manifest
from ocrmem.model.packed_attention import PACKED
from ocrmem.model.reader import LETTERS, NONE, letter_codes
from ocrmem.training.build import training_arguments
from ocrmem.training.build_objectives import samplers
from ocrmem.training.objectives import FORWARD_KEYS, distillation_loss, text_features, varying_share
from ocrmem.training.optimizer import MuonAdamW
from ocrmem.training.packing import LEAST_REST, PackedRows, fill, pack, token_slots
from ocrmem.training.run import train
from ocrmem.training.tasks import TaskSampler
from ocrmem.types import Message


@pytest.mark.parametrize("task", ["reconstruction", "continuation", "recall", "cloze", "reply"])
def test_samples_of_every_task(task, sampler, tokenizer):
    bank = sampler.bank
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sample = sampler.sample(rng, Stage(steps=1, max_units=3 if task != "continuation" else 1, tasks={task: 1}))
        again = sampler.sample(
            np.random.default_rng(seed), Stage(steps=1, max_units=3 if task != "continuation" else 1, tasks={task: 1})
        )
        assert np.array_equal(sample.input_ids_T, again.input_ids_T)
        placeholders = sample.input_ids_T == sampler.memory_token_id
        assert placeholders.sum() == bank.num_tokens(sample.units)
        places = documents_of(bank, sample.units)
        text = "".join(bank.documents[k].text for k in sorted(set(places)))
        answers = tokenizer.decode(sample.input_ids_T[sample.labelled_T]).split("<|im_end|>")
        assert all(answer in text for answer in answers if answer)
        prompt = tokenizer.decode(sample.input_ids_T[~sample.labelled_T])
        if task == "reconstruction":
            assert answers[0] == text_of(bank, sample).strip()
        if task == "continuation":
            assert text[bank.unit_end_U[sample.units[-1]] :].startswith(answers[0])
        if task not in ("recall", "cloze"):
            assert len(set(places)) == 1
        if task == "cloze":
            assert "____" in prompt
            assert all(answer in text_of(bank, sample) for answer in answers)
        assert (sample.teacher_ids_T is not None) == (task in ("continuation", "reply"))
        if sample.teacher_ids_T is not None:
            assert text_of(bank, sample).strip() in tokenizer.decode(sample.teacher_ids_T)
            labels = sample.input_ids_T[sample.labelled_T]
            assert np.array_equal(labels, sample.teacher_ids_T[sample.teacher_labelled_T])


def test_replies_are_joined_as_the_chat_template_writes_them(sampler, tokenizer, bank):
    counts = set()
    for seed in range(12):
        sample = sampler.sample(np.random.default_rng(seed), Stage(steps=1, max_units=3, tasks={"reply": 1}))
        document = bank.documents[documents_of(bank, sample.units)[0]]
        whole = tokenizer.decode(sample.input_ids_T)
        said = whole.rpartition(sampler.frame.chat_format.memory_token)[2].strip()
        replies = tokenizer.decode(sample.input_ids_T[sample.labelled_T]).split("<|im_end|>")[:-1]
        counts.add(len(replies))
        turns = [(role, document.text[start:end]) for role, start, end in document.turns]
        last = max(i for i, (_, content) in enumerate(turns) if content.strip() == replies[-1].strip())
        chat_format = sampler.frame.chat_format
        for first in range(last, -1, -1):  # the turns that stay text: those from some cut on
            messages = [Message(role, content) for role, content in turns[first : last + 1]]
            text = chat_format.text(messages, add_generation_prompt=False, num_placeholders=1)
            if text.partition(chat_format.memory_token)[2].strip() == said:
                break
        else:
            pytest.fail(f"not as the template writes it: {said}")
    assert max(counts) >= 2


def test_a_text_with_the_placeholder_in_it_never_trains(bank, frame):
    token = memory_id(frame)
    ids = bank.token_ids_T.copy()
    ids[bank.first_token_K[1]] = token
    sampler = TaskSampler(dataclasses.replace(bank, token_ids_T=ids), frame, memory_token_id=token)
    samples = [sampler.sample(np.random.default_rng(i), Stage(steps=1, max_units=2)) for i in range(40)]
    assert {k for sample in samples for k in documents_of(bank, sample.units)} == {0, 2}


def test_rows_are_decided_by_their_number(bank, frame):
    settings = ObjectiveSettings(
        corpora=("x",),
        packed_length=1024,
        warm_start_steps=1,
        stages=(Stage(steps=1, max_units=2), Stage(steps=1, max_units=4)),
    )
    by_pieces = {4: TaskSampler(bank.joined(4), frame, memory_token_id=memory_id(frame))}
    rows = PackedRows(by_pieces, settings, seed=0, rows_per_step=2, pad_token_id=0)
    assert len(rows) == 6
    assert ["warm_start" in rows[i] for i in range(6)] == [True, True, False, False, False, False]
    assert torch.equal(rows.checked_row()["input_ids"], rows[2]["input_ids"])
    warm = rows[0]
    assert 1024 <= int(warm["page_num_tokens"].sum()) < 1024 + 2 * by_pieces[4].bank.tokens_per_unit
    assert warm["slots"].shape[:2] == (len(warm["units"]), warm["units"].shape[1] * by_pieces[4].bank.tokens_per_unit)
    assert torch.equal(rows[3]["input_ids"], rows[3]["input_ids"])
    assert not torch.equal(rows[3]["input_ids"], rows[4]["input_ids"])
    row = rows[5]
    edges = row["cu_seq_lens_q"]
    assert edges[0] == 0
    assert edges[-1] == row["input_ids"].shape[1] == 1024
    assert row["max_length_q"] == int(edges.diff().max())
    assert (row["position_ids"][0, edges[:-1].long()] == 0).all()
    assert int(row["page_num_tokens"].sum()) == int((row["input_ids"] == memory_id(frame)).sum())


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_rows_say_which_tokens_and_letters_are_within_each_piece(bank, frame, pieces):
    by_pieces = {n: TaskSampler(bank.joined(n), frame, memory_token_id=memory_id(frame)) for n in {pieces, 4}}
    stage = Stage(steps=1, max_units=2, pieces=pieces)
    settings = ObjectiveSettings(corpora=("x",), packed_length=1024, warm_start_steps=1, stages=(stage,))
    rows = PackedRows(by_pieces, settings, seed=0, rows_per_step=1, pad_token_id=0, reading_bank=bank)
    tokenizer = frame.chat_format.tokenizer
    for row in (rows[0], rows[1]):
        ids_PVT, letters_PVL = row["memory_token_ids"], row["memory_letters"]
        pages, per_page = row["units"].shape
        assert ids_PVT.shape == letters_PVL.shape == (pages, per_page * bank.tokens_per_unit, LETTERS)
        for page, page_units in enumerate(row["units"].tolist()):
            text = ""
            for place, unit in enumerate(page_units):
                letters_VL = letters_PVL[page, place * bank.tokens_per_unit : (place + 1) * bank.tokens_per_unit]
                used = bank.unit_tokens_U[unit] if unit >= 0 else 0
                assert not (letters_VL[used:] != NONE).any()
                if unit < 0:
                    continue
                (document,) = documents_of(bank, [unit])
                edges = [*bank.slot_chars_UV[unit, :used].tolist(), int(bank.unit_end_U[unit])]
                for letters_L, (left, right) in zip(letters_VL, itertools.pairwise(edges), strict=False):
                    drawn = letter_codes(bank.documents[document].text[left:right])
                    assert letters_L[letters_L != NONE].tolist() == drawn.tolist()
                text += bank.documents[document].text[edges[0] : edges[-1]]
            found = ids_PVT[page]
            assert found[found >= 0].tolist() == tokenizer(text.removesuffix(" "))["input_ids"]
    without = PackedRows(by_pieces, settings, seed=0, rows_per_step=1, pad_token_id=0)
    assert "memory_token_ids" not in without[0]
    assert "memory_token_ids" not in without[1]
    assert "memory_letters" not in without[1]


def test_pages_of_their_own_are_read_beside_the_llms(bank, frame):
    by_pieces = {n: TaskSampler(bank.joined(n), frame, memory_token_id=memory_id(frame)) for n in (1, 4)}
    settings = ObjectiveSettings(
        corpora=("x",),
        packed_length=1024,
        warm_start_steps=1,
        reading_tokens=300,
        stages=(Stage(steps=1, max_units=2, pieces=1), Stage(steps=2, max_units=4)),
    )
    rows = PackedRows(by_pieces, settings, seed=0, rows_per_step=1, pad_token_id=0, reading_bank=bank)
    assert ["reading" in rows[i] for i in range(4)] == [False, False, True, True]
    assert "reading" in rows.checked_row()
    row = rows[2]
    assert 300 <= int(row["reading"]["page_num_tokens"].sum()) < 300 + 4 * by_pieces[4].bank.tokens_per_unit
    shapes = [(len(p["units"]), p["units"].shape[1] * bank.tokens_per_unit) for p in (row, row["reading"])]
    assert row["memory_token_ids"].shape[:2] == shapes[0]
    assert row["reading"]["memory_letters"].shape == (*shapes[1], LETTERS)
    assert "memory_letters" not in row
    assert "memory_token_ids" not in row["reading"]  # no memory is made of them
    assert not torch.equal(row["reading"]["units"], row["units"])
    assert not torch.equal(row["reading"]["units"], rows[3]["reading"]["units"])
    alone = dataclasses.replace(settings, reading_tokens=0)
    same = PackedRows(by_pieces, alone, seed=0, rows_per_step=1, pad_token_id=0, reading_bank=bank)
    assert torch.equal(same[2]["input_ids"], row["input_ids"])
    rival = PackedRows(by_pieces, settings, seed=0, rows_per_step=1, pad_token_id=0)
    assert "reading" not in rival[2]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_warm_start_takes_its_share_from_the_lexicon(bank, frame, share):
    shuffled = [dataclasses.replace(document, shuffled=number == 1) for number, document in enumerate(bank.documents)]
    sampler = TaskSampler(
        dataclasses.replace(bank, documents=shuffled).joined(4), frame, memory_token_id=memory_id(frame)
    )
    settings = ObjectiveSettings(
        corpora=("x",),
        lexicon=0.1,
        warm_start_lexicon=share,
        warm_start_steps=1,
        packed_length=4096,
        stages=(Stage(steps=1, max_units=1),),
    )
    rows = PackedRows({4: sampler}, settings, seed=0, rows_per_step=1, pad_token_id=0)
    units = rows[0]["units"]
    found = np.mean(np.array(documents_of(bank, units[units >= 0].tolist())) == 1)
    of_all = bank.num_units_K[1] / bank.num_units_K.sum()
    assert found == pytest.approx(share + (1 - share) * of_all, abs=0.15)
    if share:
        none = PackedRows(
            {4: TaskSampler(bank.joined(4), frame, memory_token_id=memory_id(frame))},
            settings, seed=0, rows_per_step=1, pad_token_id=0,
        )  # fmt: skip
        with pytest.raises(DataError, match=f"warm_start_lexicon={share}, and no document of the lexicon has 1 units"):
            none[0]
    with pytest.raises(ConfigError, match="warm_start_lexicon=0.5 with lexicon=0.0: expected a share from 0 to 1"):
        dataclasses.replace(settings, warm_start_lexicon=0.5, lexicon=0.0)


def test_a_warm_start_without_text_long_enough_is_refused(bank, frame):
    settings = ObjectiveSettings(
        corpora=("x",), warm_start_steps=1, stages=(Stage(steps=1, min_units=500, max_units=500),)
    )
    by_pieces = {4: TaskSampler(bank.joined(4), frame, memory_token_id=memory_id(frame))}
    rows = PackedRows(by_pieces, settings, seed=0, rows_per_step=1, pad_token_id=0)
    with pytest.raises(DataError, match="no document of the corpora has 500 units"):
        rows[0]


def test_questions_are_about_several_texts(sampler):
    stage = Stage(steps=1, max_units=8, tasks={"recall": 1})
    samples = [sampler.sample(np.random.default_rng(i), stage) for i in range(30)]
    assert max(len(set(documents_of(sampler.bank, sample.units))) for sample in samples) > 1
    assert all(len(sample.units) <= 8 for sample in samples)


def packed_row(sampler, tasks, *, shares=None, length=2048):
    rng = np.random.default_rng(0)
    samples = [sampler.sample(rng, Stage(steps=1, max_units=2, tasks={task: 1})) for task in tasks]
    token = sampler.memory_token_id
    return pack(samples, sampler.bank, length=length, pad_token_id=0, memory_token_id=token, shares=shares)


def test_a_task_weighs_its_share_however_long_its_answers(sampler):
    tasks = ("reconstruction", "cloze", "reconstruction", "recall")
    row = packed_row(sampler, tasks, shares={"reconstruction": 3, "cloze": 2, "recall": 1, "reply": 4})
    weights, task_of_label = row["target_weights"], row["task_of_label"]
    for task, share in (("reconstruction", 3), ("cloze", 2), ("recall", 1)):
        chosen = task_of_label == TASKS.index(task)
        assert float(weights[chosen].sum()) == pytest.approx(share / 6, rel=1e-5)
        assert float(weights[chosen].std(correction=0)) == pytest.approx(0, abs=1e-9)
    equal = packed_row(sampler, tasks)["target_weights"]
    torch.testing.assert_close(equal, torch.full_like(equal, 1 / len(equal)))


def test_a_row_that_was_counted_ahead_gives_the_same_loss_and_gradients(sampler):
    model = tiny_model("llama", vocab_size=49152, max_position_embeddings=2048)
    model.config.memory_token_id = sampler.memory_token_id
    row = packed_row(sampler, ("reconstruction", "recall", "reply"))
    pages, width = row["units"].shape
    features = torch.randn(pages, width * sampler.bank.tokens_per_unit, model.proj.feature_width)
    arguments = {key: row[key] for key in FORWARD_KEYS if key in row} | {"features": features}
    counted = model(**arguments)
    counted.loss.backward()
    grads = [parameter.grad.clone() for parameter in model.proj.parameters()]
    model.zero_grad()
    for key in ("placeholder_index", "memory_index", "target_index", "target_weights"):
        del arguments[key]
    plain = model(**arguments)
    plain.loss.backward()
    torch.testing.assert_close(counted.loss, plain.loss)
    assert torch.equal(counted.logit_positions, plain.logit_positions)
    for ahead, parameter in zip(grads, model.proj.parameters(), strict=True):
        torch.testing.assert_close(ahead, parameter.grad, rtol=1e-4, atol=1e-7)


def test_a_row_whose_placeholders_are_not_its_memory_is_refused(sampler):
    sample = sampler.sample(np.random.default_rng(0), Stage(steps=1, max_units=1))
    ids = sample.input_ids_T.copy()
    ids[ids == sampler.memory_token_id] = 0
    token = sampler.memory_token_id
    with pytest.raises(SpliceError, match="a packed row has 0 placeholders .id 16. and 10 memory tokens"):
        pack([dataclasses.replace(sample, input_ids_T=ids)], sampler.bank, length=512, pad_token_id=0,
             memory_token_id=token)  # fmt: skip


def test_a_sample_that_is_too_long_is_named(sampler):
    with pytest.raises(ConfigError, match="packed_length=20 is too short: the last sample drawn has"):
        fill(lambda: sampler.sample(np.random.default_rng(0), Stage(steps=1, max_units=1)), 20)


def test_a_row_is_filled_whatever_the_teacher_has_room_for(sampler):
    """Samples beyond its row are not distilled; a row of 4,096 positions has one of 2,048 for the teacher."""
    rng = np.random.default_rng(0)
    stage = Stage(steps=1, max_units=1, tasks={"continuation": 1})

    def draw():
        sample = sampler.sample(rng, stage)
        long = np.zeros(900, dtype=np.int64)
        return dataclasses.replace(sample, teacher_ids_T=long, teacher_labelled_T=long == 1)

    samples = fill(draw, 4096)
    assert 4096 - sum(len(sample.input_ids_T) for sample in samples) < 512
    assert [sample.teacher_ids_T is not None for sample in samples] == [True] * 2 + [False] * (len(samples) - 2)
    assert len(samples) > 4


def test_what_is_left_of_a_row_is_no_longer_than_its_samples(sampler):
    sample = sampler.sample(np.random.default_rng(0), Stage(steps=1, max_units=1))
    row = pack([sample], sampler.bank, length=4096, pad_token_id=0, memory_token_id=sampler.memory_token_id)
    lengths = row["cu_seq_lens_q"].diff()
    assert lengths[0] == len(sample.input_ids_T)
    assert lengths.sum() == 4096
    assert row["max_length_q"] == lengths.max() == max(LEAST_REST, len(sample.input_ids_T))
    assert torch.equal(row["position_ids"][0, lengths[0] :][:300], torch.arange(300) % int(lengths[1]))


def test_tasks_that_the_corpora_cannot_give_are_named(bank, frame):
    prose = dataclasses.replace(bank, tails={})
    sampler = TaskSampler(prose, frame, memory_token_id=memory_id(frame))
    with pytest.raises(DataError, match="no text for the tasks reply with histories of 1 to 2 units"):
        sampler.sample(np.random.default_rng(0), Stage(steps=1, max_units=2, tasks={"reply": 1}))


@pytest.mark.parametrize("attention", ["sdpa", PACKED])
def test_a_packed_row_gives_the_loss_of_its_samples_alone(attention):
    model = tiny_model("llama", kind="attention", attn_implementation=attention)
    batch = tiny_batch(side="right")
    total, count, rows = 0.0, 0, []
    page = 0
    for sample in range(3):
        length = int(batch["attention_mask"][sample].sum())
        pages = int(batch["num_pages"][sample])
        rows.append((batch["input_ids"][sample, :length], batch["labels"][sample, :length]))
        alone = {"input_ids": rows[-1][0][None], "labels": rows[-1][1][None]}
        if pages:
            alone |= {
                "pages": batch["pages"][page : page + pages],
                "page_num_tokens": batch["page_num_tokens"][page : page + pages],
                "num_pages": batch["num_pages"][sample : sample + 1],
            }
        page += pages
        labels = int((rows[-1][1][1:] != -100).sum())
        total += float(model(**alone).loss) * labels
        count += labels
    edges = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    labels = torch.cat([torch.cat([torch.tensor([-100]), row[1:]]) for _, row in rows])
    packed = model(
        input_ids=torch.cat([ids for ids, _ in rows])[None],
        labels=labels[None],
        position_ids=torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None],
        cu_seq_lens_q=torch.tensor(edges, dtype=torch.int32),
        max_length_q=int(np.diff(edges).max()),
        pages=batch["pages"],
        page_num_tokens=batch["page_num_tokens"],
        num_pages=batch["num_pages"].sum()[None],
        use_cache=False,
    )
    assert float(packed.loss) == pytest.approx(total / count, rel=1e-5)


def test_token_slots_follow_the_pixels_or_are_dealt_evenly(bank, tokenizer):
    units = np.array([[0, 1]])
    for evenly in (False, True):
        slots = token_slots(bank.joined(4), units, evenly=evenly)
        kept = [int(token) for token in slots[0].reshape(-1) if token >= 0]
        begin, end = bank.token_range(0, 0, int(bank.unit_end_U[1]))
        expected = bank.token_ids_T[begin:end].tolist()
        assert kept == expected or (not evenly and set(kept) <= set(expected) and len(kept) >= len(expected) - 2)
    load_V = (token_slots(bank.joined(4), units, evenly=True)[0] >= 0).sum(axis=1)
    in_use = bank.joined(4).tokens_on([0, 1])
    assert load_V[:in_use].max() - load_V[:in_use].min() <= 1, "evenly over the page, not line by line"
    assert not load_V[in_use:].any()
    by_pixels = token_slots(bank.joined(4), units, evenly=False)
    first = tokenizer.decode([token for token in by_pixels[0, 0] if token >= 0])
    assert PROSE.startswith(first.strip())
    assert 10 <= len(first) <= 24, "a memory token covers 16 characters"


def test_text_features():
    embedding = torch.nn.Embedding(10, 4)
    scale = embedding.weight.pow(2).mean().rsqrt()
    slots = torch.tensor([[[1, 2, -1], [-1, -1, -1]]], dtype=torch.int32)
    mean = text_features(slots, embedding, "mean-pooling")
    torch.testing.assert_close(mean[0, 0], (embedding.weight[1] + embedding.weight[2]) / 2 * scale)
    assert not mean[0, 1].any()
    side_by_side = text_features(slots, embedding, "convolution")
    assert side_by_side.shape == (1, 2, 12)
    torch.testing.assert_close(side_by_side[0, 0, 4:8], embedding.weight[2] * scale)


def test_varying_share_and_distillation():
    counts = torch.tensor([3, 3])
    same = torch.randn(2, 1, 5).expand(2, 3, 5)
    assert float(varying_share(same, counts)) < 1e-6
    assert float(varying_share(torch.randn(1, 3, 5).expand(2, 3, 5), counts)) == pytest.approx(1.0)
    logits = torch.randn(4, 9)
    assert float(distillation_loss(logits, logits)) == pytest.approx(0.0, abs=1e-6)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=logits.flip(0))
    )
    assert float(distillation_loss(logits.flip(0), logits)) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_muon_learns_and_resumes():
    def problem():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
        return net, MuonAdamW(net, lr=0.02), torch.randn(32, 6), torch.randn(32, 3)

    def step(net, optimizer, x, y):
        loss = (net(x) - y).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    net, optimizer, x, y = problem()
    losses = [step(net, optimizer, x, y) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    other, resumed, *_ = problem()
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step(other, resumed, x, y) == step(net, optimizer, x, y)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    schedule.step()
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.01}


CONFIG = {
    "encoder": {"name": "pp-ocr", "settings": {"steps_per_token": 20}},
    "page": PAGE,
    "memory": {"header": ""},
    "projection": {"kind": "attention", "num_layers": 1, "pieces": 4, "gain": True, "read_tokens": 2, "merge": True,
                   "deal_tokens": True},
    "optimizer": "muon",
    "objectives": {
        "corpora": ["wiki-leads/train.jsonl", "chitchat/train.jsonl"],
        "eval_corpora": ["wiki-leads/heldout.jsonl"],
        "max_chars": 3000,
        "lexicon": 0.3,
        "warm_start_steps": 2,
        "packed_length": 512,
        "log_memory_steps": 2,
        "stages": [
            {"steps": 1, "max_units": 1, "pieces": 1},
            {
                "steps": 2,
                "max_units": 1,
                "tasks": {"reconstruction": 1, "recall": 1, "reply": 1},
                "distillation": 0.5,
            },
        ],
    },
    "training": {
        "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1, "eval_steps": 5, "save_steps": 3, "seed": 0,
        "disable_tqdm": True,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("reading_tokens", [0, 64])
def test_a_run_with_objectives_learns_and_resumes_exactly(tmp_path, reading_tokens):
    def config(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**CONFIG, "output_dir": str(tmp_path / name)}))
        overrides = (f"feature_cache={tmp_path / 'features'}", f"objectives.reading_tokens={reading_tokens}")
        return load_train_config(path, overrides)

    whole = train(config("whole"))
    names = {key for entry in whole.log_history for key in entry}
    assert {"warm_start", "reading", "reconstruction_loss", "distillation", "memory_varies", "wrong_page_loss"} <= names
    assert {"eval_reconstruction-1_accuracy", "eval_reconstruction-1-pieces-1_loss_wrong_page"} <= names
    assert "eval_recall_loss" in names
    assert "eval_reply_loss" not in names  # the held-out file has no conversation
    manifest = read_manifest(whole.adapter)
    assert manifest["steps"] == 5
    assert len(manifest["documents"]) >= 3
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "adapter")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-5", ignore_errors=True)
    (tmp_path / "killed" / "train_config.yaml").unlink()
    again = train(config("killed"))
    assert again.resumed_from == 3
    first, second = (load_file(result.adapter / "adapter.safetensors") for result in (whole, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (
            {"stages": [{"steps": 1, "max_units": 1, "pieces": 3}]},
            "pieces=3: expected 1 to projection.pieces=4, and a divisor of the",
        ),
        (
            {"stages": [{"steps": 1, "max_units": 1, "pieces": 8}]},
            "pieces=8: expected 1 to projection.pieces=4",
        ),
    ],
)
def test_pieces_that_do_not_divide_are_refused(objectives, message, bank, frame, encoders):
    values = {**CONFIG, "output_dir": "x", "objectives": {**CONFIG["objectives"], **objectives}}
    from ocrmem.config.loader import from_mapping

    config = from_mapping(TrainConfig, values, where="")
    processor = MEMProcessor(frame.chat_format.tokenizer, encoder=encoders[0], memory=MemorySettings(header=""))
    with pytest.raises(ConfigError, match=message):
        samplers(bank, config, frame, processor)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": [{"steps": 0, "max_units": 1}]}, "steps=0: expected 1 or more"),
        ({"stages": [{"steps": 1, "min_units": 3, "max_units": 2}]}, "min_units=3 and max_units=2"),
        ({"stages": [{"steps": 1, "max_units": 2, "tasks": {"sing": 1}}]}, "unknown tasks .'sing'."),
        ({"stages": [{"steps": 1, "max_units": 1}], "reading_tokens": -1}, "reading_tokens=-1: expected 0 or more"),
        ({"stages": []}, "at least one file in `corpora` and one stage"),
        ({"features": "pixels", "stages": [{"steps": 1, "max_units": 1}]}, "features"),
        ({"stages": [{"steps": 1, "max_unit": 1}]}, "setting 'objectives.stages.max_unit'. Did you mean 'max_units'"),
    ],
)  # fmt: skip
def test_bad_objectives_are_refused(values, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "x", "objectives": {"corpora": ["a"], **values}}))
    with pytest.raises(ConfigError, match=message):
        load_train_config(path)


def test_the_gradient_check_can_be_switched_off_in_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: x\ngradient_check: off\n")
    assert load_train_config(path).gradient_check == "off"
    assert load_train_config(path, ["gradient_check=warn"]).gradient_check == "warn"
    assert training_arguments(load_train_config(path, ["training.save_strategy=no"])).save_strategy == "no"
    with pytest.raises(ConfigError, match="gradient_check='on': input should be 'error', 'warn' or 'off'"):
        load_train_config(path, ["gradient_check='on'"])


def test_pack_gives_the_rivals_their_tokens(bank, sampler):
    samples = [sampler.sample(np.random.default_rng(i), Stage(steps=1, max_units=2)) for i in range(2)]
    token = sampler.memory_token_id
    row = pack(samples, sampler.bank, length=512, pad_token_id=0, memory_token_id=token, features="mean-pooling")
    assert row["slots"].shape[:2] == (2, row["units"].shape[1] * 10)
    assert (row["slots"] >= 0).any()
