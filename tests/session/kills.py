"""Kills at random moments: a child appends and encodes until it is killed, and its store must hold what it promised."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from pathlib import Path

from memory.parts import shared_tokenizer
from session.parts import make_memory, shared_model

from ocrmem.memory.history import history_text
from ocrmem.memory.store import MemoryStore
from ocrmem.types import Message


def turn(number: int) -> Message:
    """The message that every child writes at that position."""
    words = "thing " * (number * 7 % 23)
    return Message("user" if number % 2 == 0 else "assistant", f"turn {number}: {words}{number * number}")


def child(path: Path, acknowledge: int) -> None:
    """Append turns, one by one, and after each bring the pages up to date."""
    memory = make_memory(store=MemoryStore(path))
    while True:
        number = len(memory.messages)
        memory.append(turn(number))
        os.write(acknowledge, number.to_bytes(4, "little"))
        memory.prompt()


def kill_once(path: Path, seconds: float) -> int:
    """Run a child for so long, kill it, and return how many messages it has acknowledged; -1: none."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            child(path, writing)
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    acknowledged = b""
    while part := os.read(reading, 1 << 16):
        acknowledged += part
    os.close(reading)
    return int.from_bytes(acknowledged[-4:], "little") if acknowledged else -1


def check(path: Path) -> tuple[int, int]:
    """Messages and pages of the store, after making sure that they agree with each other and with the encoder."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()
    with MemoryStore(path) as store:
        conversation = store.find("default")
        if conversation is None:
            return 0, 0
        messages = store.messages(conversation)
        assert messages == [turn(number) for number in range(len(messages))]
        pages = store.pages(conversation)
    text = history_text(messages)
    at_once = make_memory()
    at_once.extend(messages)
    for page, following in zip(pages, [*pages[1:], None], strict=False):
        assert following is None or following.start == page.end
        drawn = at_once._pages.page(page.level, page.start, text[page.start : page.end])
        assert drawn is not None
        assert drawn.key == page.key
        assert page.features_VE is not None
        fresh_VE = at_once._encoded(drawn)
        assert page.features_VE.equal(fresh_VE[: len(page.features_VE)])
        assert not fresh_VE[len(page.features_VE) :].any()
    return len(messages), len(pages)


def kill_often(path: Path, *, number: int, at_least: int = 0, seed: int = 0) -> dict[str, int]:
    """Kill so many children of one store at random moments, and check it after each.

    Args:
        at_least: go on until the store has so many messages and a page, on a slow machine too; but not for ever.
    """
    chance = random.Random(seed)
    shared_model()
    shared_tokenizer()("warm")
    most = messages = pages = kills = 0
    while kills < number or (at_least and (messages < at_least or not pages) and kills < 50 * number):
        kills += 1
        acknowledged = kill_once(path, chance.uniform(0.02, 0.35))
        if not path.exists():
            continue
        messages, pages = check(path)
        assert messages > acknowledged, f"message {acknowledged} was acknowledged, but there are only {messages}"
        most = max(most, messages)
    assert messages == most, "a message was lost later"
    return {"kills": kills, "messages": messages, "pages": pages}
