"""Markdown as text to be drawn, a few blocks at a time.

```
text ─▶ pieces of whole lines ─▶ tokens of all blocks but the last ─▶ lines of plain text
                  ▲ the last block, which may go on, waits for more ─┘
```
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from ocrmem.data.lines import pieces

PIECE = 1 << 18
"""Characters parsed at once, at least: their tokens need about a hundred times as many bytes."""
MAX_BLOCK = 1 << 21
"""Characters of one block (a list, a quotation, a table, code) after which it is cut at a line; a list at an item."""
_DEFINITION = "]:"
"""What is in every definition of a link, which holds for the whole text, wherever it stands."""


def plain_text(markdown: str) -> str:
    """Markdown as text to be drawn: headings, lists, quotes and code keep their form, marks of emphasis go.

    Code blocks stay as they are, indented by four spaces; an item of a list begins with • or its number; a link is its
    text and its address in brackets; a table's cells are divided by bars.
    """
    return "".join(_plain(lambda: iter((markdown,))))


def plain_pieces(source: Path | IO[str]) -> Iterator[str]:
    """`plain_text` of a file or stream, in memory bounded by a block of `MAX_BLOCK` and the definitions of links.

    A text with definitions of links is parsed twice; a stream is written to a temporary file first.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(source, Path):
        yield from _plain(lambda: pieces(source, size=PIECE))
        return
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="surrogatepass", newline="") as file:
        for piece in pieces(source, size=PIECE):
            file.write(piece)

        def again() -> Iterator[str]:
            file.seek(0)
            return pieces(file, size=PIECE)

        yield from _plain(again)


def _plain(read: Any) -> Iterator[str]:
    """Plain text of the pieces that each call of `read` gives; every part ends with a line."""
    links: dict[str, Any] = {}
    if any(_DEFINITION in piece for piece in read()):
        parser = _parser().disable("inline")
        for _ in _blocks(parser, read(), links):
            pass
    held = ""
    for tokens in _blocks(_parser(), read(), links):
        text = held + "".join(f"{line}\n" for line in _lines(tokens))
        body = text.rstrip("\n")
        held = text[len(body) + 1 :] if body else text
        if body:
            yield body + "\n"


def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table")


def _blocks(parser: MarkdownIt, read: Iterable[str], links: dict[str, Any]) -> Iterator[list[Token]]:
    """The tokens of whole blocks, some at a time. Definitions of links are added to `links`."""
    text = ""
    for piece in read:
        text += piece.replace("\r\n", "\n").replace("\r", "\n")
        if len(text) < PIECE:
            continue
        tokens = parser.parse(text, links)
        links.pop("duplicate_refs", None)
        starts = [number for number, token in enumerate(tokens) if token.level == 0 and token.nesting >= 0]
        last = starts[-1] if starts else 0
        again = ""
        if len(starts) > 1 and tokens[last].map:
            line = tokens[last].map[0]  # type: ignore[index]
        elif len(text) < MAX_BLOCK:
            continue
        else:
            last, line, again = _cut(tokens, text)
        yield tokens[:last]
        lines = text.split("\n", line)
        text = again + (lines[line] if len(lines) > line else "")
    yield parser.parse(text, links)


def _cut(tokens: list[Token], text: str) -> tuple[int, int, str]:
    """Where a block that is too long ends: the token and the line that go on, and what is put before that line."""
    items = [n for n, token in enumerate(tokens) if token.type == "list_item_open" and token.level == 1]
    if len(items) > 1 and tokens[items[-1]].map:
        return items[-1], tokens[items[-1]].map[0], ""  # type: ignore[index]
    again = ""
    if tokens and tokens[-1].type == "fence":
        last_line = text.rstrip("\n").rpartition("\n")[2].strip()
        if not (last_line.startswith(tokens[-1].markup) and not last_line.strip(tokens[-1].markup[0])):
            again = f"{tokens[-1].markup}\n"  # it is not closed, and goes on
    return len(tokens), text.count("\n") + (not text.endswith("\n")), again


def _lines(tokens: list[Token]) -> list[str]:
    """The lines of whole blocks."""
    lines: list[str] = []
    lists: list[int | None] = []
    bullet = ""
    cells: list[str] | None = None
    quotes = 0
    for token in tokens:
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
    return lines


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
