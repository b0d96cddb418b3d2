"""What cannot be checked gets a message of its own, never a traceback of ours."""

import re

import pytest
import torch
from torch import nn
from zoo_parts import Composite, batch

from ocrmem.errors import OcrmemError, ProbeError
from ocrmem.gradflow import GradientFlowCallback, explain, verify_gradient_flow


class Raising(Composite):
    def splice(self, memory, embeds):
        return {}["memory"]


class Returning(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.value = value

    def forward(self, inputs):
        return self.value(self.layer(inputs))


def test_a_forward_that_raises():
    with pytest.raises(
        ProbeError,
        match=r"Raising's forward raised KeyError at .*test_gradflow_bad_input.py:\d+ \(`return \{\}",
    ) as raised:
        verify_gradient_flow(Raising(), batch(), "proj")
    assert isinstance(raised.value.__cause__, KeyError)
    assert "make model(**batch) run first" in str(raised.value)


def test_a_batch_on_another_device():
    data = {key: value.to("meta") if key == "images" else value for key, value in batch().items()}
    with pytest.raises(
        ProbeError,
        match=re.escape("images of the batch is on meta, the model on cpu. Move the batch first: batch.to('cpu')."),
    ):
        verify_gradient_flow(Composite(), data, "proj")


def test_a_loss_that_is_not_a_scalar():
    with pytest.raises(
        ProbeError,
        match=r"the loss has shape \(2, 3\); backward needs a scalar. Reduce it, for example with .mean\(\)",
    ):
        verify_gradient_flow(Returning(lambda hidden: hidden), torch.randn(2, 3))


def test_no_loss_at_all():
    with pytest.raises(
        ProbeError,
        match=r"Returning returned dict without a loss. Put labels into the batch, or pass loss_fn",
    ):
        verify_gradient_flow(Returning(lambda hidden: {"logits": hidden}), torch.randn(2, 3))


def test_a_loss_function_that_returns_a_number():
    with pytest.raises(ProbeError, match=r"loss_fn returned float; return a scalar tensor \(not loss.item\(\)"):
        verify_gradient_flow(Composite(), batch(), "proj", lambda outputs, _: outputs.loss.item())


def test_no_trainable_parameter():
    explanation = explain(verify_gradient_flow(Composite().requires_grad_(False), batch()))
    assert (explanation.cause, explanation.exit_code) == ("nothing-trainable", 1)
    assert "no parameter of Composite requires grad, so there is nothing to train." in explanation.sentence


def test_no_parameter_at_all():
    with pytest.raises(ProbeError, match="ReLU has no parameters at all, so nothing in it can learn"):
        verify_gradient_flow(nn.ReLU(), torch.randn(2, 3))


def test_a_trainable_part_that_does_not_exist():
    with pytest.raises(
        ProbeError,
        match="trainable='projection' is not a module of Composite; its children are: llm, encoder, proj",
    ):
        verify_gradient_flow(Composite(), batch(), "projection")


def test_a_trainable_part_without_parameters():
    with pytest.raises(ProbeError, match=r"trainable='llm\.model\.rotary_emb' has no parameters"):
        verify_gradient_flow(Composite(), batch(), "llm.model.rotary_emb")


def test_something_that_is_no_module():
    with pytest.raises(ProbeError, match=r"model is a dict; expected a torch.nn.Module"):
        verify_gradient_flow({}, batch())


def test_a_step_without_its_optimizer():
    with pytest.raises(ProbeError, match="step was given without optimizer; pass both"):
        verify_gradient_flow(Composite(), batch(), "proj", step=lambda: None)


def test_an_unknown_mode_of_the_callback():
    with pytest.raises(ProbeError, match="mode='strict'; expected 'error', 'warn' or 'off'"):
        GradientFlowCallback(mode="strict")


def test_nothing_stays_behind_after_a_failure():
    model = Raising().train()
    original = torch.inference_mode.__enter__
    with pytest.raises(OcrmemError):
        verify_gradient_flow(model, batch(), "proj")
    assert not torch.nn.modules.module._global_forward_hooks
    assert torch.is_grad_enabled()
    assert torch.inference_mode.__enter__ is original
    assert all(parameter.grad is None for parameter in model.parameters())
