"""Packed rows of a `MEMDataset`: the unpacked batch's loss and gradients, and no sample sees another."""

import pytest
import torch
from tiny import PLACEHOLDER, tiny_model

from ocrmem.data.collator import MEMCollator
from ocrmem.errors import ConfigError, SpliceError

PAGE_TOKENS = ((7, 21), (), (14,), (21, 21, 3))


def samples(*, seed: int = 3) -> list[dict]:
    """Four samples of different lengths; the second has no memory."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for tokens, length, reply in zip(PAGE_TOKENS, (5, 9, 4, 13), (3, 4, 2, 7), strict=True):
        words = torch.randint(3, PLACEHOLDER, (length,), generator=generator)
        ids = torch.cat([torch.tensor([1]), torch.full((sum(tokens),), PLACEHOLDER), words])
        labels = torch.full_like(ids, -100)
        labels[-reply:] = ids[-reply:]
        made.append(
            {
                "input_ids": ids,
                "labels": labels,
                "pages": torch.randint(0, 256, (len(tokens), 15, 28), dtype=torch.uint8, generator=generator),
                "page_keys": [f"{length}-{page}" for page in range(len(tokens))],
                "page_num_tokens": torch.tensor(tokens, dtype=torch.int64),
            }
        )
    return made


def packer(**options) -> MEMCollator:
    return MEMCollator(0, packing=True, memory_token_id=PLACEHOLDER, tokens_per_page=21, **options)


def run(model, batch):
    model.train()
    model.zero_grad()
    output = model(**{key: value for key, value in batch.items() if key != "page_keys"}, use_cache=False)
    output.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.proj.named_parameters()}
    return output, grads


@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 64}])
def test_the_unpacked_loss_and_gradients(attention, family, options):
    if attention == "packed" and family == "gemma3_text":
        pytest.skip("the packed kernel knows no sliding windows")
    model = tiny_model(family, attn_implementation=attention, max_position_embeddings=256)
    padded, expected = run(model, MEMCollator(0)(samples()))
    row = packer(**options)(samples())
    assert row["input_ids"].shape == (1, 128 if options else 122)
    packed, found = run(model, row)
    torch.testing.assert_close(packed.logits, padded.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=0, atol=1e-6)
    for name, grad in expected.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_no_sample_sees_another():
    model = tiny_model(max_position_embeddings=256)
    before = run(model, packer()(samples()))[0].logits
    changed = samples()
    changed[0]["input_ids"][-5:-3] = 50  # in front of its labels
    changed[0]["pages"] = 255 - changed[0]["pages"]
    after = run(model, packer()(changed))[0].logits
    assert (after[:3] - before[:3]).abs().max() > 1e-3
    torch.testing.assert_close(after[3:], before[3:], rtol=0, atol=1e-6)


def test_what_a_row_holds():
    made = samples()
    made[1]["labels"][0] = 5  # no prompt in front of it: nothing in the sample predicts it
    row = packer(pad_to_multiple_of=64)(made)
    assert set(row) == {
        *("input_ids", "labels", "position_ids", "cu_seq_lens_q", "max_length_q", "sample_lengths", "target_index"),
        *("pages", "page_keys", "page_num_tokens", "num_pages", "placeholder_index", "memory_index"),
    }
    assert row["cu_seq_lens_q"].tolist() == [0, 34, 44, 63, 122, 128]
    assert row["cu_seq_lens_q"].dtype == torch.int32
    assert row["max_length_q"] == 59
    assert row["sample_lengths"] == [34, 10, 19, 59, 6]
    assert row["position_ids"][0, [0, 33, 34, 44, 122, 127]].tolist() == [0, 33, 0, 0, 0, 5]
    assert torch.equal(row["input_ids"][0, :122], torch.cat([sample["input_ids"] for sample in made]))
    assert (row["labels"] != -100).sum() == 3 + 4 + 2 + 7
    assert torch.equal(row["labels"][0][row["target_index"] + 1], row["labels"][row["labels"] != -100])
    assert row["num_pages"].tolist() == [6]
    assert (row["input_ids"][0, row["placeholder_index"]] == PLACEHOLDER).all()
    assert row["memory_index"].tolist()[:8] == [0, 1, 2, 3, 4, 5, 6, 21]
    without = packer()([made[1]])
    assert "pages" not in without
    assert "placeholder_index" not in without


def test_bad_input():
    with pytest.raises(ConfigError, match="packing=True needs memory_token_id .* tokens_per_page of the encoder"):
        MEMCollator(0, packing=True)
    broken = samples()
    broken[2]["page_num_tokens"] = torch.tensor([13])
    with pytest.raises(SpliceError, match="sample 2 of a packed row has 14 placeholders .* its pages give 13 memory"):
        packer()(broken)
