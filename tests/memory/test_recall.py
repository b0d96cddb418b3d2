"""Recall: the passages that a question is about, back as text."""

import os
import subprocess
import sys

import numpy as np
import pytest

from ocrmem.errors import ConfigError
from ocrmem.memory.recall import PageIndex, Passages, best, load_bm25s, recalled_text

PAGES = [
    "user: My dog is called Bruno. He is 9 years old.\n",
    "assistant: The weather will be fine. Take a hat.\n",
    "user: The train leaves at gate 7. It costs 12 euros.\n",
]


def words(texts):
    return [len(text.split()) for text in texts]


def test_the_page_that_shares_words_comes_first():
    index = PageIndex()
    assert best(index.scores(PAGES, "What is the dog called?"), 2)[0] == 0
    assert best(index.scores(PAGES, "At which gate, 7 or 8?"), 3) == [2]
    assert best(index.scores(PAGES, "Nothing shared whatsoever"), 3) == []
    assert best(index.scores([*PAGES, "user: The dog is gone.\n"], "the dog"), 1) == [3]
    assert best(index.scores([], "dog"), 1) == []
    assert best(index.scores(["...", "\n"], "dog"), 1) == []


def test_equal_scores_give_the_newest():
    assert best(np.array([1.0, 1.0, 0.0]), 3) == [1, 0]


def test_sentences_within_the_budget_in_their_order():
    asked = "What costs 12 euros, and who is called Bruno?"
    text = recalled_text(PAGES, asked, budget=12, count_tokens=words, shared=0.3)
    assert text == "user: My dog is called Bruno.\nIt costs 12 euros."
    assert recalled_text(PAGES, asked, budget=5, count_tokens=words, shared=0.3) == "It costs 12 euros."
    assert recalled_text(PAGES, "train", budget=1, count_tokens=words) == ""
    assert recalled_text([], "train", budget=9, count_tokens=words) == ""


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("What is the dog called?", "user: My dog is called Bruno."),
        ("How old is Bruno?", "user: My dog is called Bruno.\nHe is 9 years old."),
        ("When does the train leave?", "user: The train leaves at gate 7."),
        ("What did I say about the weather?", "assistant: The weather will be fine."),
        ("At which gate, 7 or 8?", "user: The train leaves at gate 7."),
        ("Shall we take a taxi to the harbour tonight, or walk?", ""),  # one word of many is no relation
        ("The dog barked at the postman all morning.", ""),
        ("What was it?", ""),
        ("", ""),
    ],
)
def test_only_sentences_that_share_enough_of_the_question(question, found):
    assert recalled_text(PAGES, question, budget=99, count_tokens=words) == found
    if question:
        everything = recalled_text(PAGES, question, budget=99, count_tokens=words, shared=0.0)
        assert everything.count("\n") == 5  # six sentences


def test_rare_words_count_most():
    pages = ["user: The ship sails on Monday. The ship sails on Friday. The ship sails north. Zara waits.\n"]
    assert recalled_text(pages, "ship sails Zara", budget=99, count_tokens=words) == ""
    assert "Monday" in recalled_text(pages, "ship sails Monday", budget=99, count_tokens=words)
    assert recalled_text(pages, "Zara waits today", budget=99, count_tokens=words) == "Zara waits."


def test_passages_hold_all_of_the_text_and_break_between_words():
    passages = Passages(20)
    text = "".join(f"line {n} is here\n" for n in range(40)) + "x" * 50
    for start in range(0, len(text), 7):
        passages.append(text[start : start + 7])
    assert "".join(passages.all) == text
    assert max(map(len, passages.all)) <= 20
    assert all(piece[-1] in " \n" for piece in passages.all if "x" not in piece)
    whole = Passages(20)
    whole.append(text)
    assert whole.all == passages.all


@pytest.mark.parametrize("before", ["", "import jax, jax.lax, sys; mine = jax; "])
def test_jax_is_not_started_for_it(before, tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("print('jax was imported')")
    (tmp_path / "jax" / "lax.py").write_text("def top_k(values, k): print('jax was started')")
    load = "from ocrmem.memory.recall import load_bm25s; load_bm25s(); load_bm25s(); print('loaded'); import jax"
    after = "; assert sys.modules['jax'] is jax is mine" if before else ""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-c", before + load + after]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = ["loaded", "jax was imported"]
    assert done.stdout.split("\n") == [*(reversed(lines) if before else lines), ""], done.stderr
    assert done.returncode == 0, done.stderr


def test_without_bm25s_it_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(
        ConfigError, match=r"bm25s is not installed: pip install 'ocrmem\[recall\]', or set recall to 0"
    ):
        load_bm25s()
