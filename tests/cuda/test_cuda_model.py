"""The same code on CUDA: the same numbers as on the CPU, in float32 and bfloat16."""

import pytest
import torch
from tiny import FAMILIES, tiny_batch, tiny_model

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def on_gpu(batch):
    return {key: value.cuda() for key, value in batch.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_loss_and_gradients_equal_the_cpus(family, kind):
    batch, losses, grads = tiny_batch(), [], []
    for device in ("cpu", "cuda"):
        model = tiny_model(family, kind=kind).to(device).train()
        loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        losses.append(loss.cpu())
        grads.append([parameter.grad.cpu() for parameter in model.proj.parameters()])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for cpu, gpu in zip(*grads, strict=True):
        torch.testing.assert_close(cpu, gpu, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [63, 64, 100, 128])
def test_gradients_are_finite_at_every_length(family, length):
    """Left padding gave NaN here with the kernels that CUDA chooses for some lengths; training pads on the right."""
    model = tiny_model(family, max_position_embeddings=256).to("cuda", torch.bfloat16).train()
    batch = tiny_batch(((21, 21), (7,), ()), text=(length - 43, 40, 9), reply=4, side="right")
    assert batch["input_ids"].shape[1] == length
    with torch.autocast("cuda", torch.bfloat16):
        model(**on_gpu(batch)).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.proj.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_llm_trains_a_float32_projection_under_autocast(family):
    model = tiny_model(family).to("cuda", torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**on_gpu(tiny_batch())).loss
    loss.backward()
    for name, parameter in model.proj.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_the_cpus(family):
    batch = tiny_batch()
    batch.pop("labels")
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = tiny_model(family).generate(**batch, **options)
    found = tiny_model(family).cuda().generate(**on_gpu(batch), **options)
    assert torch.equal(found.cpu(), expected)
