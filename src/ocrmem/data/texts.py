"""Files of text as they are drawn: plain text, Markdown, JSONL conversations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ocrmem.data.conversations import iter_conversations
from ocrmem.data.lines import pieces
from ocrmem.data.markdown import plain_pieces
from ocrmem.memory.history import history_text

MARKDOWN_SUFFIXES = (".md", ".markdown")


def stream_texts(path: Path) -> Iterator[tuple[str, Iterable[str]]]:
    """(name, text in parts) of what is drawn: one for a text or Markdown file, one for each conversation of a JSONL
    file, which need not have a reply. Of a JSONL file, one conversation at a time is in memory.

    Raises:
        DataError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        for number, conversation in enumerate(iter_conversations(path, require_reply=False), start=1):
            yield f"{path.stem}-{number:04d}", (history_text(conversation.messages),)
    else:
        yield path.stem, plain_pieces(path) if suffix in MARKDOWN_SUFFIXES else pieces(path)


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """`stream_texts`, each text as a whole."""
    for name, parts in stream_texts(path):
        yield name, "".join(parts)
