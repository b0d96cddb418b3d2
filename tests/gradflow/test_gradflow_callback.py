"""The check inside transformers.Trainer."""

import logging
import re
import time

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from zoo_parts import Composite, batch

from ocrmem.errors import GradientFlowError
from ocrmem.gradflow import ExplainedTrainer, GradientFlowCallback
from ocrmem.gradflow.cause import E0

SAMPLES = batch(samples=12)


class Data(Dataset):
    """Twelve samples; those in `bare` have no image."""

    def __init__(self, bare=()):
        self.bare = bare

    def __len__(self):
        return 12

    def __getitem__(self, index):
        keys = [key for key in SAMPLES if key != "images" or index not in self.bare]
        sample = {key: SAMPLES[key][index] for key in keys}
        if "images" in sample:  # augmented, so that a look at the data draws random numbers
            sample["images"] = sample["images"] + 0.1 * torch.randn(1)
        return sample


def collate(samples):
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


class Cut(Composite):
    def splice(self, memory, embeds):
        return super().splice(memory.detach(), embeds)


def trainer(tmp_path, model, callback, *, data=None, kind=Trainer, **settings):
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return kind(
        model=model,
        args=TrainingArguments(**{**arguments, **settings}),
        train_dataset=Data() if data is None else data,
        data_collator=collate,
        callbacks=[] if callback is None else [callback],
    )


def losses(made):
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_a_healthy_run_is_the_same_run_with_the_check(tmp_path):
    runs, models = [], []
    for callback in (None, GradientFlowCallback("proj", every=1)):
        torch.manual_seed(0)
        models.append(Composite())
        runs.append(losses(trainer(tmp_path, models[-1], callback)))
    assert runs[0] == runs[1]
    assert len(runs[0]) == 4
    assert all(torch.equal(value, models[1].state_dict()[key]) for key, value in models[0].state_dict().items())
    assert not models[1]._forward_hooks


def test_a_cut_run_is_stopped_before_its_first_step_with_the_original_chained(tmp_path):
    model = Cut()
    before = weights(model)
    made = trainer(tmp_path, model, GradientFlowCallback("proj"))
    with pytest.raises(
        GradientFlowError, match=r"this run cannot learn. cut \(detach\): detach\(\) cuts the memory off."
    ) as raised:
        made.train()
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert E0 in str(raised.value.__cause__)
    assert "test_gradflow_callback.py" in str(raised.value)
    assert made.state.global_step == 0
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_warn_logs_and_lets_the_run_go_on(tmp_path, caplog):
    model = Composite()
    model.llm.enable_input_require_grads()
    model.splice = lambda memory, embeds: Composite.splice(model, memory.detach(), embeds)
    with caplog.at_level(logging.WARNING, logger="ocrmem.gradflow.callback"):
        trainer(tmp_path, model, GradientFlowCallback("proj", mode="warn")).train()
    assert "this run cannot learn: silent (detach)" in caplog.text


def test_off_leaves_the_bare_error(tmp_path):
    with pytest.raises(RuntimeError, match=re.escape(E0)) as raised:
        trainer(tmp_path, Cut(), GradientFlowCallback("proj", mode="off")).train()
    assert not isinstance(raised.value, GradientFlowError)


def test_a_batch_without_memory_in_mid_run_is_explained(tmp_path):
    # The samples in between have no image; the check before the run meets the first two, which have.
    data = Data(bare=range(2, 12))
    made = trainer(tmp_path, Composite(), GradientFlowCallback("proj"), data=data, train_sampling_strategy="sequential")
    with pytest.raises(GradientFlowError, match=r"cut \(no-memory-in-batch\): the batch holds no memory") as raised:
        made.train()
    assert made.state.global_step == 1
    assert E0 in str(raised.value.__cause__)


def test_silent_batches_without_memory_do_not_stop_a_mixed_run(tmp_path):
    model = Composite()
    model.llm.enable_input_require_grads()
    callback = GradientFlowCallback("proj")
    trainer(tmp_path, model, callback, data=Data(bare=range(0, 6))).train()
    assert callback.explanation.healthy


def test_data_without_any_memory_is_refused(tmp_path):
    model = Composite()
    model.llm.enable_input_require_grads()
    made = trainer(tmp_path, model, GradientFlowCallback("proj"), data=Data(bare=range(12)))
    with pytest.raises(GradientFlowError, match=r"silent \(no-memory-hidden\): the batch holds no memory"):
        made.train()


def test_dropped_columns_are_named(tmp_path):
    class Model(Composite):
        def forward(self, input_ids, labels, **kwargs):
            return super().forward(input_ids, labels, kwargs.get("images"))

    made = trainer(tmp_path, Model(), GradientFlowCallback("proj"), remove_unused_columns=True)
    with pytest.raises(GradientFlowError, match=r"columns-dropped\): the data has images, the batch has not"):
        made.train()


def test_an_optimizer_that_does_not_hold_the_projection_is_named(tmp_path):
    model = Composite()
    made = trainer(tmp_path, model, GradientFlowCallback("proj"))
    made.optimizer = torch.optim.AdamW(model.llm.parameters())
    with pytest.raises(GradientFlowError, match=r"silent \(optimizer-holds-frozen\)"):
        made.train()


def test_gradients_that_vanish_later_stop_the_run(tmp_path):
    class Later(Composite):
        steps = 0

        def splice(self, memory, embeds):
            self.steps += 1
            return super().splice(memory * 0 if self.steps > 4 else memory, embeds)

    made = trainer(tmp_path, Later(), GradientFlowCallback("proj", every=2), max_steps=20)
    with pytest.raises(
        GradientFlowError,
        match=r"the last 3 optimizer steps up to step .* met no usable gradient in any trainable tensor",
    ):
        made.train()


def test_explained_trainer_explains_what_comes_in_mid_run(tmp_path):
    class Caching(Composite):
        cached = None

        def project(self, features):
            self.cached = self.proj(features) if self.cached is None else self.cached
            return self.cached

    with pytest.raises(GradientFlowError, match=r"raises \(memory-cached\)") as raised:
        trainer(tmp_path, Caching(), None, kind=ExplainedTrainer).train()
    assert "backward through the graph a second time" in str(raised.value.__cause__)
    with pytest.raises(GradientFlowError, match=r"cut \(detach\)"):
        trainer(tmp_path, Cut(), None, kind=ExplainedTrainer).train()


def test_explained_trainer_leaves_other_errors_alone(tmp_path):
    class Failing(Composite):
        def splice(self, memory, embeds):
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match=r"^the disk is full$"):
        trainer(tmp_path, Failing(), None, kind=ExplainedTrainer).train()


def test_the_check_costs_nothing_measurable_after_the_first_step(tmp_path):
    model, callback = Composite(), GradientFlowCallback("proj")
    made = trainer(tmp_path, model, callback, max_steps=1)
    made.add_callback(Holding())
    made.train()
    began = time.perf_counter()
    for _ in range(50):
        model(**batch()).loss.backward()
    step = (time.perf_counter() - began) / 50
    began = time.perf_counter()
    output = Holding.output
    for _ in range(5000):
        callback._after_forward(model, (), {}, output)
        callback.on_pre_optimizer_step(made.args, made.state, made.control)
    assert (time.perf_counter() - began) / 5000 < 0.01 * step


class Holding(TrainerCallback):
    """Keeps a training output, as the callback sees it in every step."""

    output = None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        Holding.output = model.train()(**batch())
