"""The loss made in parts is the loss made at once, with the same gradients, and only part of the logits at a time."""

import pytest
import torch
from tiny import tiny_batch, tiny_model

from ocrmem.model.chunked_loss import chunked_sum
from ocrmem.model.label_loss import cross_entropy_sum


def run(model, *, size, weights=None, train=True, items=None):
    model.loss_chunk_size = size
    model.train(train)
    model.zero_grad()
    batch = tiny_batch(text=(5, 9, 11), reply=4, side="right")
    if weights is not None:
        batch["target_weights"] = weights
    output = model(**batch, num_items_in_batch=items)
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.proj.named_parameters()}


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("size", [1, 5, 11])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_loss_and_gradients(family, size, weighted):
    model = tiny_model(family)
    widths = []
    model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: widths.append(output.shape[1]))
    weights = torch.linspace(0.1, 0.5, 12) if weighted else None
    whole, expected = run(model, size=None, weights=weights, items=17)
    assert widths == [12]
    widths.clear()
    parts, found = run(model, size=size, weights=weights, items=17)
    assert sum(widths) == 1 + 12
    assert max(widths) == size
    assert whole.logits.shape[0] == 12
    assert parts.logits is None
    assert torch.equal(parts.logit_positions, whole.logit_positions)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=1e-6)
    for name, grad in expected.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(run_without_grad(model, weights), whole.loss, rtol=1e-6, atol=1e-6)


def run_without_grad(model, weights):
    batch = tiny_batch(text=(5, 9, 11), reply=4, side="right")
    return model(**batch, **({} if weights is None else {"target_weights": weights}), num_items_in_batch=17).loss


def test_few_labels_are_done_at_once_and_their_logits_returned():
    assert run(tiny_model(), size=12)[0].logits.shape[0] == 12


def test_an_llm_that_changes_its_logits_keeps_doing_so():
    capped = {"final_logit_softcapping": 0.05}  # so low that it changes the loss
    model = tiny_model("gemma3_text", **capped)
    whole, expected = run(model, size=None)
    plain = run(tiny_model("gemma3_text", final_logit_softcapping=None), size=None)[0]
    assert abs(whole.loss.item() - plain.loss.item()) > 1e-3
    for _ in range(2):
        parts, found = run(model, size=5)
        assert parts.logits is not None
        torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=1e-6)
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)


def test_no_part_keeps_its_logits():
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 13, bias=False).requires_grad_(False)
    hidden = torch.randn(11, 7, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    options = {"output_layer": layer, "cross_entropy": cross_entropy_sum}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_sum(hidden, torch.arange(11), None, **options, size=4)
    assert kept[-1] == (11, 7)
    assert max(shape[0] for shape in kept if shape[-1:] == (13,) and shape != (7, 13)) == 4  # (7, 13): the weight
