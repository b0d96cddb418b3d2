"""The forward contract: gradients, parity, padding, the splice."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, PLACEHOLDER, tiny_batch, tiny_model

from ocrmem.errors import ConfigError, SpliceError
from ocrmem.model import label_loss, mem_model, projection, splice

KINDS = ("mlp", "attention")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_projection_gets_gradients_and_all_of_it(family, kind):
    model = tiny_model(family, kind=kind).train()
    output = model(**tiny_batch())
    assert output.loss.grad_fn is not None
    assert output.logits.grad_fn is not None
    output.loss.backward()
    for name, parameter in model.proj.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # a bias added to every key moves all attention scores alike, so only the others must feel the loss
        assert parameter.grad.abs().sum() > 0, name
    for part in (model.base_llm_model, model.ocr_embed):
        assert all(parameter.grad is None for parameter in part.parameters())


def test_train_switches_the_three_parts_together_and_returns_self():
    model = tiny_model()
    parts = (model, model.base_llm_model, model.ocr_embed, model.proj)
    assert not any(part.training for part in parts)
    assert model.train() is model
    assert all(part.training for part in parts)
    assert model.train(False) is model
    assert not any(module.training for module in model.modules())


def test_train_mode_changes_no_number():
    model, batch = tiny_model(kind="attention"), tiny_batch()
    before = {key: value.clone() for key, value in model.ocr_embed.state_dict().items()}
    eval_loss = model.eval()(**batch).loss
    train_loss = model.train()(**batch).loss
    assert torch.equal(eval_loss, train_loss)
    assert all(torch.equal(value, before[key]) for key, value in model.ocr_embed.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_the_llm_itself_on_the_spliced_embeddings(family):
    model, batch = tiny_model(family), tiny_batch()
    labels = batch.pop("labels")
    embeds = model.embed(**{key: value for key, value in batch.items() if key != "attention_mask"})
    position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model.base_llm_model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=position_ids
    ).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits, logits[tuple(output.logit_positions.T)])
    assert output.logits.shape == (9, 101), "only positions that predict a label: three in each sample"
    single = {key: value[1:2] for key, value in batch.items() if key in ("input_ids", "attention_mask")}
    assert model(**single, labels=labels[1:2]).logits.shape == (3, 101)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_needs_no_mask(family):
    """Gemma 3's window of 8 is shorter than the padding: its padded queries would see nothing."""
    model, batch = tiny_model(family), tiny_batch(side="right")
    masks = []
    model.base_llm_model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    found = model(**batch)
    left = model(**tiny_batch(side="left"))
    assert masks[0] is None
    assert masks[1] is not None
    torch.testing.assert_close(found.loss, left.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, left.logits, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_pages_it_is_the_plain_llm(family):
    model, batch = tiny_model(family), tiny_batch(((), (), ()))
    batch.pop("labels")
    expected = model.base_llm_model(**batch).logits
    found = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_single(side, kind):
    model = tiny_model(kind=kind)
    layout = ((7, 21), (), (14,))
    batch = tiny_batch(layout, side=side)
    output = model(**batch)
    page = 0
    total, count = 0.0, 0
    for row, tokens in enumerate(layout):
        keep = batch["attention_mask"][row].bool()
        single = {
            "input_ids": batch["input_ids"][row, keep][None],
            "attention_mask": batch["attention_mask"][row, keep][None],
            "labels": batch["labels"][row, keep][None],
        }
        if tokens:
            single["pages"] = batch["pages"][page : page + len(tokens)]
            single["page_num_tokens"] = torch.tensor(tokens)
            single["num_pages"] = torch.tensor([len(tokens)])
        page += len(tokens)
        total += model(**single).loss.item() * 3
        count += 3
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_a_changed_page_changes_the_loss_of_its_own_sample_only():
    model, batch = tiny_model(), tiny_batch()
    labels = batch.pop("labels")
    before = model(**batch, labels=labels).logits
    batch["pages"] = batch["pages"].clone()
    batch["pages"][2] = 255 - batch["pages"][2]  # the one page of the third sample
    after = model(**batch, labels=labels).logits
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] - after[6:]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_unused_tokens_of_a_page_do_not_matter(kind):
    model, batch = tiny_model(kind=kind), tiny_batch()
    features = model.ocr_embed(batch.pop("pages"))
    before = model(**batch, features=features).loss
    for page, used in enumerate(batch["page_num_tokens"].tolist()):
        features[page, used:] = 1e3
    assert torch.equal(model(**batch, features=features).loss, before)


