"""Replies that the LLM is given wrongly, with labels that stay right."""

import dataclasses

import numpy as np
import pytest
import torch

from ocrmem.config.objectives import ObjectiveSettings, Stage
from ocrmem.errors import ConfigError
from ocrmem.model.label_loss import IGNORE_INDEX
from ocrmem.training.packing import PackedRows, led_astray
from ocrmem.training.tasks import Sample


def reply(task="reconstruction", length=4000):
    labelled_T = np.zeros(length + 10, dtype=bool)
    labelled_T[8:-1] = True
    return Sample(task, np.arange(length + 10), labelled_T, units=[0])


def test_wrong_tokens_are_others_of_the_reply():
    sample = reply()
    given = led_astray(sample, 0.1, np.random.default_rng(0))
    wrong_T = given.input_ids_T != sample.input_ids_T
    assert 0.08 < wrong_T.sum() / sample.labelled_T.sum() < 0.12
    assert not wrong_T[~sample.labelled_T].any()
    assert not wrong_T[np.flatnonzero(sample.labelled_T)[-1]]  # the end of the turn
    assert sample.labelled_T[given.input_ids_T[wrong_T]].all()
    assert np.array_equal(given.label_ids_T, sample.input_ids_T)
    assert np.array_equal(sample.input_ids_T, np.arange(4010))


def test_short_replies_and_other_tasks():
    rng = np.random.default_rng(0)
    assert led_astray(reply("recall"), 0.5, rng).label_ids_T is None
    for length in range(2, 11):
        for _ in range(20):
            led_astray(reply(length=length), 0.9, rng)


def test_a_row_has_right_labels_under_wrong_tokens(monkeypatch):
    class Sampler:
        memory_token_id = 7

        def sample(self, rng, stage):
            return reply(length=int(rng.integers(100, 200)))

    settings = ObjectiveSettings(
        corpora=("x",), packed_length=2048, warm_start_steps=0, stages=(Stage(steps=1, max_units=2, noise=0.2),)
    )
    rows = PackedRows({1: Sampler()}, settings, seed=0, rows_per_step=1, pad_token_id=0)
    packed = []
    monkeypatch.setattr(rows, "pack", lambda samples, pieces, shares: packed.extend(samples) or {})
    rows[0]
    assert any(sample.label_ids_T is not None for sample in packed)
    packed.clear()
    quiet = dataclasses.replace(settings.stages[0], noise=0.0)
    rows.settings = dataclasses.replace(settings, stages=(quiet,))
    rows[0]
    assert all(sample.label_ids_T is None for sample in packed)


def test_the_loss_is_of_the_right_tokens():
    from ocrmem.training.packing import _row

    sample = led_astray(reply(length=300), 0.3, np.random.default_rng(1))
    row = _row([(sample.input_ids_T, sample.labelled_T)], 512, 0, memory_token_id=-1, labels=[sample.label_ids_T])
    labels = row["labels"][0]
    kept = labels != IGNORE_INDEX
    assert torch.equal(labels[kept], torch.arange(310)[torch.from_numpy(sample.labelled_T)])
    assert not torch.equal(row["input_ids"][0][kept], labels[kept])


def test_noise_is_a_share():
    for noise in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=f"noise={noise}: expected a share"):
            Stage(steps=1, max_units=1, noise=noise)
