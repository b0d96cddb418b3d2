"""The terminal of `ocrmem chat`: questions, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import typer

from ocrmem.errors import OcrmemError
from ocrmem.files import write_text

if TYPE_CHECKING:
    from ocrmem.session.memory import Memory

WIDTH = 40
"""Characters of the bar that stands for the whole budget."""
HELP = """\
/pages [FOLDER]   the memory's pages: a list, and PNG files in a folder
/tokens           what the next prompt is made of
/retry            answer the last message, if it has no answer
/forget [N]       forget the last N messages, or the whole conversation: text, pages and features
/export FILE      write the conversation as one line of JSONL
/help             this list
/quit             leave (Ctrl-D too); Ctrl-C stops an answer"""


def default_store() -> str:
    """The file where conversations of the terminal are kept."""
    return str(Path(platformdirs.user_data_dir("ocrmem")) / "memory.sqlite")


class Terminal:
    """Reads questions and commands until the end of the input.

    Args:
        memory: the conversation.
        name: its name.
        where: the store's name; None: nothing is kept.
        answer: prints the reply to a question; None: to the last message.
    """

    def __init__(self, memory: Memory, *, name: str, where: str | None, answer: Callable[[str | None], None]) -> None:
        self.memory, self.name, self.where, self.answer = memory, name, where, answer
        self.commands = {
            "/pages": self.pages,
            "/tokens": self.tokens,
            "/retry": self.retry,
            "/forget": self.forget,
            "/export": self.export,
            "/help": lambda _: print(HELP),
        }

    def run(self, *, interactive: bool) -> None:
        """Until /quit or the end of the input; errors of one line do not end the conversation."""
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - lines can be edited, and fetched again
            self._greet()
        while (line := self._next_line(interactive)) is not None:
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            try:
                if command in self.commands:
                    self.commands[command](rest.strip())
                elif command.startswith("/") and interactive:
                    print(f"{command} is no command.\n{HELP}", file=sys.stderr)
                else:
                    self.answer(line)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print(self._stopped(line), file=sys.stderr)
            except OcrmemError as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)

    def pages(self, folder: str) -> None:
        """`/pages`."""
        pages = self.memory.pages
        if not pages:
            print("no pages: all of the conversation is text.")
            return
        for number, page in enumerate(pages, start=1):
            first = " ".join(page.text[:60].split())
            level = "" if page.level == 0 else f", level {page.level} (denser)"
            print(f"{number:3d}  {page.num_tokens:4d} tokens  {len(page.text):5d} characters{level}  {first} …")
        target = Path(folder or tempfile.mkdtemp(prefix="ocrmem-pages-"))
        self.memory.show(target)
        print(f"drawn in {target}")
        if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
            typer.launch(str(target))

    def tokens(self, _: str) -> None:
        """`/tokens`."""
        if not self.memory.messages:
            print("nothing was said yet.")
            return
        tokens = self.memory.tokens
        rows = [(f"pages, level {level}", number) for level, number in enumerate(tokens.pages) if number or not level]
        rows += [("ledger", tokens.ledger), ("recalled text", tokens.recalled), ("separators", tokens.separators)]
        for label, number in rows:
            bar = "█" * -(-number * WIDTH // tokens.budget)
            print(f"{label:16s} {number:6,d}  {bar}")
        print(f"{'memory':16s} {tokens.memory:6,d}  of {tokens.budget:,} in the budget")
        print(f"{'text':16s} {tokens.text:6,d}  recent turns and system text")
        if tokens.compression_ratio is not None:
            print(f"the memory replaces {tokens.replaced:,} text tokens, ratio {tokens.compression_ratio:.2f}")
        if tokens.left_out:
            print(f"{tokens.left_out:,} text tokens of the oldest turns are on no page any more")

    def retry(self, _: str) -> None:
        """`/retry`."""
        self.answer(None)

    def forget(self, number: str) -> None:
        """`/forget`."""
        messages = len(self.memory.messages)
        if number and not (number.isdecimal() and 0 < int(number) <= messages):
            print(f"/forget {number}: there are {messages} messages; give a number from 1 to that, or none.")
            return
        what = f"the last {number} messages" if number else f"all {messages} messages"
        if input(f"Forget {what} for good? Type yes: ").strip().lower() != "yes":
            print("nothing was forgotten.")
            return
        self.memory.forget(keep=messages - int(number) if number else 0)
        print(f"forgotten; {len(self.memory.messages)} messages are left.")

    def export(self, file: str) -> None:
        """`/export`."""
        from ocrmem.session.jsonl import json_line

        if not file:
            print("/export: give the path of a new file.")
            return
        path = Path(file).expanduser()
        if path.exists():
            print(f"/export: {path} exists already; give the path of a new file.")
            return
        try:
            write_text(path, json_line(self.memory.messages, name=self.name))
        except OSError as error:
            print(f"/export: {path} cannot be written: {error.strerror or error}.")
            return
        print(f"{len(self.memory.messages)} messages in {path}")

    def _greet(self) -> None:
        messages = self.memory.messages
        kept = f"kept in {self.where}" if self.where else "not kept"
        print(f"conversation {self.name!r}: {len(messages)} messages, {kept}. /help lists commands.", file=sys.stderr)
        if messages and messages[-1].role == "user":
            print(
                f"its last question has no answer yet (/retry gives one): {messages[-1].content[:200]}", file=sys.stderr
            )
        elif messages:
            print(f"last reply: {messages[-1].content[:200]}", file=sys.stderr)

    def _next_line(self, interactive: bool) -> str | None:
        """The next line that is not empty; None at the end of the input."""
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print("\n/quit or Ctrl-D leaves", file=sys.stderr)
                continue
            if line:
                return line

    def _stopped(self, line: str) -> str:
        messages = self.memory.messages
        if messages and messages[-1].role == "user" and messages[-1].content == line:
            return "\nstopped; the question is kept, and /retry answers it"
        if messages and messages[-1].role == "assistant" and not line.startswith("/"):
            return "\nstopped; what you see of the answer is kept" if messages[-2:-1] else "\nstopped"
        return "\nstopped"
