import pytest
import torch

from ocrmem.data.collator import MEMCollator
from ocrmem.errors import ConfigError


def sample(length, *page_tokens, reply=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (length,), generator=generator)
    labels = torch.full((length,), -100)
    labels[-reply:] = ids[-reply:]
    return {
        "input_ids": ids,
        "labels": labels,
        "pages": torch.randint(0, 256, (len(page_tokens), 5, 7), dtype=torch.uint8, generator=generator),
        "page_keys": [f"{seed}-{i}" for i in range(len(page_tokens))],
        "page_num_tokens": torch.tensor(page_tokens, dtype=torch.int64),
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_pages(side):
    samples = [sample(11, 3, 2, seed=1), sample(5, seed=2), sample(7, 4, seed=3)]
    batch = MEMCollator(99, padding_side=side)(samples)
    assert set(batch) == {
        *("input_ids", "attention_mask", "labels"),
        *("pages", "page_keys", "page_num_tokens", "num_pages"),
    }
    assert batch["input_ids"].shape == (3, 11)
    for row, one in enumerate(samples):
        length = len(one["input_ids"])
        place = slice(11 - length, 11) if side == "left" else slice(0, length)
        padding = torch.ones(11, dtype=torch.bool)
        padding[place] = False
        assert torch.equal(batch["input_ids"][row, place], one["input_ids"])
        assert torch.equal(batch["labels"][row, place], one["labels"])
        assert (batch["input_ids"][row, padding] == 99).all()
        assert (batch["labels"][row, padding] == -100).all()
        assert torch.equal(batch["attention_mask"][row], (~padding).long())
    assert torch.equal(batch["pages"], torch.cat([samples[0]["pages"], samples[2]["pages"]]))
    assert batch["page_keys"] == ["1-0", "1-1", "3-0"]
    assert batch["page_num_tokens"].tolist() == [3, 2, 4]
    assert batch["num_pages"].tolist() == [2, 0, 1]
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "page_num_tokens", "num_pages"))


def test_a_batch_without_memory_has_no_pages():
    assert set(MEMCollator(0)([sample(3), sample(4)])) == {"input_ids", "attention_mask", "labels"}


def test_multiple():
    collator = MEMCollator(0, pad_to_multiple_of=8)
    assert collator([sample(9)])["input_ids"].shape == (1, 16)
    assert collator([sample(8)])["input_ids"].shape == (1, 8)


def test_bad_settings():
    with pytest.raises(ConfigError, match="padding_side='middle': expected 'left' or 'right'"):
        MEMCollator(0, padding_side="middle")
    with pytest.raises(ConfigError, match="pad_to_multiple_of=0: expected 1 or more, or None"):
        MEMCollator(0, pad_to_multiple_of=0)
