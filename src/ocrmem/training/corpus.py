"""Corpora for objectives: JSONL files of prose or conversations to documents of a bank."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ocrmem.data.bank import BankDocument
from ocrmem.data.conversations import read_conversations
from ocrmem.data.documents import read_documents
from ocrmem.errors import DataError
from ocrmem.memory.history import turn_text
from ocrmem.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUTS = 8
"""Places in each conversation where a history may end for the `reply` task."""
SHIFT_CHARS, SHIFT_TURNS = 160, 4
"""The most characters of prose, and turns of a conversation, that a copy begins later: about a line of a page."""
LEXICON_WORDS = 320
"""Words of one document of the lexicon, about 2,000 characters."""
LEXICON_SHARES = (0.45, 0.3, 0.1, 0.15)
"""Shares of its words: from the corpora, from the LLM's vocabulary, joined from pieces of it, figures."""
LINE_END_SHARE = 0.02
"""Of its words, those that end a line."""
LONGEST_WORD = 24
"""Characters; a longer word is a URL or an accident."""
_SPACE = re.compile(r"\s+(?=\S)")
_MARKS = ("", ",", ".", ";", ":", "?", "!", ")", '"', "...")
_MARK_SHARES = (0.82, 0.07, 0.05, 0.01, 0.01, 0.01, 0.01, 0.005, 0.01, 0.005)


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


def shifted_documents(documents: Sequence[BankDocument], copies: int, *, seed: int = 0) -> list[BankDocument]:
    """Copies of documents that begin at a later word, or turn, of the document, drawn anew for each copy.

    A page cuts a text into memory tokens by its pixels, so that every copy is cut elsewhere. A document of one word or
    of two turns has none.
    """
    rng = np.random.default_rng([seed, 2])
    made = []
    for document in list(documents) * copies:
        if document.turns:
            starts = [end + 1 for _, _, end in document.turns[:-2]][:SHIFT_TURNS]
        else:
            starts = [match.end() for match in _SPACE.finditer(document.text[:SHIFT_CHARS])]
        if starts:
            start = starts[int(rng.integers(len(starts)))]
            cuts = tuple(cut - start for cut in document.cuts if cut > start)
            turns = tuple((role, begin - start, end - start) for role, begin, end in document.turns if begin >= start)
            made.append(BankDocument(document.id, document.text[start:], cuts=cuts, turns=turns, copied=True))
    return made


def lexicon_documents(
    documents: Sequence[BankDocument], tokenizer: PreTrainedTokenizerBase, share: float, *, seed: int = 0
) -> list[BankDocument]:
    """Documents of random words, until they have `share` of the characters of `documents`.

    A word that stands in the corpora ten times is not learnt, and no language model helps to guess it, so it has to be
    read. Words come from the corpora, each with the square root of its frequency; from the LLM's vocabulary, each
    alike; from two or three pieces of that vocabulary joined; and there are numbers, dates, times and codes.
    """
    rng = np.random.default_rng([seed, 1])
    wanted = share * sum(len(document.text) for document in documents)
    counts = Counter(word for document in documents for word in document.text.split() if len(word) <= LONGEST_WORD)
    known = np.array(sorted(counts), dtype=object)
    cumulated = np.cumsum(np.sqrt([counts[word] for word in known]))
    begins, continues = vocabulary_words(tokenizer)
    made: list[BankDocument] = []
    total = 0
    while total < wanted and len(known) and begins:
        kinds = rng.choice(len(LEXICON_SHARES), size=LEXICON_WORDS, p=LEXICON_SHARES)
        drawn = known[np.searchsorted(cumulated, rng.random(LEXICON_WORDS) * cumulated[-1], side="right")]
        marks = rng.choice(_MARKS, size=LEXICON_WORDS, p=_MARK_SHARES)
        ends = rng.random(LEXICON_WORDS) < LINE_END_SHARE
        text = ""
        for kind, word, mark, end in zip(kinds, drawn, marks, ends, strict=True):
            if kind == 3:
                word = _figures(rng)
            elif kind > 0:
                word = begins[int(rng.integers(len(begins)))]
                for _ in range(0 if kind == 1 or not continues else 1 + int(rng.integers(2))):
                    word += continues[int(rng.integers(len(continues)))]
            text += word + ("" if kind == 0 else str(mark)) + ("\n" if end else " ")
        made.append(BankDocument(f"lexicon/{seed}/{len(made)}", text.strip(), shuffled=True))
        total += len(made[-1].text)
    return made


def vocabulary_words(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Printable words of a vocabulary that begin with a space, without it; and lower-case pieces that go on a word."""
    special = set(tokenizer.all_special_ids)
    begins, continues = set(), set()
    for index in sorted(set(tokenizer.get_vocab().values()) - special):
        text = str(tokenizer.decode([index]))
        word = text.strip()
        if not word or not word.isprintable() or "\ufffd" in word or len(word) > LONGEST_WORD or " " in word:
            continue
        if text.startswith(" "):
            begins.add(word)
        elif word.isalpha() and word.islower():
            continues.add(word)
    return sorted(begins), sorted(continues)


def _figures(rng: np.random.Generator) -> str:
    """A number, amount, year, date, time or code."""
    number = [int(n) for n in rng.integers(0, 10 ** rng.integers(1, 7, size=3))]
    kind = int(rng.integers(8))
    if kind == 0:
        return f"{number[0]:,}"
    if kind == 1:
        return f"{number[0] % 1000}.{number[1] % 100}"
    if kind == 2:
        return str(1000 + number[0] % 1100)
    if kind == 3:
        return f"{number[0] % 3000:04}-{1 + number[1] % 12:02}-{1 + number[2] % 31:02}"
    if kind == 4:
        return f"{number[0] % 24}:{number[1] % 60:02}"
    if kind == 5:
        return bytes(rng.integers(0, 256, size=int(rng.integers(3, 7)), dtype=np.uint8)).hex()
    if kind == 6:
        return f"{'ABCDEFGHKLMNPQRSTUVWXYZ'[number[0] % 23]}{number[1]}"
    return str(number[0])


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
