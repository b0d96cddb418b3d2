"""A memory token may take several positions: the LLM is told so at training, in generation and from a cache."""

import pytest
import torch
from tiny import FAMILIES, PLACEHOLDER, tiny_batch, tiny_model

from ocrmem.data.collator import MEMCollator
from ocrmem.errors import SpliceError
from ocrmem.model.packed_attention import packed_mask
from ocrmem.model.splice import positions_after
from ocrmem.session.reader import PrefixReader
from ocrmem.training.packing import _row

STRIDE = 3


def strided(family="llama", **overrides):
    # Weights large enough that attention depends on positions.
    model = tiny_model(family, kind="attention", initializer_range=0.4, **overrides)
    model.position_stride = STRIDE
    return model.eval()


def test_positions_are_counted_on_either_side_of_padding():
    placeholders = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    found = positions_after(placeholders, STRIDE, attention_mask=mask)
    assert found[0, 1:].tolist() == [0, 1, 4, 7, 8]
    assert found[1, :4].tolist() == [0, 1, 4, 7]
    assert positions_after(placeholders[:1], 1).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_gives_the_llm_those_positions(family, side):
    model = strided(family)
    batch = tiny_batch(side=side)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        for row in range(len(mask)):
            ids = batch["input_ids"][row][mask[row]][None]
            pages = {
                "pages": batch["pages"].split(batch["num_pages"].tolist())[row],
                "page_num_tokens": batch["page_num_tokens"].split(batch["num_pages"].tolist())[row],
                "num_pages": batch["num_pages"][row : row + 1],
            }
            steps = [STRIDE if token == PLACEHOLDER else 1 for token in ids[0].tolist()]
            positions = torch.tensor([[sum(steps[:index]) for index in range(len(steps))]])
            embeds = model.embed(ids, **(pages if int(pages["num_pages"]) else {}))
            alone = model.base_llm_model(
                inputs_embeds=embeds, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
            torch.testing.assert_close(logits[row][mask[row]], alone[0], rtol=1e-4, atol=1e-4)


def test_they_change_what_the_llm_says():
    model, batch = strided(), tiny_batch()
    with torch.no_grad():
        wide = model(**batch).loss
        model.position_stride = 1
        assert abs(float(wide - model(**batch).loss)) > 0.01


def test_training_without_a_cache_sees_the_whole_sample():
    """Without a mask and a cache, transformers takes a jump of positions for the beginning of another sample."""
    model = strided()
    batch = tiny_batch(((7, 14),), text=(5,), reply=2)
    cached = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=True).logits
    for given in (batch, {key: value for key, value in batch.items() if key != "attention_mask"}):
        outputs = model(**given)
        places = outputs.logit_positions
        torch.testing.assert_close(outputs.logits, cached[places[:, 0], places[:, 1]], rtol=1e-4, atol=1e-4)


def test_a_packed_row_is_its_samples():
    model = strided(attn_implementation="packed")
    samples = [tiny_batch(((21, 7),), text=(5,), seed=1), tiny_batch(((14,),), text=(6,), seed=2)]
    pieces = [(s["input_ids"][0].numpy(), (s["labels"][0] != -100).numpy()) for s in samples]
    row = _row(pieces, 64, 0, memory_token_id=PLACEHOLDER, position_stride=STRIDE)
    packed = {key: row[key] for key in ("input_ids", "labels", "position_ids", "cu_seq_lens_q", "max_length_q")}
    memory = {
        "pages": torch.cat([s["pages"] for s in samples]),
        "page_num_tokens": torch.cat([s["page_num_tokens"] for s in samples]),
        "num_pages": torch.tensor([3]),
    }
    found = model(**packed, **memory).logits
    wanted = torch.cat([model(**s).logits for s in samples])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_collator_packs_with_these_positions():
    batch = tiny_batch(((7, 14),), text=(5,))
    sample = {
        "input_ids": batch["input_ids"][0],
        "labels": batch["labels"][0],
        "pages": batch["pages"],
        "page_keys": ["a", "b"],
        "page_num_tokens": batch["page_num_tokens"],
    }
    model = strided()
    packs = MEMCollator(
        0, packing=True, memory_token_id=PLACEHOLDER, tokens_per_page=28, position_stride=STRIDE, pad_to_multiple_of=16
    )
    row = packs([sample, sample])
    length = len(sample["input_ids"])
    wanted = model.positions(batch["input_ids"])[0]
    assert row["position_ids"][0, : 2 * length].tolist() == [*wanted.tolist(), *wanted.tolist()]


def test_packed_mask_keeps_samples_apart():
    mask = packed_mask(torch.tensor([0, 2, 3], dtype=torch.int32), torch.zeros(1, 3, 4))[0, 0]
    assert (mask == 0).tolist() == [[True, False, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_and_a_prefix_reader_go_on_from_there(family):
    model = strided(family)
    batch = tiny_batch(((7, 14),), text=(5,))
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    new = 4
    ids, told = prompt["input_ids"], []
    with torch.no_grad():
        for _ in range(new):  # the whole prompt anew for every token
            logits = model(
                **{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False
            ).logits
            told.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[told[-1]]])], dim=1)
    made = model.generate(**prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made[0, -new:].tolist() == told
    tokens = batch["page_num_tokens"].tolist()
    places = iter([("page", 0)] * tokens[0] + [("other", 0)] * tokens[1])
    slots = [next(places) if token == PLACEHOLDER else token for token in prompt["input_ids"][0].tolist()]
    features = dict(zip(("page", "other"), model.ocr_embed(prompt["pages"]), strict=True))
    reader = PrefixReader(model)
    reader.read(slots[:-2], features)  # the second time all but the last two come from the cache
    found = [int(reader.read(slots, features).argmax())]
    assert reader.num_read <= 2
    for _ in range(new - 1):
        found.append(int(reader.step(found[-1]).argmax()))
    assert found == told


def test_a_cache_without_positions_is_refused():
    model = strided()
    batch = tiny_batch(((7, 14),), text=(5,))
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    cache = model(**prompt, use_cache=True).past_key_values
    with pytest.raises(SpliceError, match="without position_ids, and a memory token takes 3 positions"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
