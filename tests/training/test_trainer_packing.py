"""Runs with packed rows, the loss in parts, and compiled layers learn what the plain run learns, step by step."""

import pytest
import torch
from tiny import PLACEHOLDER
from training.test_trainer import GOLDEN_LOSSES
from training.worker import build_trainer

from ocrmem.data.collator import MEMCollator
from ocrmem.model.llm import compile_layers


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def packed(trainer, **options):
    trainer.data_collator = MEMCollator(0, packing=True, memory_token_id=PLACEHOLDER, tokens_per_page=21, **options)
    return trainer


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 128}])
def test_packed_rows(tmp_path, options):
    trainer = packed(build_trainer(tmp_path, steps=8), **options)
    trainer.model.loss_chunk_size = 5
    shapes = []
    trainer.model.base_llm_model.register_forward_pre_hook(
        lambda module, arguments, named: shapes.append(tuple(named["inputs_embeds"].shape)), with_kwargs=True
    )
    assert losses_of(trainer) == pytest.approx(GOLDEN_LOSSES, abs=2e-4)
    assert set(shapes) == {(1, 128 if options else 3 * 35, 24)}
    expected = build_trainer(tmp_path / "padded", steps=8)
    expected.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], abs=1e-4)


def test_packed_rows_with_accumulation_and_checkpointing(tmp_path):
    """The mean is over the labels of all rows of a step, as with padded batches."""
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    trainer = packed(build_trainer(tmp_path, steps=8, **options))
    trainer.model.loss_chunk_size = 3
    assert losses_of(trainer) == pytest.approx(GOLDEN_LOSSES, abs=2e-4)


def test_a_packed_row_without_memory_is_harmless(tmp_path):
    trainer = packed(build_trainer(tmp_path, steps=3, lonely=frozenset(range(24))))
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if type(callback).__name__ != "GradientFlowCallback"
    ]
    assert all(loss > 1 for loss in losses_of(trainer))
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in trainer.model.proj.parameters())


@pytest.mark.slow
def test_compiled_layers(tmp_path):
    trainer = packed(build_trainer(tmp_path, steps=8))
    compile_layers(trainer.model.base_llm_model)
    torch.use_deterministic_algorithms(False)
    assert losses_of(trainer) == pytest.approx(GOLDEN_LOSSES, abs=2e-4)
