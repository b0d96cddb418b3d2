"""Conversations from JSONL: one JSON object a line, every mistake named by line and message."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ocrmem.config.loader import nearest
from ocrmem.errors import DataError
from ocrmem.types import ROLES, Conversation, Message, Role

OTHER_NAMES: dict[str, Role] = {
    "ai": "assistant",
    "bot": "assistant",
    "developer": "system",
    "function": "tool",
    "gpt": "assistant",
    "human": "user",
    "model": "assistant",
}
"""What other formats call our roles; named as the nearest role in the error, never taken silently."""

MESSAGE_KEYS = ("role", "content", "name", "tool_call_id")
"""Keys that a message may have. The last two are allowed because exports carry them; they are not used."""


@dataclass(frozen=True)
class ConversationFile:
    """What a JSONL file held."""

    conversations: list[Conversation]
    """The conversations in file order; the source of each is `file:line`."""
    bad_lines: list[tuple[int, str]]
    """Line number, from 1, and reason of every line that was skipped; empty unless skipping was asked for."""


def read_conversations(
    path: Path, *, skip_bad_lines: bool = False, max_conversations: int | None = None
) -> ConversationFile:
    """Read a JSONL file of conversations. Blank lines are passed over.

    Args:
        path: UTF-8, one object a line: `{"messages": [{"role": …, "content": …}, …]}`. Other keys of the
            object are ignored.
        skip_bad_lines: count broken lines and go on, instead of stopping at the first.
        max_conversations: stop after this many; None: read all.

    Raises:
        DataError: the file cannot be read, a line is broken (and named), or no line holds a conversation.
    """
    bad_lines: list[tuple[int, str]] = []
    found = iter_conversations(path, bad_lines=bad_lines if skip_bad_lines else None)
    return ConversationFile(list(itertools.islice(found, max_conversations)), bad_lines)


def iter_conversations(
    path: Path, *, bad_lines: list[tuple[int, str]] | None = None, require_reply: bool = True
) -> Iterator[Conversation]:
    """`read_conversations`, one at a time.

    Args:
        path: UTF-8, one object a line.
        bad_lines: takes number and reason of each broken line, which is then skipped; None: the first is an error.
        require_reply: whether a conversation without an assistant message is broken.

    Raises:
        DataError: as `read_conversations`; that no line holds a conversation, after the last one.
    """
    path = Path(path)
    any_found = False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                source = f"{path}:{number}"
                try:
                    value = parse_line(line, source, first=number == 1)
                    conversation = parse_conversation(value, source=source, require_reply=require_reply)
                except DataError as error:
                    if bad_lines is None:
                        raise
                    bad_lines.append((number, str(error).removeprefix(f"{source}: ")))
                    continue
                any_found = True
                yield conversation
    except OSError as error:
        raise DataError(
            f"conversation file {str(path)!r} cannot be read: {error.strerror or error}. Give the path of a "
            'JSONL file with one {"messages": […]} object a line.'
        ) from None
    if not any_found:
        found = f"{len(bad_lines)} broken lines and nothing else" if bad_lines else "no lines"
        first = f" The first is line {bad_lines[0][0]}: {bad_lines[0][1]}" if bad_lines else ""
        raise DataError(
            f'conversation file {str(path)!r} has {found}; expected one {{"messages": […]}} object a line.{first}'
        )


def parse_line(line: bytes, source: str, *, first: bool) -> Any:
    """The JSON value of one line of a file; the first may begin with a byte order mark.

    Raises:
        DataError: it is no UTF-8, or no JSON.
    """
    line = line.rstrip(b"\r\n")
    if first:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: byte {error.start + 1} of the line, 0x{line[error.start]:02X}, is not UTF-8. Save "
            "the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}: broken JSON at column {error.colno}: {error.msg}. Expected one whole JSON object on "
            "the line; mend it, or skip such lines with --skip-bad-lines (skip_bad_lines=True)."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested too deep
        raise DataError(f"{source}: the JSON cannot be read: {error}. Mend or remove the line.") from None


def parse_conversation(value: Any, *, source: str, require_reply: bool = True) -> Conversation:
    """One conversation from a parsed JSON value.

    Lone surrogates, NUL and control characters are content like any other: pages draw them as they are.

    Args:
        value: `{"messages": […]}`.
        source: where it came from, for error messages (`file.jsonl:12`).
        require_reply: whether a conversation without an assistant message is refused, as training must.

    Raises:
        DataError: the value is no conversation; the message says which part, what it is and what was
            expected.
    """
    if not isinstance(value, Mapping):
        raise DataError(f'{source}: expected an object {{"messages": […]}}, got {_kind(value)}.')
    if "messages" not in value:
        keys = ", ".join(repr(str(key)) for key in list(value)[:8]) or "no keys"
        raise DataError(f'{source}: the object has no "messages"; its keys are {keys}. Put the turns into "messages".')
    messages = value["messages"]
    if not isinstance(messages, list):
        raise DataError(f'{source}: "messages" is {_kind(messages)}, expected a list of messages.')
    if not messages:
        raise DataError(f'{source}: the conversation is empty: "messages" is []. Give at least one message.')
    parsed = tuple(_message(message, where=f"{source}: message {i}") for i, message in enumerate(messages))
    if require_reply and all(message.role != "assistant" for message in parsed):
        raise DataError(
            f"{source}: none of the {len(parsed)} messages is by the assistant, so there is no reply to "
            "learn from. Give at least one message with role 'assistant', or remove the line."
        )
    return Conversation(parsed, source)


def parse_history(text: str, *, source: str) -> list[Message]:
    """Messages of a history in one of two forms.

    A text that begins with a JSON object (alone, or on its first line) is that conversation; any other text
    is one user message. Empty text gives no messages.

    Raises:
        DataError: the text begins like a JSON object, but is broken or no conversation.
    """
    stripped = text.strip().removeprefix("\ufeff")
    if not stripped:
        return []
    if not stripped.startswith("{"):
        return [Message("user", text)]
    for candidate in (stripped, stripped.partition("\n")[0]):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        return list(parse_conversation(value, source=source, require_reply=False).messages)
    if stripped[1:].lstrip().startswith('"'):
        raise DataError(
            f"{source}: the text begins like a JSON object but is broken. Give one whole "
            '{"messages": […]} object, or plain text.'
        )
    return [Message("user", text)]


def _message(value: Any, *, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f'{where}: expected an object {{"role": …, "content": …}}, got {_kind(value)}.')
    if "role" not in value:
        raise DataError(f"{where}: no role. Give one of {', '.join(ROLES)}.")
    role = value["role"]
    if role not in get_args(Role):
        other = OTHER_NAMES.get(role.lower()) if isinstance(role, str) else None
        hint = f"Did you mean {other!r}?" if other else nearest(str(role), ROLES)
        raise DataError(f"{where}: unknown role {role!r}. {hint}")
    for key in value:
        if key not in MESSAGE_KEYS:
            raise DataError(
                f"{where}: unknown key {key!r}. {nearest(str(key), MESSAGE_KEYS)} Tool calls and media "
                "cannot become memory; write them out in the content, or remove the key."
            )
    if "content" not in value:
        raise DataError(f"{where}: no content. Give a string or a list of text parts.")
    return Message(role, _content(value["content"], where=where))


def _content(value: Any, *, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: content is {_kind(value)}, expected a string or a list of text parts.")
    for i, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = f"of type {part.get('type')!r}" if isinstance(part, Mapping) else _kind(part)
            raise DataError(f'{where}: content part {i} is {kind}, expected {{"type": "text", "text": "…"}}.')
    return "".join(part["text"] for part in value)


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words, short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value!r}"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    return "a list" if isinstance(value, list) else "an object"
