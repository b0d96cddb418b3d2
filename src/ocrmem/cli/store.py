"""`ocrmem store`: what is kept, in and out, and gone for good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ocrmem.memory.store import MemoryStore, StoredConversation

app = typer.Typer(no_args_is_help=True, help="List, export, import and delete the conversations of a store.")
Where = Annotated[
    str | None, typer.Option("--store", help="An SQLite file or a PostgreSQL URL. None: the one of `ocrmem chat`.")
]


@app.command("list")
def list_conversations(
    store: Where = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List conversations with their messages and pages."""
    with opened(store, read_only=True) as found:
        rows = [
            {"name": each.name, "created": each.created, "messages": each.num_messages, "pages": each.num_pages}
            for each in found.conversations()
        ]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['created'][:16]}  {row['messages']:6d} messages  {row['pages']:4d} pages  {row['name']}")


@app.command("export")
def export_file(
    file: Annotated[Path, typer.Argument(help="JSONL file to write; one that exists is replaced.")],
    store: Where = None,
    conversation: Annotated[str | None, typer.Option(help="Only the one of this name.")] = None,
) -> None:
    """Write conversations as JSONL, one a line."""
    from ocrmem.session.jsonl import export_jsonl

    with opened(store, read_only=True) as found:
        print(f"{export_jsonl(found, file, name=conversation)} conversations in {file}")


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="JSONL file of conversations.")],
    store: Where = None,
) -> None:
    """Add the conversations of a JSONL file; those that are there already are passed over."""
    from ocrmem.session.jsonl import import_jsonl

    with opened(store) as found:
        done = import_jsonl(found, file)
    print(f"{len(done.added)} conversations added, {len(done.already_there)} already there")
    for given, name in done.renamed.items():
        print(f"{given!r} is another conversation's name; it was added as {name!r}")


@app.command("delete")
def delete(
    conversation: Annotated[str, typer.Argument(help="Its name.")],
    store: Where = None,
) -> None:
    """Delete a conversation for good: its text, pages and features are overwritten."""
    with opened(store) as found:
        chosen = named(found, conversation)
        with found.writer(chosen):
            found.delete(chosen)
    print(f"deleted {conversation!r} ({chosen.num_messages} messages)")


@app.command("vacuum")
def vacuum(store: Where = None) -> None:
    """Give the space of what was deleted back to the disk."""
    with opened(store) as found:
        found.vacuum()
        print(f"{found.where} is vacuumed")


def opened(where: str | None, *, read_only: bool = False) -> MemoryStore:
    """The store at a path or URL; one that does not exist is not made."""
    from ocrmem.cli.chat_terminal import default_store
    from ocrmem.errors import StoreError
    from ocrmem.memory.store import MemoryStore

    where = where or default_store()
    if "://" not in where and not Path(where).exists() and read_only:
        raise StoreError(f"there is no store {where!r}. Give the path of one with --store.")
    return MemoryStore(where, read_only=read_only)


def named(store: MemoryStore, name: str) -> StoredConversation:
    """The conversation of that name.

    Raises:
        DataError: there is none.
    """
    from ocrmem.errors import DataError
    from ocrmem.session.jsonl import unknown

    found = store.find(name)
    if found is None:
        raise DataError(unknown(store, name))
    return found
