"""How prompts are put into batches, and how many fit a GPU."""

import random

import pytest
import torch
from tiny import tiny_llm

from ocrmem.evaluation.scoring import ANSWER_POSITIONS, CACHE_SHARE, answer_positions, batches


def test_every_prompt_is_in_one_batch_and_no_batch_is_too_large():
    chosen = random.Random(0)
    lengths = [chosen.randrange(1, 200) for _ in range(300)]
    rooms = [chosen.randrange(1, 100) for _ in range(300)]
    found = list(batches(lengths, rooms, most=2000))
    assert sorted(index for batch in found for index in batch) == list(range(300))
    sizes = [len(batch) * (max(lengths[i] for i in batch) + max(rooms[i] for i in batch)) for batch in found]
    assert max(sizes) <= 2000
    assert len(found) < 2 * (sum(lengths) + sum(rooms)) / 2000, "padding takes most of the batches"


def test_a_prompt_that_is_too_long_is_alone():
    assert list(batches([500, 3, 3], [0, 0, 0], most=100)) == [[1, 2], [0]]
    assert list(batches([], [], most=100)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("mlp_width", "numbers"),
    [
        (4, 2 * 2 * 2 * 8),  # keys and values × layers × heads × their width
        (900, 4 * (8 + 900)),  # what a layer computes takes more than that
    ],
)
def test_a_batch_takes_its_share_of_the_free_memory(dtype, mlp_width, numbers, monkeypatch):
    llm = tiny_llm("qwen3", hidden_size=8, intermediate_size=mlp_width).to(dtype)
    free = 10**9
    share = 1.0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: share)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: free // 10)
    assert answer_positions(llm, torch.device("cuda")) == int(CACHE_SHARE * free) // (numbers * dtype.itemsize)
    assert answer_positions(llm, torch.device("cpu")) == ANSWER_POSITIONS
    share = 0.25  # of all memory, a tenth of the free of which is taken
    left = free // 2 - free // 10
    assert answer_positions(llm, torch.device("cuda")) == int(CACHE_SHARE * left) // (numbers * dtype.itemsize)
