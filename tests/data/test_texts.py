"""Files of text as they are drawn."""

import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ocrmem.data import lines, markdown
from ocrmem.data.lines import pieces
from ocrmem.data.markdown import plain_pieces, plain_text
from ocrmem.data.texts import read_texts, stream_texts
from ocrmem.errors import DataError


def test_markdown_keeps_its_form_and_loses_its_marks():
    markdown = """\
# A *title*

A paragraph of **bold** text with `code`,
a [link](http://example.org) and <http://example.com>.\\
After a hard break.

1. first
2. second
   - inner
     - innermost

> quoted
> on

```python
def f():
\treturn 1
```

| a | b |
| --- | --- |
| 1 | 2 |

---

![picture](x.png)
"""
    assert (
        plain_text(markdown)
        == """\
A title

A paragraph of bold text with code, a link (http://example.org) and http://example.com.
After a hard break.

1. first
2. second
  • inner
    • innermost

> quoted on

    def f():
    \treturn 1

a | b
1 | 2

————————

[picture]
"""
    )
    assert plain_text("") == ""
    assert plain_text("just text") == "just text\n"


def test_pieces_join_to_the_whole_and_end_with_lines(monkeypatch):
    monkeypatch.setattr(lines, "PIECE", 10)
    monkeypatch.setattr(lines, "MAX_PIECE", 50)
    text = "short\nlines\r\nand " + "x" * 120 + "\nend"
    parts = list(pieces(io.StringIO(text, newline="")))
    assert "".join(parts) == text
    assert parts[0] == "short\nlines\r\n"
    assert max(map(len, parts)) <= 60


BLOCKS = (
    "# Title\n", "A paragraph of *some* text\nover two lines.\n", "- one\n- two\n  - inner\n\n- three\n",
    "1. a\n2. b\n", "```python\n# no title\n\n- no list\n```\n", "~~~\nopen\n", "> quoted\n> - on\n",
    "    code\n\n    more\n", "| a | b |\n| - | - |\n| 1 | 2 |\n", "Setext\n===\n", "[a link][here] and [there]\n",
    "[here]: http://a.example\n", "[there]:\n  http://b.example 'title'\n", "<div>\n*html*\n</div>\n", "---\n",
    "\n", "\r\n", "text\r\nand\rmore\n", "<!--\n\ncomment\n", "-->\n", "***\n", "\\\n", "last line without a break",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(BLOCKS), max_size=14), size=st.integers(1, 60))
def test_markdown_in_pieces_is_the_whole(parts, size):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(markdown, "PIECE", size)
        streamed = list(plain_pieces(io.StringIO(text, newline="")))
    assert "".join(streamed) == plain_text(text)
    assert all(part.endswith("\n") for part in streamed)


def test_a_block_that_is_too_long_is_cut_at_a_line(monkeypatch):
    monkeypatch.setattr(markdown, "PIECE", 100)
    monkeypatch.setattr(markdown, "MAX_BLOCK", 300)
    for text in (
        "".join(f"{n}. item *{n}*\n" for n in range(1, 99)),
        "- a\n  - b *c*\n" * 60,
        "```sh\n" + "# a *comment*\n" * 60 + "```\nafter *it*\n",
        "    code *and*\n" * 60,
        "words of *one* paragraph\n" * 60,
        "x" * 1000,
    ):
        found = "".join(plain_pieces(io.StringIO(text)))
        assert found.split() == plain_text(text).split()
        assert "".join(found.splitlines()) == "".join(plain_text(text).splitlines()) or text.startswith("words")


def test_long_markdown_and_jsonl_need_little_memory(tmp_path):
    notes, chats = tmp_path / "notes.md", tmp_path / "chats.jsonl"
    notes.write_text(
        "# Title\n\nSome *text* with [a link][x].\n\n- one\n- two\n\n" * 60_000 + "[x]: http://x.example\n"
    )
    turns = [{"role": "user", "content": "Hello there. " * 20}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 12_000)
    assert min(notes.stat().st_size, chats.stat().st_size) > 3e6
    tracemalloc.start()
    size = sum(len(part) for _, parts in stream_texts(chats) for part in parts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 12_000 * (len("user: \n") + 260)
    assert peak < 1e6
    ((_, parts),) = stream_texts(notes)
    first = next(iter(parts))
    assert first.startswith("Title\n\nSome text with a link (http://x.example).\n\n• one\n• two\n\nTitle")
    assert len(first) < 2 * markdown.PIECE


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"none.txt' cannot be read: No such file"):
        list(read_texts(tmp_path / "none.txt"))
    broken = tmp_path / "latin.txt"
    broken.write_bytes(b"caf\xe9")
    assert list(read_texts(broken)) == [("latin", "caf\udce9")], "bytes that are no UTF-8 are kept, and drawn as boxes"
