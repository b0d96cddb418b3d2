"""Exact text behind a sample's memory: what it holds, what it costs, and that samples without it stay as they were."""

import hashlib

import numpy as np
import pytest

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.memory import MemorySettings
from ocrmem.config.objectives import TASKS, ObjectiveSettings, Stage
from ocrmem.data.bank import build_bank
from ocrmem.data.processor import MEMProcessor
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import ConfigError
from ocrmem.model.llm import load_tokenizer
from ocrmem.session.memory import LEDGER_HEADING, RECALL_HEADING
from ocrmem.training import tasks
from ocrmem.training.build import find_data
from ocrmem.training.build_objectives import evaluation_rows
from ocrmem.training.corpus import read_corpora
from ocrmem.training.exact_text import exact_ids
from ocrmem.training.packing import PackedRows
from ocrmem.training.tasks import Frame, TaskSampler

WITHOUT = "eabf9fb0ae6d06bada4b012b308bd5c1aed1ca40d4211aa57deddbde72b26a24"
"""SHA-256 of samples of every task without exact text, and of the generator's state behind them."""
AS_BEFORE = "9ccda0dadfa048d3f2f1781acebb07acb0a1fb3e33c9e25ab9011140de24ca72"
"""The same from before there was exact text, when lines that end early were counted short in the middle of a page."""


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    encoder = build_encoder(EncoderSettings(settings={"steps_per_token": 12}))
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    documents = read_corpora(
        [find_data("wiki-leads/heldout.jsonl"), find_data("chitchat/heldout.jsonl")], max_chars=20_000
    )
    folder = tmp_path_factory.mktemp("banks")
    bank = build_bank(documents, encoder=encoder, tokenizer=tokenizer, folder=folder, encode=False)
    chat_format = MEMProcessor(tokenizer, encoder=encoder, memory=MemorySettings(header="")).chat_format
    token = tokenizer.convert_tokens_to_ids(chat_format.memory_token)
    return TaskSampler(bank, Frame(chat_format), memory_token_id=token)


def drawn(sampler, task, seed, **settings):
    stage = Stage(steps=1, **{"min_units": 3, "max_units": 24, "tasks": {task: 1}, **settings})
    return sampler.sample(np.random.default_rng(seed), stage)


def behind_memory(sampler, sample):
    """Token ids between the memory and the template's text behind it."""
    last = int((sample.input_ids_T == sampler.memory_token_id).nonzero()[0][-1])
    end = sampler.frame.ids("<|im_end|>")[0]
    rest = sample.input_ids_T[last + 1 :].tolist()
    return rest[: rest.index(end)]


@pytest.mark.parametrize("expected", [WITHOUT, AS_BEFORE], ids=["now", "before"])
def test_without_it_samples_are_as_they_were(sampler, monkeypatch, expected):
    if expected == AS_BEFORE:
        counted_short = lambda bank, page: int(bank.unit_tokens_U[list(page)].sum())  # noqa: E731
        monkeypatch.setattr(type(sampler.bank), "tokens_on", counted_short)
    digest = hashlib.sha256()
    for task in TASKS:
        rng = np.random.default_rng(7)
        for _ in range(4):
            stage = Stage(steps=1, max_units=1 if task == "continuation" else 8, tasks={task: 1}, exact=0.0)
            sample = sampler.sample(rng, stage)
            for array in (sample.input_ids_T, sample.labelled_T, np.array(sample.units, dtype=np.int64)):
                digest.update(array.tobytes())
            if sample.teacher_ids_T is not None:
                digest.update(sample.teacher_ids_T.tobytes())
        digest.update(rng.random(4).tobytes())
    assert digest.hexdigest() == expected


@pytest.mark.parametrize("task", ["recall", "cloze", "reply"])
def test_it_stands_behind_the_memory_in_place_of_the_oldest_units(task, sampler):
    bank, tokenizer = sampler.bank, sampler.frame.chat_format.tokenizer
    seen = []
    for seed in range(24):
        plain, sample = (drawn(sampler, task, seed, min_units=6, exact=exact) for exact in (0.0, 1.0))
        exact = behind_memory(sampler, sample)
        placeholders = sample.input_ids_T == sampler.memory_token_id
        assert placeholders.sum() == bank.num_tokens(sample.units)
        assert np.diff(placeholders.nonzero()[0]).max(initial=1) == 1
        assert np.array_equal(sample.input_ids_T[sample.labelled_T], plain.input_ids_T[plain.labelled_T])
        assert (sample.teacher_ids_T is None) == (plain.teacher_ids_T is None)
        if sample.teacher_ids_T is not None:
            assert np.array_equal(sample.teacher_ids_T, plain.teacher_ids_T)
        if not exact:
            assert np.array_equal(sample.input_ids_T, plain.input_ids_T)
            continue
        left_out = plain.units[: len(plain.units) - len(sample.units)]
        assert sample.units == plain.units[len(left_out) :]
        whole = bank.num_tokens(plain.units)
        *fewer, spared = (whole - bank.num_tokens(plain.units[number:]) for number in range(len(left_out) + 1))
        assert max(fewer) < len(exact) <= spared
        assert len(sample.input_ids_T) == len(plain.input_ids_T) - spared + len(exact)
        head = sampler.frame.head
        body = [token for token in sample.input_ids_T[len(head) :] if token != sampler.memory_token_id]
        assert body[: len(exact)] == exact
        assert body[len(exact) :] == [t for t in plain.input_ids_T[len(head) :] if t != sampler.memory_token_id]
        text = tokenizer.decode(exact)
        assert text.startswith("\n\n")
        assert len(exact) < 0.375 * whole + 6
        seen.append(text)
    assert len(seen) >= 8
    assert any(LEDGER_HEADING in text or RECALL_HEADING in text for text in seen)
    assert not all(LEDGER_HEADING in text or RECALL_HEADING in text for text in seen)