def test_a_batch_without_memory_is_harmless_in_training():
    model = tiny_model().train()
    batch = tiny_batch(((), (), ()))
    output = model(**batch)
    output.loss.backward()
    grads = [parameter.grad for parameter in model.proj.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)
    torch.testing.assert_close(output.loss, model.eval()(**batch).loss)


def test_cached_features_give_the_loss_of_fresh_pages():
    model, batch = tiny_model(), tiny_batch()
    model._feature_dtype = torch.float16
    fresh = model(**batch).loss
    features = model.ocr_embed(batch.pop("pages")).half()
    assert torch.equal(model(**batch, features=features).loss, fresh)


def test_num_items_in_batch_is_the_divisor_of_the_loss():
    model, batch = tiny_model(), tiny_batch()
    mean = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(18)).loss, mean * 9 / 18)
    batch["labels"].fill_(-100)
    nothing = model.train()(**batch).loss
    assert nothing.item() == 0
    assert nothing.grad_fn is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradients_without_touching_the_embeddings(family):
    batch, grads = tiny_batch(), []
    for enable in (False, True):
        model = tiny_model(family).train()
        if enable:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        grads.append([parameter.grad for parameter in model.proj.parameters()])
        assert not model.base_llm_model.get_input_embeddings()(batch["input_ids"]).requires_grad
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ConfigError, match="use_reentrant=True; ocrmem takes use_reentrant=False only"):
        tiny_model().gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_keeps_float32_beside_a_bfloat16_llm(family):
    model = tiny_model(family).to(torch.bfloat16).train()
    assert model.base_llm_model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.proj.parameters()} == {torch.float32}
    weight = model.proj.linear1.weight.detach().clone()
    model.half()
    assert torch.equal(model.proj.linear1.weight, weight), "moved, never rounded"
    model.to(torch.bfloat16)
    output = model(**tiny_batch())
    output.loss.backward()
    assert model.proj.linear1.weight.grad.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_tokens_have_the_rms_of_the_embeddings(family):
    model, batch = tiny_model(family), tiny_batch()
    embeds = model.get_input_embeddings()(torch.arange(101))
    expected = embeds.square().mean().sqrt()
    memory = model.proj(model.ocr_embed(batch["pages"]))
    torch.testing.assert_close(memory.square().mean(-1).sqrt(), expected.expand(3, 21), rtol=1e-3, atol=1e-6)


def test_forward_holds_nothing_that_could_cut_the_gradient():
    sources = [
        inspect.getsource(mem_model.MEMModel.forward).split('"""')[2],
        inspect.getsource(mem_model.MEMModel.embed),
        inspect.getsource(label_loss),
        inspect.getsource(splice.splice),
        inspect.getsource(projection.Projection.forward),
    ]
    for word in ("no_grad", "inference_mode", ".detach(", ".data"):
        assert not any(word in source for source in sources), word


def test_counts_are_compared_for_each_sample():
    model, batch = tiny_model(), tiny_batch()
    batch["page_num_tokens"] = torch.tensor([7, 20, 15])  # the same total, one token in the wrong sample
    with pytest.raises(SpliceError, match="sample 0 has 28 placeholders in input_ids but its pages give 27 memory"):
        model(**batch)
    batch = tiny_batch()
    batch["num_pages"] = torch.tensor([2, 0, 2])
    with pytest.raises(SpliceError, match=r"num_pages=\[2, 0, 2\] must hold one count for each of the 3 samples"):
        model(**batch)


def test_placeholders_without_pages_are_refused():
    model, batch = tiny_model(), tiny_batch()
    pages = batch.pop("pages")
    with pytest.raises(SpliceError, match=rf"42 placeholders \(id {PLACEHOLDER}\) but neither `pages` nor `features`"):
        model(**batch)
    del batch["num_pages"]
    with pytest.raises(SpliceError, match="came without `page_num_tokens`"):
        model(**batch, pages=pages)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_batched_equals_single_and_a_plain_greedy_loop(family):
    model, batch = tiny_model(family), tiny_batch()
    batch.pop("labels")
    found = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(found[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    keep = batch["attention_mask"][2].bool()
    single = {
        "input_ids": batch["input_ids"][2, keep][None],
        "pages": batch["pages"][2:],
        "page_num_tokens": torch.tensor([14]),
        "num_pages": torch.tensor([1]),
    }
    for step in range(4):
        token = model(**single).logits[:, -1].argmax(-1, keepdim=True)
        assert int(token) == int(found[2, step - 4])
        single["input_ids"] = torch.cat([single["input_ids"], token], dim=1)


def test_generate_refuses_right_padding():
    batch = tiny_batch(side="right")
    batch.pop("labels")
    with pytest.raises(SpliceError, match="padded on the right"):
        tiny_model().generate(**batch, max_new_tokens=1)
