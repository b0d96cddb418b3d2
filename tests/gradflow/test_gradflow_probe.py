"""The probe measures what it says, and leaves nothing behind."""

import gc
import json
import random
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import zoo
from torch import nn
from zoo_parts import CASES, TOKENS, Composite, InPlace, Projection, batch, subject, tiny_llm

from ocrmem.errors import ProbeError
from ocrmem.gradflow import explain, verify_gradient_flow
from ocrmem.gradflow.probe import report_of_error
from ocrmem.gradflow.restore import same_bits


class Restless(Composite):
    """A model that changes everything it can in a forward."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.seen = None

    def splice(self, memory, embeds):
        self.count += 1
        self.seen, self.added, self.fresh = memory, "an attribute", "another"
        self.encoder.eval()
        random.random()
        np.random.rand()  # noqa: NPY002
        with torch.no_grad():
            self.llm.lm_head.weight.mul_(1.5)
        torch.set_grad_enabled(False)
        torch.set_grad_enabled(True)
        memory = self.norm(memory.transpose(1, 2)).transpose(1, 2)
        return super().splice(self.dropout(memory), embeds)


def everything(model):
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            for module in model.modules()
        ],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("broken", [False, True], ids=["healthy", "raising"])
def test_everything_is_as_before_bit_for_bit(broken):
    model = Restless().train()
    model(**batch()).loss.backward()
    model.encoder.train()
    del model.fresh
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    model.added, model.seen = "as before", None
    if broken:
        model.predict = lambda embeds, labels, mask: embeds @ embeds
    before = everything(model)
    with pytest.raises(ProbeError, match="batch2 tensor") if broken else nullcontext():
        verify_gradient_flow(model, batch(), "proj")
    after = everything(model)
    for key in ("modes", "requires_grad", "attributes", "hooks", "grad mode"):
        assert after[key] == before[key], key
    assert all(same_bits(value, before["state"][key]) for key, value in after["state"].items())
    assert torch.equal(after["random"][0], before["random"][0])
    assert after["random"][1:] == before["random"][1:]
    for name, grad in after["grads"].items():
        assert grad is before["grads"][name], name
        assert grad is None or torch.equal(grad, grads[name])
    assert model.added == "as before"
    assert model.seen is None
    assert "fresh" not in vars(model)
    for hooks in (
        torch.nn.modules.module._global_forward_hooks,
        torch.nn.modules.module._global_forward_pre_hooks,
    ):
        assert not hooks


def test_training_goes_on_as_if_nothing_had_happened():
    def losses(check):
        torch.manual_seed(3)
        model = Restless().train()
        optimizer = torch.optim.AdamW(model.proj.parameters(), lr=1e-2)
        seen = []
        for _ in range(3):
            if check:
                verify_gradient_flow(model, batch(), "proj", optimizer=optimizer)
            optimizer.zero_grad()
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    assert losses(check=True) == losses(check=False)


def test_a_step_of_the_user_is_undone():
    model = Composite()
    optimizer = torch.optim.AdamW(model.proj.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()

    step()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    moments = {key: value["exp_avg"].clone() for key, value in optimizer.state_dict()["state"].items()}
    report = verify_gradient_flow(model, batch(), "proj", optimizer=optimizer, step=step)
    assert report.step is not None
    assert report.step.optimizer_stepped
    assert report.step.state_at_step == "finite"
    assert all(same_bits(value, weights[key]) for key, value in model.state_dict().items())
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[key]["exp_avg"], value) for key, value in moments.items())


def test_the_report_holds_what_was_asked_for():
    model = Composite().train()
    model.encoder.eval()
    optimizer = torch.optim.AdamW(model.proj.parameters(), lr=0.25)
    report = verify_gradient_flow(model, batch(), "proj", optimizer=optimizer)
    assert report.training == {"": True, "llm": True, "encoder": False, "proj": True}
    assert report.trainable == ("proj",)
    assert {tensor.name for tensor in report.tensors} == {
        "proj.first.weight", "proj.first.bias", "proj.last.weight", "proj.last.bias",
    }  # fmt: skip
    model(**batch()).loss.backward()
    for tensor in report.tensors:
        expected = model.get_parameter(tensor.name).grad
        assert tensor.state == "finite"
        assert tensor.in_graph
        assert tensor.norm == pytest.approx(float(expected.norm()), rel=1e-6)
    assert report.frozen_with_grad == ()
    assert report.loss == pytest.approx(model(**batch()).loss.item())
    assert report.labels.given == report.labels.after_shift == report.labels.in_loss == 6
    assert report.memory.num_tokens == 2 * TOKENS
    assert report.host.memory_positions == 2 * TOKENS
    assert report.optimizer.missing == ()
    assert report.optimizer.learning_rate == 0.25
    encoder, proj, llm = (report.calls_of(path)[0] for path in ("encoder", "proj", "llm"))
    assert (encoder.carries, encoder.requires_grad) == (False, False)
    assert (proj.carries, proj.live, proj.trainable) == (True, True, True)
    assert (llm.requires_grad, llm.grad_enabled, llm.inference_mode) == (True, True, False)


def test_grad_mode_and_inference_mode_are_seen_inside_each_module():
    class Model(Composite):
        def encode(self, images):
            with torch.inference_mode():
                features = self.encoder(images)
            with torch.no_grad():
                self.encoder.conv(images)
            return features.clone()

    report = subject(Model()).examine()
    assert report.calls_of("encoder")[0].inference_mode
    assert [call.grad_enabled for call in report.calls_of("encoder.conv")] == [False, False]
    assert [call.inference_mode for call in report.calls_of("encoder.conv")] == [True, False]


def test_the_loss_change_is_that_of_permuted_memory():
    class Model(Composite):
        permute = False

        def splice(self, memory, embeds):
            return super().splice(memory.roll(1, dims=1) if self.permute else memory, embeds)

    model = Model()
    report = verify_gradient_flow(model, batch(), "proj")
    model.permute = True
    assert report.memory.loss_change == pytest.approx(model(**batch()).loss.item() - report.loss, abs=1e-6)
    assert report.memory.loss_change != 0


def test_frozen_tensors_with_gradients_are_listed():
    model = Composite()
    model.llm.lm_head.weight.requires_grad_(True)
    report = verify_gradient_flow(model, batch(), "proj")
    assert report.frozen_with_grad == ("llm.lm_head.weight",)


def test_one_memory_token_is_changed_where_it_cannot_be_permuted():
    class Model(Composite):
        def encode(self, images):
            return super().encode(images)[:, :1]

    memory = subject(Model()).examine().memory
    assert not memory.permuted
    assert memory.loss_change != 0


class WithOwnLoss(Projection):
    """Returns None and a loss where it is asked for its own loss alone."""

    def forward(self, features, own=False):
        memory = super().forward(features)
        return (None, memory.square().mean()) if own else memory


def test_a_loss_of_the_projections_own_is_no_memory():
    class Model(Composite):
        def __init__(self):
            super().__init__()
            self.proj = WithOwnLoss()

        def project(self, features):
            self.own_loss = self.proj(features, own=True)[1]
            return super().project(features)

        def predict(self, *args):
            outputs = super().predict(*args)
            outputs.loss = outputs.loss + self.own_loss
            return outputs

    report = subject(Model()).examine()
    alone = subject(Composite()).examine().memory
    assert report.memory.num_tokens == alone.num_tokens
    assert report.memory.loss_change  # it was measured, and is not 0
    assert explain(report).healthy


def test_positional_and_single_batches():
    torch.manual_seed(0)
    model = nn.Bilinear(3, 5, 7)
    positional = verify_gradient_flow(
        model, (torch.randn(2, 3), torch.randn(2, 5)), loss_fn=lambda outputs, _: outputs.sum()
    )
    single = verify_gradient_flow(nn.Linear(3, 1), torch.randn(1, 3))
    assert explain(positional).healthy
    assert explain(single).healthy
    assert single.labels is None


def test_the_report_is_json():
    report = subject(InPlace()).examine()
    again = json.loads(json.dumps({"report": report.to_json(), "explanation": explain(report).to_json()}))
    assert again["report"]["memory"]["module"] == "proj"
    assert again["explanation"]["verdict"] == "healthy"
    assert "exception" not in again["report"]


def test_a_loss_that_is_nan_is_still_json():
    report = zoo.run(CASES["all_labels_ignored"]).report
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["loss"] is None


def test_bfloat16_and_float16_weights_without_an_optimizer_are_only_noted():
    class Model(Composite):
        def project(self, features):
            return self.proj(features.bfloat16())

    model = Model(tiny_llm().to(torch.bfloat16))
    model.proj.bfloat16()
    explanation = explain(verify_gradient_flow(model, batch(), "proj"))
    assert explanation.healthy
    assert [warning.id for warning in explanation.warnings] == ["coarse-weights"]


def test_the_report_does_not_keep_a_graph_alive():
    watched = []

    class Model(Composite):
        def splice(self, memory, embeds):
            spliced = super().splice(memory.double(), embeds)
            watched.append(weakref.ref(spliced))
            return spliced

    report = verify_gradient_flow(Model(), batch(), "proj")
    gc.collect()
    assert report.exception is not None
    assert explain(report).cause == "memory-dtype"
    assert all(reference() is None for reference in watched)


@pytest.mark.parametrize("name", ["custom_autograd_function", "checkpointing_reentrant_with_memory_in_embeds"])
def test_a_chain_through_a_custom_function_is_seen_as_whole(name):
    report = zoo.run(CASES[name]).report
    assert report.loss_live
    assert report.chain_end is None
    assert all(call.live for call in report.calls_of("llm"))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("cudnn RNN backward can only be called in training mode", "cudnn-rnn-eval"),
        (
            "Expected to have finished reduction in the prior iteration before starting a new one.",
            "ddp-finished-reduction",
        ),
        ("Expected to mark a variable ready only once. This error is caused by", "ddp-reentrant-twice"),
        (
            "Must flatten tensors with uniform `requires_grad` when `use_orig_params=False`",
            "fsdp1-mixed-flat",
        ),
        (
            "Trying to backward through the graph a second time (or directly access saved tensors",
            "memory-cached",
        ),
        ("expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16", "memory-dtype"),
        ("mat1 and mat2 must have the same dtype, but got Float and BFloat16", "memory-dtype"),
        (
            "masked_scatter: expected self and source to have same dtypes but gotFloat and BFloat16",
            "splice-dtype",
        ),
    ],
)
def test_an_error_is_known_by_its_text(text, cause):
    explanation = explain(report_of_error(RuntimeError(text), phase="backward"))
    assert (explanation.cause, explanation.verdict, explanation.exit_code) == (cause, "raises", 1)
