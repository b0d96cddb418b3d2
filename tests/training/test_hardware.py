"""A GPU without bf16 and too little memory are said before they cost anything."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from training.worker import build_trainer

from ocrmem.config.train import TrainConfig
from ocrmem.errors import ConfigError, TrainingError
from ocrmem.gradflow.callback import ExplainedTrainer
from ocrmem.training.hardware import bfloat16_settings, bytes_needed, check_bfloat16, check_memory

GPU = torch.device("cuda", 0)


def test_a_gpu_without_bfloat16():
    config = TrainConfig(output_dir="x", training={"bf16": True})
    wanted = [*bfloat16_settings(config), "llm.dtype=bfloat16"]
    with pytest.raises(ConfigError, match=r"training.bf16=true, llm.dtype=bfloat16: cuda:0 has compute capability 7.5"):
        check_bfloat16(wanted, GPU, capability=(7, 5))
    check_bfloat16(wanted, GPU, capability=(8, 0))
    check_bfloat16([], GPU, capability=(7, 0))
    check_bfloat16(wanted, torch.device("cpu"))


def test_too_little_memory_says_how_much_and_what_lowers_it():
    model = tiny_model()
    needed = bytes_needed(model)
    trainable = sum(parameter.numel() for parameter in model.proj.parameters())
    assert needed["projection with gradient and AdamW"] == 16 * trainable + 16  # and a scalar buffer
    check_memory(model, GPU, free=sum(needed.values()))
    with pytest.raises(ConfigError, match=r"0.00 GiB are needed .*LLM 0.00, encoder.*Set llm.dtype=bfloat16 to halve"):
        check_memory(model, GPU, free=sum(needed.values()) - 1)
    check_memory(model, GPU, shares=2, free=sum(needed.values()) - 1)


def test_running_out_of_memory_in_a_step(tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB.")

    trainer = build_trainer(tmp_path, steps=1)
    monkeypatch.setattr(ExplainedTrainer, "training_step", no_room)
    with pytest.raises(TrainingError, match="asked for 2.00 GiB. Lower training.per_device_train_batch_size"):
        trainer.train()


def test_an_encoder_out_of_memory(monkeypatch):
    from ocrmem.training.encode import BlockEncoder

    def no_room(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    stub = SimpleNamespace(encoder=no_room, batch_size=16, device=torch.device("cpu"))
    monkeypatch.setattr("ocrmem.training.encode.stack_pages", lambda *_: torch.zeros(1))
    with pytest.raises(ConfigError, match="for 16 pages at once.*Give a lower --batch-size than 16"):
        BlockEncoder._launch(stub, [])
