"""The chitchat asset: from the data set's one JSON file to conversations split by person."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

MIN_TURNS = 6
"""Shorter conversations hold too little to remember."""
HUB_CONVERSATIONS = 100
"""A person with at least this many conversations (there are 5) talks with so many others that holding that
person out would hold out most of the data; such people are on both sides of the split."""
HELDOUT_PERCENT = 12
"""Share of the other people, by hash of their id, whose conversations are held out."""

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
OUTPUTS: Mapping[str, str] = {
    TRAIN_FILE: "e549490d100ce81085e80368666a3b47ac212d5de20ef5ca2254881c75df0497",
    HELDOUT_FILE: "f4ced658e1207e53f9b1862c93b36519948f054643569dd75b0098adbacb2842",
}
"""SHA-256 of what `prepare` writes from the pinned file."""

Turns = list[tuple[str, str]]
"""(person, text) in order; neighbours are of different people."""


def prepare(source: Path, folder: Path) -> None:
    """Write `train.jsonl` and `heldout.jsonl`.

    Kept are conversations of two people and at least 6 turns. The first speaker is the user, the other the
    assistant. A conversation with a held-out person goes to `heldout.jsonl`, where `strict` tells that none
    of its people but the hub ones occurs in `train.jsonl`.
    """
    conversations = _two_person_conversations(json.loads(source.read_text(encoding="utf-8")))
    people = {id_: {person for person, _ in turns} for id_, turns in conversations.items()}
    counts = Counter(person for pair in people.values() for person in pair)
    hub = {person for person, count in counts.items() if count >= HUB_CONVERSATIONS}
    heldout = {person for person in counts.keys() - hub if _falls_out(person)}
    trained = {person for pair in people.values() if not pair & heldout for person in pair}
    lines: dict[str, list[str]] = {TRAIN_FILE: [], HELDOUT_FILE: []}
    for id_, turns in conversations.items():
        record: dict[str, object] = {"id": id_, "messages": _messages(turns)}
        if people[id_] & heldout:
            record["strict"] = not (people[id_] - hub) & trained
            lines[HELDOUT_FILE].append(json.dumps(record, ensure_ascii=False))
        else:
            lines[TRAIN_FILE].append(json.dumps(record, ensure_ascii=False))
    for name, content in lines.items():
        (folder / name).write_bytes("".join(f"{line}\n" for line in content).encode())


def _two_person_conversations(raw: Mapping[str, Mapping]) -> dict[str, Turns]:
    kept = {}
    for id_, conversation in raw.items():
        grouped: list[tuple[str, list[str]]] = []
        for message in (message for group in conversation["messages"] for message in group):
            if grouped and grouped[-1][0] == message["sender"]:
                grouped[-1][1].append(message["text"])
            else:
                grouped.append((message["sender"], [message["text"]]))
        if len(grouped) >= MIN_TURNS and len({person for person, _ in grouped}) == 2:
            kept[id_] = [(person, "\n".join(texts)) for person, texts in grouped]
    return kept


def _falls_out(person: str) -> bool:
    return int(hashlib.sha256(person.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT


def _messages(turns: Turns) -> list[dict[str, str]]:
    first = turns[0][0]
    return [{"role": "user" if person == first else "assistant", "content": text} for person, text in turns]
