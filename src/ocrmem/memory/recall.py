"""Pages back into text: the few that matter for a question, by BM25.

```
pages' texts ─▶ the k best for the question ─▶ their sentences, the best that fit ─▶ text, in the history's order
```
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import regex

from ocrmem.errors import ConfigError

SENTENCE = regex.compile(r"[^\n.!?]*[\n.!?]+[\"')\]]*\s*|[^\n.!?]+$")
"""A sentence or a line."""

WORD = r"(?u)\b\w+\b"
"""What BM25 counts; bm25s' own pattern knows no single digit."""


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


class PageIndex:
    """Ranks texts by BM25 with bm25s' defaults (Lucene's variant, k1 1.5, b 0.75); each is cut into words once."""

    def __init__(self) -> None:
        self._bm25s = load_bm25s()
        self._words: dict[str, list[str]] = {}
        self._indexed: tuple[str, ...] = ()
        self._retriever: Any = None

    def scores(self, texts: Sequence[str], question: str) -> np.ndarray:
        """Relevance of each text to the question, float [len(texts)]; 0 where they share no word."""
        asked = self._cut([question])[0]
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
        known = {**self._words, **dict(zip(new, self._cut(new), strict=True))} if new else self._words
        self._words = {text: known[text] for text in texts}
        return list(map(self._words.__getitem__, texts))

    def _cut(self, texts: Sequence[str]) -> list[list[str]]:
        if not texts:
            return []
        cut = self._bm25s.tokenize(
            list(texts), token_pattern=WORD, stopwords="en", return_ids=False, show_progress=False
        )
        return [list(map(str, words)) for words in cut]


def best(scores: np.ndarray, number: int) -> list[int]:
    """Indices of the highest scores above 0, the highest first, the newest first among equals."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], -i))
    return [i for i in order[:number] if scores[i] > 0]


def recalled_text(
    pages: Sequence[str], question: str, *, budget: int, count_tokens: Callable[[Sequence[str]], list[int]]
) -> str:
    """Sentences of some pages, in their order: those that BM25 finds best for the question, as many as fit.

    Args:
        pages: texts in the history's order.
        budget: most tokens of the result.
        count_tokens: tokens of each of several texts.
    """
    sentences = [m.group() for page in pages for m in SENTENCE.finditer(page) if m.group().strip()]
    if not sentences:
        return ""
    scores = PageIndex().scores(sentences, question)
    lengths = count_tokens([sentence.strip() + "\n" for sentence in sentences])
    kept: list[int] = []
    for i in sorted(range(len(sentences)), key=lambda i: (-scores[i], i)):
        if lengths[i] <= budget:
            kept.append(i)
            budget -= lengths[i]
    return "\n".join(sentences[i].strip() for i in sorted(kept))


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