def test_a_short_memory_and_other_tasks_have_none(sampler):
    for task in ("recall", "cloze", "reply"):
        for seed in range(60):
            few = [drawn(sampler, task, seed, min_units=1, max_units=2, exact=exact) for exact in (0.0, 1.0)]
            if len(few[0].units) <= 2:  # a reply's may have a tail besides
                assert np.array_equal(few[0].input_ids_T, few[1].input_ids_T)
    for seed in range(6):
        plain, sample = (drawn(sampler, "reconstruction", seed, exact=exact) for exact in (0.0, 1.0))
        assert np.array_equal(plain.input_ids_T, sample.input_ids_T)


def test_the_share_is_that_of_the_stage(sampler):
    found = [bool(behind_memory(sampler, drawn(sampler, "cloze", seed, min_units=6, exact=0.3))) for seed in range(120)]
    assert 0.15 < np.mean(found) < 0.45


def test_what_it_holds(sampler):
    chat_format = sampler.frame.chat_format
    memory_token = chat_format.memory_token
    told = "user: My code is XK-7731-B and my dog is Bruin.\n"
    texts = [told + "assistant: It rains over the hills today.\n" * 2, f"user: So it does {memory_token} at 9:45.\n"]
    counts = {"ledger": 0, "recalled": 0, "both": 0, "headings": 0}
    number = 400
    for seed in range(number):
        rng = np.random.default_rng(seed)
        ids = exact_ids(texts, "What is the name of my dog?", num_tokens=320, chat_format=chat_format, rng=rng)
        assert sampler.memory_token_id not in ids
        text = chat_format.tokenizer.decode(ids)
        has_ledger, has_recalled = "9:45 · empty_output · XK-7731-B" in text, told.strip() in text
        assert has_ledger or has_recalled
        if has_ledger and has_recalled:
            assert text.index("9:45 ·") < text.index(told.strip())
        headings = (LEDGER_HEADING in text, RECALL_HEADING in text)
        assert headings in ((False, False), (has_ledger, has_recalled))
        counts["ledger"] += has_ledger
        counts["recalled"] += has_recalled
        counts["both"] += has_ledger and has_recalled
        counts["headings"] += any(headings)
        parts = text.removeprefix("\n\n").split("\n\n")
        lengths = chat_format.content_lengths(parts)
        assert len(parts) == has_ledger + has_recalled
        budgets = [40] * has_ledger + [80] * has_recalled
        assert all(length <= budget for length, budget in zip(lengths, budgets, strict=True))
    assert counts["ledger"] / number == pytest.approx(0.75, abs=0.07)
    assert counts["recalled"] / number == pytest.approx(0.75, abs=0.07)
    assert counts["both"] / number == pytest.approx(0.5, abs=0.07)
    assert counts["headings"] / number == pytest.approx(0.5, abs=0.07)


def test_held_out_rows_have_none(sampler, monkeypatch):
    monkeypatch.setattr(tasks, "exact_ids", lambda *_, **__: pytest.fail("a held-out sample has exact text"))
    stage = Stage(steps=1, min_units=3, max_units=8, tasks={"cloze": 1, "reply": 1}, exact=1.0)
    settings = ObjectiveSettings(corpora=("x",), packed_length=1024, warm_start_steps=0, stages=(stage,))
    rows = PackedRows({1: sampler}, settings, seed=0, rows_per_step=1, pad_token_id=0)
    assert {"cloze", "reply"} <= set(evaluation_rows({1: sampler}, rows))


@pytest.mark.parametrize("exact", [-0.1, 1.5])
def test_no_share_is_refused(exact):
    with pytest.raises(ConfigError, match=f"exact={exact}: expected a share from 0 to 1"):
        Stage(steps=1, max_units=1, exact=exact)
