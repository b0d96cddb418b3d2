"""The english-words asset: words of English in the order of their frequency, names, slang and slips among them."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

import msgpack

LAST_LETTER = "\u024f"
"""Words with characters after it, the last of the Latin letters of Western and Central Europe, are left out."""

WORDS_FILE = "words.txt"
OUTPUTS: Mapping[str, str] = {
    WORDS_FILE: "55da48518733b554eb7f9067dcd38956f78cc4284a59704fee9d1dbd6f77958f",
}
"""SHA-256 of what `prepare` writes from the pinned file."""


def prepare(source: Path, folder: Path) -> None:
    """Write `words.txt`, one word a line, the most frequent first. Figures, whose digits the source has as zeros, and
    what has no letter are left out."""
    _, *bins = msgpack.unpackb(gzip.decompress(source.read_bytes()), raw=False)
    words = [word for group in bins for word in group if _is_word(word)]
    (folder / WORDS_FILE).write_bytes("".join(f"{word}\n" for word in words).encode())


def _is_word(word: str) -> bool:
    letters = any(char.isalpha() for char in word)
    return letters and max(word) <= LAST_LETTER and not any(char.isdigit() or char.isspace() for char in word)
