"""The long-prose asset: State of the Union addresses and Moby Dick to documents, split by year and by chapter."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ocrmem.assets.wiki_leads import clean

HELDOUT_PERCENT = 10
"""Share of the chapters, by hash of their title, that are held out."""
HELDOUT_YEARS = 10
"""Addresses of every so many years are held out."""

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
OUTPUTS: Mapping[str, str] = {
    TRAIN_FILE: "f440e3c55fc6176ab53928dfc98af72deda2c5519c02f043723ee779619d19e2",
    HELDOUT_FILE: "66da7bf1bce352298dfcf4c739ebc74211f18030f79b2ac414a0c67a74a32e77",
}
"""SHA-256 of what `prepare` writes from the pinned file."""

_ADDRESS = re.compile(r"package/sotu/data/\w+\.json")
_CHAPTER = re.compile(r"package/moby-dick/data/chapter_\d+\.json")
_PARAGRAPH_END = re.compile(r"\n\s*\n")


def prepare(source: Path, folder: Path) -> None:
    """Write `train.jsonl` and `heldout.jsonl`, one `{"id", "title", "text"}` a line, in the order of the ids."""
    lines: dict[str, list[str]] = {TRAIN_FILE: [], HELDOUT_FILE: []}
    for record, held_out in sorted(_documents(source), key=lambda found: found[0]["id"]):
        lines[HELDOUT_FILE if held_out else TRAIN_FILE].append(json.dumps(record, ensure_ascii=False))
    for name, content in lines.items():
        (folder / name).write_bytes("".join(f"{line}\n" for line in content).encode())


def _documents(source: Path) -> Iterator[tuple[dict[str, str], bool]]:
    with tarfile.open(source) as archive:
        for member in archive:
            is_address = _ADDRESS.fullmatch(member.name)
            if not is_address and not _CHAPTER.fullmatch(member.name):
                continue
            file = archive.extractfile(member)
            assert file is not None, "these members are plain files"
            found = json.load(file)
            text = "\n".join(clean(part.replace("\n", " ")) for part in _PARAGRAPH_END.split(found["text"].strip()))
            if is_address:
                title = f"State of the Union, {found['year']}, {found['name']}"
                yield (
                    {"id": f"sotu/{Path(member.name).stem}", "title": title, "text": text},
                    is_year_held_out(int(found["year"])),
                )
            else:
                title = f"Moby Dick, {found['title']}"
                number = int(found["chapter"])
                yield {"id": f"moby-dick/{number:03}", "title": title, "text": text}, is_chapter_held_out(title)


def is_year_held_out(year: int) -> bool:
    """Whether a year's addresses are for evaluation only."""
    return year % HELDOUT_YEARS == 0


def is_chapter_held_out(title: str) -> bool:
    """Whether a chapter is for evaluation only."""
    return int(hashlib.sha256(title.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT
