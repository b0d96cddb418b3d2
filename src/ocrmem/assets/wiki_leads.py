"""The wiki-leads asset: lead sections of encyclopaedia articles to documents, split by title."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

MIN_CHARS = 200
"""A shorter lead says too little to remember."""
HELDOUT_PERCENT = 10
"""Share of the articles, by hash of their title, that are held out."""

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
OUTPUTS: Mapping[str, str] = {
    TRAIN_FILE: "8ee0ad1e76ea4980fcc17a53025377d3e10ad4203fb1b57b01ea4c008ce46677",
    HELDOUT_FILE: "4199fb6a585c3ce82e2a055c0115b9c2fa572e241466eefbb51fd7958b8d2a89",
}
"""SHA-256 of what `prepare` writes from the pinned file."""

_SPACES = re.compile(r"[ \t\xa0]+")


def prepare(source: Path, folder: Path) -> None:
    """Write `train.jsonl` and `heldout.jsonl`, one `{"id", "title", "text"}` a line, in the order of the source."""
    articles = json.loads(source.read_text(encoding="utf-8"))
    values = articles.values() if isinstance(articles, dict) else articles
    lines: dict[str, list[str]] = {TRAIN_FILE: [], HELDOUT_FILE: []}
    seen: set[str] = set()
    for article in values:
        title, text = article["title"].strip(), clean(article["extract"])
        if len(text) < MIN_CHARS or title in seen:
            continue
        seen.add(title)
        record = {"id": f"wiki-leads/{title}", "title": title, "text": text}
        lines[HELDOUT_FILE if is_held_out(title) else TRAIN_FILE].append(json.dumps(record, ensure_ascii=False))
    for name, content in lines.items():
        (folder / name).write_bytes("".join(f"{line}\n" for line in content).encode())


def clean(text: str) -> str:
    """Paragraphs joined by one line break, words by one space."""
    paragraphs = (_SPACES.sub(" ", paragraph).strip() for paragraph in text.split("\n"))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def is_held_out(title: str) -> bool:
    """Whether an article is for evaluation only."""
    return int(hashlib.sha256(title.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT
