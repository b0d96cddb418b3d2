"""Corpora for objectives: JSONL files of prose or conversations to documents of a bank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ocrmem.data.bank import BankDocument
from ocrmem.data.conversations import read_conversations
from ocrmem.data.documents import read_documents
from ocrmem.errors import DataError
from ocrmem.memory.history import turn_text
from ocrmem.types import Conversation

CUTS = 8
"""Places in each conversation where a history may end for the `reply` task."""


def read_corpus(path: Path, *, max_chars: int | None = None, seed: int = 0) -> list[BankDocument]:
    """Documents of a JSONL file, which holds prose (`{"id", "text"}`) or conversations (`{"messages"}`).

    Args:
        max_chars: take documents in a seeded order until this many characters are reached; None: all, in file order.

    Raises:
        DataError: the file is missing, empty, or a line is broken.
    """
    if _holds_conversations(path):
        documents = [conversation_document(c) for c in read_conversations(path).conversations]
    else:
        documents = [BankDocument(document.id, document.text) for document in read_documents(path)]
    documents = [document for document in documents if document.text.strip()]
    if max_chars is None:
        return documents
    kept, total = [], 0
    for index in np.random.default_rng(seed).permutation(len(documents)):
        if total >= max_chars:
            break
        kept.append(documents[index])
        total += len(documents[index].text)
    return kept


def conversation_document(conversation: Conversation) -> BankDocument:
    """A conversation as its history is drawn, with the places of its turns, and cuts spread evenly over them."""
    text, turns = "", []
    for message in conversation.messages:
        drawn = turn_text(message)
        start = len(text) + len(drawn) - 1 - len(message.content)
        turns.append((message.role, start, start + len(message.content)))
        text += drawn
    ends = [end + 1 for _, _, end in turns[:-1]]
    cuts = sorted({ends[i * len(ends) // CUTS] for i in range(CUTS)}) if ends else []
    return BankDocument(conversation.source, text, cuts=tuple(cuts), turns=tuple(turns))


def read_corpora(paths: Sequence[Path], *, max_chars: int | None = None, seed: int = 0) -> list[BankDocument]:
    """`read_corpus` of several files, one after the other."""
    return [document for path in paths for document in read_corpus(path, max_chars=max_chars, seed=seed)]


def shuffled_documents(documents: Sequence[BankDocument], share: float, *, seed: int = 0) -> list[BankDocument]:
    """Prose documents with their words in random order, until they have `share` of the prose's characters."""
    prose = [document for document in documents if not document.turns]
    wanted = share * sum(len(document.text) for document in prose)
    rng = np.random.default_rng([seed, 1])
    made, total = [], 0
    for index in rng.permutation(len(prose)):
        if total >= wanted:
            break
        words = np.array(prose[index].text.split(), dtype=object)
        text = " ".join(rng.permutation(words))
        made.append(BankDocument(f"{prose[index].id}#shuffled", text, shuffled=True))
        total += len(text)
    return made


def _holds_conversations(path: Path) -> bool:
    try:
        with Path(path).open(encoding="utf-8") as file:
            first = next((line for line in file if line.strip()), "")
        value = json.loads(first)
    except (OSError, ValueError) as error:
        raise DataError(
            f"corpus {str(path)!r} cannot be read: {error}. Expected JSONL with one document or conversation a line."
        ) from error
    return isinstance(value, dict) and "messages" in value
