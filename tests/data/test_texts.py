"""Files of text as they are drawn."""

import io

import pytest

from ocrmem.data import texts
from ocrmem.data.texts import pieces, plain_text, read_texts
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
    monkeypatch.setattr(texts, "PIECE", 10)
    monkeypatch.setattr(texts, "MAX_PIECE", 50)
    text = "short\nlines\r\nand " + "x" * 120 + "\nend"
    parts = list(pieces(io.StringIO(text, newline="")))
    assert "".join(parts) == text
    assert parts[0] == "short\nlines\r\n"
    assert max(map(len, parts)) <= 60


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"none.txt' cannot be read: No such file"):
        list(read_texts(tmp_path / "none.txt"))
    broken = tmp_path / "latin.txt"
    broken.write_bytes(b"caf\xe9")
    assert list(read_texts(broken)) == [("latin", "caf\udce9")], "bytes that are no UTF-8 are kept, and drawn as boxes"
