"""The text that is drawn: who said what, oldest first."""

from __future__ import annotations

from collections.abc import Iterable

from ocrmem.types import Message


def turn_text(message: Message) -> str:
    """One turn as it is drawn: `user: hello` and a line break."""
    return f"{message.role}: {message.content}\n"


def history_text(messages: Iterable[Message]) -> str:
    """The text of a history, one turn after the other.

    It is append-only: the text of a longer history starts with that of a shorter one, so that pages which are
    full never change when turns are added.
    """
    return "".join(map(turn_text, messages))
