"""Pages back into text: the few that matter for a question, by BM25.

```
pages' texts ─▶ the k best for the question ─▶ their sentences that share enough of it ─▶ text, in the history's order
```

Text that has nothing to do with the question is worse than none: it takes tokens from the pages, and the LLM answers
from it. So a sentence comes back only if it has a fair share of the question's words.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import regex

from ocrmem.errors import ConfigError

SENTENCE = regex.compile(r"[^\n.!?]*[\n.!?]+[\"')\]]*\s*|[^\n.!?]+$")
"""A sentence or a line."""

WORD = r"(?u)\b\w+\b"
"""What BM25 counts; bm25s' own pattern knows no single digit."""
STOP_WORDS = "en", "en_plus"
"""bm25s' lists: the short one for BM25, which gives little to common words by itself; the long one, with `what`, `who`
and `you`, for the share of a question, of which a text without these words would seem to lack much."""
SHARED = 0.5
"""Least share of a question that a recalled sentence has in common with it: of the question's words, stop words left
out, each counted with its BM25 weight among the sentences, so that rare words count most."""
SHARED_WORDS = 2
"""Fewest different words that they have in common, where the question has more than that."""


_LOADING = threading.Lock()
"""One thread at a time hides JAX."""


def load_bm25s() -> Any:
    """The package bm25s.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with _without_jax():
            import bm25s
    except ImportError:
        raise ConfigError(
            "recall was asked for, but the package bm25s is not installed: pip install 'ocrmem[recall]', or set "
            "recall to 0 (in training, exact of every stage)."
        ) from None
    logger = logging.getLogger("bm25s")
    if logger.level != logging.WARNING:  # it logs every index at DEBUG; setting a level empties every logger's cache
        logger.setLevel(logging.WARNING)
    return bm25s


@contextlib.contextmanager
def _without_jax() -> Iterator[None]:
    """Hide JAX, imported or not. With it at hand bm25s would start it while it is imported, threads, most of a GPU's
    memory and all, for a ranking that is not used here; a data loader's forks may then wait for ever."""
    with _LOADING:
        if "bm25s" in sys.modules:  # it has looked for JAX already
            yield
            return
        modules: dict[str, Any] = sys.modules  # pyright: ignore[reportAssignmentType] - None: an import of it fails
        there, jax = "jax" in modules, modules.get("jax")
        modules["jax"] = None
        try:
            yield
        finally:
            del modules["jax"]
            if there:
                modules["jax"] = jax


def cut_into_words(texts: Sequence[str], stop_words: str = STOP_WORDS[0]) -> list[list[str]]:
    """The words of each text, in lower case, without stop words."""
    if not texts:
        return []
    cut = load_bm25s().tokenize(
        list(texts), token_pattern=WORD, stopwords=stop_words, return_ids=False, show_progress=False
    )
    return [list(map(str, words)) for words in cut]


class PageIndex:
    """Ranks texts by BM25 with bm25s' defaults (Lucene's variant, k1 1.5, b 0.75); each is cut into words once."""

    def __init__(self) -> None:
        self._bm25s = load_bm25s()
        self._words: dict[str, list[str]] = {}
        self._indexed: tuple[str, ...] = ()
        self._retriever: Any = None

    def scores(self, texts: Sequence[str], question: str) -> np.ndarray:
        """Relevance of each text to the question, float [len(texts)]; 0 where they share no word."""
        asked = cut_into_words([question])[0]
        if tuple(texts) != self._indexed:
            words = self._all_words(texts)
            self._retriever = None
            if any(words):
                self._retriever = self._bm25s.BM25()
                self._retriever.index(words, show_progress=False)
            self._indexed = tuple(texts)
        if self._retriever is None:
            return np.zeros(len(texts))
        known = [word for word in asked if word in self._retriever.vocab_dict]
        return self._retriever.get_scores(known) if known else np.zeros(len(texts))

    def _all_words(self, texts: Sequence[str]) -> list[list[str]]:
        new = [text for text in texts if text not in self._words]
        known = {**self._words, **dict(zip(new, cut_into_words(new), strict=True))} if new else self._words
        self._words = {text: known[text] for text in texts}
        return list(map(self._words.__getitem__, texts))


def best(scores: np.ndarray, number: int) -> list[int]:
    """Indices of the highest scores above 0, the highest first, the newest first among equals."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], -i))
    return [i for i in order[:number] if scores[i] > 0]


def recalled_text(
    pages: Sequence[str],
    question: str,
    *,
    budget: int,
    count_tokens: Callable[[Sequence[str]], list[int]],
    shared: float = SHARED,
) -> str:
    """Sentences of some pages, in their order: those that BM25 finds best for the question, as many as fit.

    Args:
        pages: texts in the history's order.
        budget: most tokens of the result.
        count_tokens: tokens of each of several texts.
        shared: as `SHARED`; 0: whatever fits comes back, related to the question or not.
    """
    sentences = [m.group() for page in pages for m in SENTENCE.finditer(page) if m.group().strip()]
    if not sentences:
        return ""
    related = _related(sentences, question, shared) if shared else [True] * len(sentences)
    scores = PageIndex().scores(sentences, question)
    lengths = count_tokens([sentence.strip() + "\n" for sentence in sentences])
    kept: list[int] = []
    for i in sorted(range(len(sentences)), key=lambda i: (-scores[i], i)):
        if related[i] and lengths[i] <= budget:
            kept.append(i)
            budget -= lengths[i]
    return "\n".join(sentences[i].strip() for i in sorted(kept))


def _related(sentences: Sequence[str], question: str, shared: float) -> list[bool]:
    """Whether each sentence has that share of the question's words, weighed as BM25 does (Lucene's variant)."""
    asked_words, *words_of_each = cut_into_words([question, *sentences], STOP_WORDS[1])
    asked = set(asked_words)
    if not asked:
        return [False] * len(sentences)
    common = [asked.intersection(words) for words in words_of_each]
    holding = Counter(word for words in common for word in words)
    weights = {}
    for word in asked:
        number = max(holding[word], 1)  # one that is nowhere counts as much as one that is somewhere, and not more
        weights[word] = math.log(1 + (len(sentences) - number + 0.5) / (number + 0.5))
    least = shared * sum(weights.values())
    fewest = SHARED_WORDS if len(asked) > SHARED_WORDS else 1
    return [len(words) >= fewest and sum(weights[word] for word in words) >= least for words in common]


class Passages:
    """Text that no page holds any more, in pieces as long as a page, so that it can still be found.

    Args:
        size: most characters of a piece.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.texts: list[str] = []
        self._rest = ""

    def append(self, text: str) -> None:
        """Take text that follows what came before; a piece ends at a line's or a word's end where there is one."""
        self._rest += text
        start = 0
        while len(self._rest) - start > self.size:
            end = start + self.size
            cut = max(self._rest.rfind("\n", start, end), self._rest.rfind(" ", start, end)) + 1
            end = cut if cut > start else end
            self.texts.append(self._rest[start:end])
            start = end
        self._rest = self._rest[start:]

    @property
    def all(self) -> list[str]:
        """Every piece, the last and shorter one too."""
        return [*self.texts, self._rest] if self._rest else list(self.texts)
