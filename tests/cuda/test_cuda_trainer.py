"""A gradient that is no number, where the answer is read one step later."""

import logging

import pytest
import torch
from transformers import TrainingArguments

from ocrmem.errors import TrainingError
from ocrmem.training.trainer import StopOnNonFinite


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(3, 3).cuda()


class State:
    global_step = 0


def steps(tmp_path, finite):
    model, check, state = Model(), StopOnNonFinite(), State()
    arguments = TrainingArguments(output_dir=str(tmp_path))
    for number in finite:
        for parameter in model.proj.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 if number else float("nan"))
        check.on_pre_optimizer_step(arguments, state, None, model=model)
        assert all(torch.equal(p.grad, torch.full_like(p, float(number))) for p in model.proj.parameters())
        state.global_step += 1
    check.on_train_end(arguments, state, None)


def test_single_steps_are_left_out(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        steps(tmp_path, [True, False, True, False, False])
    assert [record.args for record in caplog.records] == [(2,), (4,), (5,)]


def test_three_in_a_row_end_the_run(tmp_path):
    with pytest.raises(TrainingError, match="not finite at step 4"):
        steps(tmp_path, [True, False, False, False])
