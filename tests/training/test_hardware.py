"""Too little memory, and a GPU without bfloat16: a message that says what is needed and what lowers it."""

from types import SimpleNamespace

import pytest
import torch
import torch._functorch.config
from tiny import tiny_llm, tiny_model
from training.worker import build_trainer

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.mem import MEMConfig
from ocrmem.config.memory import MemorySettings
from ocrmem.config.projection import ProjectionSettings
from ocrmem.config.train import TrainConfig
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import ConfigError, TrainingError
from ocrmem.model.llm import compile_layers, empty_llm
from ocrmem.model.mem_model import MEMModel
from ocrmem.training.hardware import (
    bfloat16_settings,
    bytes_needed,
    check_bfloat16,
    check_memory,
    kept_values,
    step_memory,
)

GPU = torch.device("cuda", 0)


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
    assert eager.total / 1e9 == pytest.approx(39.8 + 0.8, abs=1.0)
    checkpointed = step_memory(full_size, positions=4096, labels=512, checkpointing=True)
    assert checkpointed.total / 1e9 == pytest.approx(19.2 + 0.8, abs=1.0)


@pytest.mark.parametrize(("compiled", "budget"), [(False, 1.0), (True, 1.0), (True, 0.9)])
def test_what_a_layer_keeps(compiled, budget):
    """Counted: every tensor that autograd holds and that is no weight, of three layers less those of one."""
    sizes = {
        "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 5, "num_key_value_heads": 1,
        "head_dim": 32, "max_position_embeddings": 512,
    }  # fmt: skip
    positions, found = 512, []
    for layers in (1, 3):
        torch._dynamo.reset()
        llm = tiny_llm("qwen3", **sizes, num_hidden_layers=layers, attn_implementation="sdpa").bfloat16()
        llm.requires_grad_(False).train()
        if compiled:
            compile_layers(llm)
        weights = {parameter.untyped_storage().data_ptr() for parameter in llm.parameters()}
        kept = {}

        def pack(tensor, weights=weights, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = tensor  # held, so that no address comes twice
            return tensor

        embeds = torch.randn(2, positions // 2, 128, dtype=torch.bfloat16, requires_grad=True)
        with (
            torch._functorch.config.patch(activation_memory_budget=budget),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state.float().sum().backward()
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    counted = (found[1] - found[0]) / 2 / positions
    expected = 2 * kept_values(llm.config, compiled=compiled, memory_budget=budget)
    assert counted == pytest.approx(expected, rel=0.03)  # the rest is a few float32 values for each head


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
    assert needed["projection with gradient and AdamW"] == 16 * trainable + 4  # and a scalar buffer, once
    check_memory(model, GPU, free=sum(needed.values()))
    with pytest.raises(ConfigError, match=r"0.00 GiB are needed .*LLM 0.00, encoder.*Set llm.dtype=bfloat16 to halve"):
        check_memory(model, GPU, free=sum(needed.values()) - 1)
    check_memory(model, GPU, shares=2, free=sum(needed.values()) - 1)


def test_an_encoder_out_of_memory(monkeypatch):
    from ocrmem.training.encode import BlockEncoder

    def no_room(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    stub = SimpleNamespace(encoder=no_room, batch_size=16, device=torch.device("cpu"))
    monkeypatch.setattr("ocrmem.training.encode.stack_pages", lambda *_: torch.zeros(1))
    with pytest.raises(ConfigError, match="for 16 pages at once.*Give a lower --batch-size than 16"):
        BlockEncoder._launch(stub, [])


def test_a_memory_budget_that_makes_no_sense():
    with pytest.raises(ConfigError, match="compile_memory_budget=0.0: expected more than 0, at most 1"):
        TrainConfig(output_dir="x", compile_memory_budget=0.0)
