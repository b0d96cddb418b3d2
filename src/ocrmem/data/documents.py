"""Plain documents from JSONL: prose for training and evaluation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ocrmem.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text, as drawn on pages."""

    id: str
    """Stable name, unique in its file."""
    title: str
    """What it is called; may be empty."""
    text: str
    """Paragraphs joined by line breaks."""


def read_documents(path: Path) -> list[Document]:
    """Read a JSONL file of `{"id": …, "title": …, "text": …}` lines; `title` may be missing.

    Raises:
        DataError: the file cannot be read, or a line is not such an object.
    """
    documents = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"documents {str(path)!r} cannot be read: {error}. Expected a UTF-8 JSONL file.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            documents.append(Document(str(value["id"]), str(value.get("title", "")), str(value["text"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: no document ({type(error).__name__}: {error}); expected an object with "
                "`id` and `text`."
            ) from error
    return documents


def document_hash(text: str) -> str:
    """Hex SHA-256 of a document's whole text; what a training manifest lists and an evaluation looks up."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
