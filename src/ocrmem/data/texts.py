"""Files of text as they are drawn: plain text, Markdown, JSONL conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from markdown_it import MarkdownIt
from markdown_it.token import Token

from ocrmem.data.conversations import read_conversations
from ocrmem.errors import DataError
from ocrmem.memory.history import history_text

MARKDOWN_SUFFIXES = (".md", ".markdown")
PIECE = 1 << 20
"""Characters read at once of a text file."""
MAX_PIECE = 16 << 20
"""Characters after which a text without a line break is cut."""


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of what is drawn: one for a text or Markdown file, one for each conversation of a JSONL file.

    Raises:
        DataError: the file cannot be read.
    """
    if path.suffix == ".jsonl":
        for number, conversation in enumerate(read_conversations(path).conversations, start=1):
            yield f"{path.stem}-{number:04d}", history_text(conversation.messages)
        return
    text = "".join(pieces(path))
    yield path.stem, plain_text(text) if path.suffix.lower() in MARKDOWN_SUFFIXES else text


def pieces(source: Path | IO[str]) -> Iterator[str]:
    """The text of a file or stream, a million characters and the rest of a line at a time.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(source, Path):
        try:
            with source.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                yield from pieces(file)
        except OSError as error:
            raise DataError(
                f"{str(source)!r} cannot be read: {error.strerror or error}. Give a text file, or - for stdin."
            ) from None
        return
    while piece := source.read(PIECE):
        while not piece.endswith("\n") and len(piece) < MAX_PIECE and (more := source.readline(PIECE)):
            piece += more
        yield piece


def plain_text(markdown: str) -> str:
    """Markdown as text to be drawn: headings, lists, quotes and code keep their form, marks of emphasis go.

    Code blocks stay as they are, indented by four spaces; an item of a list begins with • or its number; a link is its
    text and its address in brackets; a table's cells are divided by bars.
    """
    parser = MarkdownIt("commonmark").enable("table")
    lines: list[str] = []
    lists: list[int | None] = []
    bullet = ""
    cells: list[str] | None = None
    quotes = 0
    for token in parser.parse(markdown):
        indent = "  " * max(0, len(lists) - 1) + "> " * quotes
        if token.type in ("bullet_list_open", "ordered_list_open"):
            lists.append(int(token.attrs.get("start", 1)) if token.type == "ordered_list_open" else None)
        elif token.type in ("bullet_list_close", "ordered_list_close"):
            lists.pop()
            if not lists:
                lines.append("")
        elif token.type == "list_item_open":
            number = lists[-1]
            bullet = "• " if number is None else f"{number}. "
            lists[-1] = None if number is None else number + 1
        elif token.type in ("blockquote_open", "blockquote_close"):
            quotes += 1 if token.type == "blockquote_open" else -1
        elif token.type in ("fence", "code_block"):
            lines += [f"{indent}    {line}" for line in token.content.rstrip("\n").split("\n")] + [""]
        elif token.type == "hr":
            lines += ["—" * 8, ""]
        elif token.type == "html_block":
            lines += [token.content.rstrip("\n"), ""]
        elif token.type == "tr_open":
            cells = []
        elif token.type == "tr_close":
            lines.append(indent + " | ".join(cells or []))
            cells = None
        elif token.type == "table_close":
            lines.append("")
        elif token.type == "inline":
            text = _inline(token)
            if cells is not None:
                cells.append(text)
                continue
            hanging = " " * len(bullet if bullet else "  " if lists else "")
            lines += [indent + (hanging if number else bullet or hanging) + line
                      for number, line in enumerate(text.split("\n"))]  # fmt: skip
            bullet = ""
        elif token.type in ("paragraph_close", "heading_close") and not lists:
            lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n" if lines else ""


def _inline(token: Token) -> str:
    """The text of a paragraph without its marks."""
    parts: list[str] = []
    address = ""
    for child in token.children or []:
        if child.type in ("text", "code_inline", "html_inline"):
            parts.append(child.content)
        elif child.type == "softbreak":
            parts.append(" ")
        elif child.type == "hardbreak":
            parts.append("\n")
        elif child.type == "image":
            parts.append(f"[{child.content}]")
        elif child.type == "link_open":
            address = str(child.attrs.get("href", ""))
        elif child.type == "link_close" and address and not "".join(parts).endswith(address):
            parts.append(f" ({address})")
    return "".join(parts)
