"""Corpora: files to documents, copies of them that begin later, and random words."""

import json
from collections import Counter

import pytest

from ocrmem.data.bank import Bank, BankDocument
from ocrmem.data.conversations import read_conversations
from ocrmem.errors import DataError
from ocrmem.memory.history import history_text
from ocrmem.model.llm import load_tokenizer
from ocrmem.training.build import find_data
from ocrmem.training.corpus import (
    SHIFT_CHARS,
    conversation_document,
    lexicon_documents,
    read_corpus,
    shifted_documents,
    vocabulary_words,
)

TEXT = "The geoid is the shape that the ocean surface would take.  It was described in 1828 by Gauss. " * 4


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2-135m-instruct")


def test_corpora(tmp_path):
    path = tmp_path / "prose.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "text": TEXT}) + "\n" for i in range(5)), encoding="utf-8")
    documents = read_corpus(path, max_chars=2 * len(TEXT))
    assert len(documents) == 2
    with pytest.raises(DataError, match="cannot be read"):
        read_corpus(tmp_path / "none.jsonl")


def test_the_lexicon_has_the_whole_vocabulary_and_the_rare_words_of_the_corpora(tokenizer):
    common = BankDocument("a", "the " * 4000 + "quetzalcoatl " * 40)
    documents = lexicon_documents([common], tokenizer, 20.0)
    words = Counter(word.strip(',.;:?!)"') for document in documents for word in document.text.split())
    assert all(document.shuffled for document in documents)
    assert sum(len(document.text) for document in documents) >= 20 * len(common.text)
    # 4,000 to 40 in the text, 10 to 1 here
    assert 5 < words["the"] / words["quetzalcoatl"] < 20
    begins, continues = vocabulary_words(tokenizer)
    assert {"house", "Paris"} <= set(begins)
    assert "ing" in continues
    assert len({word for word in begins if words[word]}) > 0.3 * len(begins)  # 15,000 draws of 32,000
    assert any(word.isdigit() for word in words)
    again = lexicon_documents([common], tokenizer, 20.0)
    assert [document.text for document in again] == [document.text for document in documents]


def test_a_conversation_is_drawn_as_its_history_is():
    (conversation,) = read_conversations(find_data("chitchat/heldout.jsonl"), max_conversations=1).conversations
    document = conversation_document(conversation)
    assert document.text == history_text(conversation.messages)
    assert [document.text[start:end] for _, start, end in document.turns] == [m.content for m in conversation.messages]
    assert all(document.text[cut - 1] == "\n" for cut in document.cuts)


def test_copies_of_prose_begin_at_a_later_word():
    document = BankDocument("a", TEXT)
    copies = shifted_documents([document], 20)
    assert len(copies) == 20
    assert len({len(copy.text) for copy in copies}) > 5
    for copy in copies:
        assert copy.copied
        assert TEXT.endswith(copy.text)
        start = len(TEXT) - len(copy.text)
        assert 0 < start <= SHIFT_CHARS
        assert TEXT[start - 1] == " " != copy.text[0]
    assert [copy.text for copy in shifted_documents([document], 20)] == [copy.text for copy in copies]
    assert shifted_documents([document], 0) == []
    assert shifted_documents([BankDocument("b", "word")], 3) == []


def test_copies_of_conversations_begin_at_a_later_turn():
    (conversation,) = read_conversations(find_data("chitchat/heldout.jsonl"), max_conversations=1).conversations
    document = conversation_document(conversation)
    contents = [document.text[start:end] for _, start, end in document.turns]
    lengths = set()
    for copy in shifted_documents([document], 20):
        lengths.add(len(copy.turns))
        dropped = len(contents) - len(copy.turns)
        assert 0 < dropped <= 4
        assert copy.text == history_text(conversation.messages[dropped:])
        assert [copy.text[start:end] for _, start, end in copy.turns] == contents[dropped:]
        assert [role for role, _, _ in copy.turns] == [role for role, _, _ in document.turns[dropped:]]
        assert copy.cuts
        assert all(copy.text[cut - 1] == "\n" for cut in copy.cuts)
    assert len(lengths) > 1
    two_turns = conversation_document(type(conversation)(conversation.messages[:2], source="two"))
    assert shifted_documents([two_turns], 3) == []


def test_copies_are_no_further_documents_of_a_manifest():
    document = BankDocument("a", TEXT)
    bank = object.__new__(Bank)
    object.__setattr__(bank, "documents", [document])
    before = bank.hashes()
    bank.documents.extend(shifted_documents([document], 3))
    assert bank.hashes() == before
    assert len(before) == 1
