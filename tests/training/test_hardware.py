"""Too little memory, and a GPU without bfloat16: a message that says what is needed and what lowers it."""

import pytest
import torch
from training.worker import build_trainer

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.llm import LLMSettings
from ocrmem.config.mem import MEMConfig
from ocrmem.config.memory import MemorySettings
from ocrmem.config.projection import ProjectionSettings
from ocrmem.config.train import TrainConfig
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import ConfigError, TrainingError
from ocrmem.model.llm import empty_llm
from ocrmem.model.mem_model import MEMModel
from ocrmem.training.hardware import check_bf16, step_memory


@pytest.fixture(scope="module")
def full_size() -> MEMModel:
    """Qwen3-8B and DeepSeek-OCR's encoder, without memory for weights."""
    settings = EncoderSettings(name="deepseek-ocr")
    encoder = build_encoder(settings, load_weights=False, device="meta")
    config = MEMConfig.from_settings(
        encoder=settings, page=encoder.page, memory=MemorySettings(), projection=ProjectionSettings(),
        memory_token="", memory_token_id=0,
    )  # fmt: skip
    llm = empty_llm("qwen3-8b").to(torch.bfloat16)
    return MEMModel(config, base_llm_model=llm, ocr_embed=encoder.to(torch.bfloat16), llm_name="qwen3-8b")


def test_the_estimate_against_what_was_measured(full_size):
    """An eager step on an H100, 2 × 2,048 positions, 512 labels: 39.8 GB, with checkpointing 19.2; the encoder, of
    0.8 GB, was not on the GPU there."""
    eager = step_memory(full_size, positions=4096, labels=512)
    assert eager.weights / 1e9 == pytest.approx(16.4 + 0.8 + 0.1, abs=0.1)
    assert eager.total / 1e9 == pytest.approx(39.8 + 0.8, abs=2.0)
    checkpointed = step_memory(full_size, positions=4096, labels=512, checkpointing=True)
    assert checkpointed.total / 1e9 == pytest.approx(19.2 + 0.8, abs=1.5)
    compiled = step_memory(full_size, positions=4096, labels=256, compiled=True)
    assert compiled.activations == 36 * 4096 * 2 * (2 * 4096 + 2 * 4096 + 2 * 1024 + 2 * 12288)
    assert compiled.total < eager.total - 9e9


def test_a_step_that_does_not_fit_says_what_to_change(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, steps=3, save_strategy="no")
    forward, calls = trainer.model.base_llm_model.forward, []

    def too_large(*arguments, **options):
        calls.append(1)
        if len(calls) > 3:  # the gradient check, and the first step
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has…\nmore")
        return forward(*arguments, **options)

    monkeypatch.setattr(trainer.model.base_llm_model, "forward", too_large)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith(
        "step 2 did not fit into memory (CUDA out of memory): its batch of (3, 35) positions, 12 labelled, needs about"
    )
    assert calls == [1] * 4
    for setting in ("per_device_train_batch_size", "gradient_checkpointing: true", "compile: true", "llm.quantization"):
        assert setting in message
    assert "Start the same command again, and it goes on from the last checkpoint." in message
    assert "\n" not in message


def test_a_gpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    config = TrainConfig(output_dir="x", llm=LLMSettings(dtype="bfloat16"), encoder=EncoderSettings(dtype="bfloat16"))
    with pytest.raises(ConfigError, match="llm.dtype and encoder.dtype ask for bfloat16, which Tesla T4 does not"):
        check_bf16(config, torch.device("cuda"))
    check_bf16(config, torch.device("cpu"))
    check_bf16(TrainConfig(output_dir="x"), torch.device("cuda"))
