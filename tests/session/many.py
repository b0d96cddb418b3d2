"""Many processes on one store: each writes a conversation of its own and, in turn with the others, a shared one."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter

from ocrmem.memory.store import MemoryStore
from ocrmem.types import Message

SHARED_EVERY = 5
"""Every fifth message goes to the conversation that all share."""


def write(where: str, process: int, number: int) -> None:
    """Write a process's messages."""
    store = MemoryStore(where)
    own = store.create(f"process {process}")
    position = 0
    with store.writer(own):
        for i in range(number):
            message = Message("user", f"{process}:{i}")
            if i % SHARED_EVERY:
                store.append(own, [message], position=position)
                position += 1
                continue
            shared = store.create("shared")
            with store.writer(shared, wait=60):
                found = store.find("shared")
                assert found is not None
                store.append(shared, [message], position=found.num_messages)


def run(where: str, *, processes: int, messages: int) -> dict[str, float]:
    """Run them at once; every message must be there once, and each process's in its own order."""
    each = messages // processes
    started = time.monotonic()
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would spend seconds on its imports
    running = [fork.Process(target=write, args=(where, number, each)) for number in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join(900)
    assert [process.exitcode for process in running] == [0] * processes
    seconds = time.monotonic() - started
    with MemoryStore(where) as store:
        found = {each.name: [m.content for m in store.messages(each)] for each in store.conversations()}
    counted = Counter(text for texts in found.values() for text in texts)
    assert counted == Counter(f"{process}:{i}" for process in range(processes) for i in range(each))
    for texts in found.values():
        for process in range(processes):
            numbers = [int(text.partition(":")[2]) for text in texts if text.startswith(f"{process}:")]
            assert numbers == sorted(numbers)
    return {"processes": processes, "messages": sum(counted.values()), "seconds": round(seconds, 2)}
