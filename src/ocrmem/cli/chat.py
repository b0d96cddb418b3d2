"""`ocrmem chat`: talk to an LLM whose long history is a visual memory that grows."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ocrmem.config.growing import GrowingSettings
    from ocrmem.memory.store import MemoryStore
    from ocrmem.session.memory import Memory
    from ocrmem.types import Message


def command(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, as `ocrmem train` writes it.")],
    history: Annotated[
        str | None,
        typer.Argument(help="Earlier conversation: a JSONL file (its first line), a text file, or - for stdin."),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option("--question", "-q", help="Ask this and exit. None: read questions from the terminal."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Keep the conversation here and go on with it: an SQLite file or a PostgreSQL URL. None: in the "
            "terminal a file of the user's own; with --question or piped questions nothing is kept."
        ),
    ] = None,
    no_store: Annotated[bool, typer.Option("--no-store", help="Keep nothing, in the terminal either.")] = False,
    conversation: Annotated[str, typer.Option(help="Its name in the store.")] = "default",
    reencode: Annotated[
        bool, typer.Option("--reencode", help="Draw and encode pages again that another adapter made.")
    ] = False,
    budget: Annotated[
        int | None, typer.Option(help="Most tokens of the memory in a prompt. [default: 1024, or 7 pages if more]")
    ] = None,
    recall: Annotated[int, typer.Option(help="Pages expanded back into text for each question; 0: none.")] = 0,
    ledger: Annotated[bool, typer.Option(help="Keep names and numbers as text beside the pages.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as JSON with its token counts.")] = False,
) -> None:
    """Answer questions on a conversation, its older part read through the visual memory.

    In the terminal the conversation is kept, message by message, and the next call goes on with it; /help lists what
    can be typed besides questions. What became memory, and at which ratio, is said on stderr.
    """
    from ocrmem.cli.chat_terminal import Terminal, default_store
    from ocrmem.errors import ConfigError
    from ocrmem.session.memory import Memory

    if history == "-" and question is None:
        raise ConfigError("the history comes from stdin, so questions cannot: give one with --question.")
    if store is not None and no_store:
        raise ConfigError("--store and --no-store were both given; give one.")
    messages = [] if history is None else read_history(history)
    in_terminal = question is None and sys.stdin.isatty()
    if store is None and in_terminal and not no_store:
        if importlib.util.find_spec("sqlalchemy") is None:
            print("this conversation is not kept; pip install 'ocrmem[store]' to have it kept.", file=sys.stderr)
        else:
            store = default_store()
    settings = growing_settings(budget, recall, ledger)
    with contextlib.ExitStack() as stack:
        opened = None if store is None else stack.enter_context(open_store(store))
        memory = stack.enter_context(
            Memory.from_adapter(
                adapter, device=device, settings=settings, store=opened, conversation=conversation, reencode=reencode
            )
        )
        begin(memory, messages, conversation)
        terminal = Terminal(
            memory,
            name=conversation,
            where=None if opened is None else opened.where,
            answer=lambda asked: answer(memory, asked, max_new_tokens, temperature, as_json),
        )
        if question is not None:
            terminal.answer(question)
        else:
            terminal.run(interactive=in_terminal)


def open_store(where: str) -> MemoryStore:
    """The store at a path or URL, made if need be."""
    from ocrmem.memory.store import MemoryStore

    return MemoryStore(where)


def growing_settings(budget: int | None, recall: int, ledger: bool) -> GrowingSettings:
    """The budget's settings from the command line."""
    from ocrmem.config.growing import GrowingSettings

    settings = GrowingSettings(budget_tokens=budget, recall=recall)
    return settings if ledger else dataclasses.replace(settings, ledger_share=0.0)


def begin(memory: Memory, history: list[Message], name: str) -> None:
    """Let the conversation begin with a history, unless it does already.

    Raises:
        DataError: the conversation has other messages.
    """
    from ocrmem.errors import DataError

    there = memory.messages
    if not there:
        memory.extend(history)
    elif there[: len(history)] != history:
        raise DataError(
            f"conversation {name!r} has {len(there)} messages already, and does not begin with the history given. Give "
            "another name with --conversation, or leave the history out to go on."
        )


def read_history(source: str) -> list[Message]:
    """The messages of a conversation file; a text without JSON is one user message.

    Raises:
        DataError: the file cannot be read, or its first line is JSON but no conversation.
    """
    from ocrmem.data.conversations import parse_history
    from ocrmem.errors import DataError

    if source == "-":
        return parse_history(sys.stdin.read(), source="stdin")
    try:
        text = Path(source).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(
            f"history {source!r} cannot be read: {error.strerror or error}. Give a JSONL or text file, or - for stdin."
        ) from None
    return parse_history(text, source=source)


def answer(memory: Memory, question: str | None, max_new_tokens: int, temperature: float, as_json: bool) -> None:
    """One reply, streamed to stdout unless JSON is wanted; None answers the conversation's last message."""
    prompt = memory.prompt(question)
    pieces = memory.reply(question, stream=True, max_new_tokens=max_new_tokens, temperature=temperature)
    if as_json:
        reply = "".join(pieces).strip()
        print(json.dumps({"answer": reply, **prompt.as_json()}), flush=True)
        return
    print(prompt.summary(), file=sys.stderr)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
