"""A store's conversations as JSONL, in the form that training and chat read: one `{"messages": […]}` a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ocrmem.data.conversations import parse_conversation, parse_line
from ocrmem.errors import DataError, StoreError
from ocrmem.files import write_files
from ocrmem.memory.store import MemoryStore
from ocrmem.types import Message


@dataclass(frozen=True)
class Imported:
    """What an import did, conversation by conversation."""

    added: list[str]
    already_there: list[str]
    """Of the same name and messages; nothing was done."""
    renamed: dict[str, str]
    """Name in the file to name in the store, where another conversation had it; they are among `added` too."""


def json_line(messages: Sequence[Message], **about: str) -> str:
    """One conversation as one line of JSON, with what else is known about it."""
    value = {**about, "messages": [message.as_dict() for message in messages]}
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates have no UTF-8 form
        text = json.dumps(value)
    return text + "\n"


def export_jsonl(store: MemoryStore, path: Path, *, name: str | None = None) -> int:
    """Write conversations to a file, whole or not at all.

    Args:
        name: of the only one to export; None: all that have messages.

    Returns:
        how many were written.

    Raises:
        DataError: there is no such conversation.
        StoreError: the file cannot be written.
    """
    chosen = [each for each in store.conversations() if each.num_messages and name in (None, each.name)]
    if name is not None and not chosen:
        raise DataError(unknown(store, name))

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json_line(store.messages(each), name=each.name, created=each.created) for each in chosen)

    try:
        write_files(path.parent, {path.name: write})
    except OSError as error:
        raise StoreError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); nothing was exported."
        ) from error
    return len(chosen)


def import_jsonl(store: MemoryStore, path: Path) -> Imported:
    """Add the conversations of a JSONL file, each in one transaction.

    A conversation of the same name and messages is passed over, so that an import that was cut off can be run again;
    where the name is another conversation's, a number is put behind it. One without a name is called after its line.

    Raises:
        DataError: the file cannot be read, or a line is broken; the lines before it have been imported.
    """
    result = Imported([], [], {})
    for given, messages in _lines(path):
        name, number = given, 1
        while True:
            conversation = store.find(name) or store.create(name)
            with store.writer(conversation, wait=10.0):
                there = store.messages(conversation)
                if not there:
                    store.append(conversation, messages, position=0)
                    result.added.append(name)
                    if name != given:
                        result.renamed[given] = name
                    break
                if there == messages:
                    result.already_there.append(name)
                    break
            number += 1
            name = f"{given} ({number})"
    return result


def unknown(store: MemoryStore, name: str) -> str:
    """What to say of a name that a store does not know."""
    names = ", ".join(repr(each.name) for each in store.conversations()[:8]) or "none"
    return f"store {store.where} has no conversation {name!r} with messages; it has {names}."


def _lines(path: Path) -> Iterator[tuple[str, list[Message]]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                source = f"{path}:{number}"
                value = parse_line(line, source, first=number == 1)
                conversation = parse_conversation(value, source=source, require_reply=False)
                name = value.get("name")
                yield str(name) if name else f"{path.name}:{number}", list(conversation.messages)
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror or error}. Give a JSONL file.") from None
