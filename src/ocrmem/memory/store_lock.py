"""One writer per conversation: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from ocrmem.errors import StoreBusyError, StoreError

POLL = 0.05
"""Seconds between two tries to get a lock in PostgreSQL."""


class WriterLock:
    """The right to write one conversation, held until `release` or the end of the process.

    Args:
        release: gives it back.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let others write; calling it again does nothing."""
        if self._release is not None:
            release, self._release = self._release, None
            release()

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_file(folder: Path, conversation_id: int, *, name: str, wait: float) -> WriterLock:
    """Lock by a file: the operating system lets go of it when the process ends, by SIGKILL too.

    Raises:
        StoreBusyError: another process holds it, and still did after `wait` seconds.
        StoreError: the file cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{conversation_id}.lock", timeout=wait, is_singleton=False)
        lock.acquire()
    except Timeout:
        raise _busy(name, wait) from None
    except OSError as error:
        raise StoreError(
            f"conversation {name!r} cannot be locked for writing, because no file can be made in {str(folder)!r} "
            f"({error.strerror or error}). Open the store read-only, or make the folder writable."
        ) from error
    return WriterLock(lambda: lock.release(force=True))


def lock_by(try_lock: Callable[[], bool], unlock: Callable[[], None], *, name: str, wait: float) -> WriterLock:
    """Lock by a database that can only say whether it was free."""
    deadline = time.monotonic() + wait
    while not try_lock():
        if time.monotonic() >= deadline:
            with contextlib.suppress(Exception):
                unlock()
            raise _busy(name, wait)
        time.sleep(POLL)
    return WriterLock(unlock)


def _busy(name: str, wait: float) -> StoreBusyError:
    return StoreBusyError(
        f"conversation {name!r} is being written by another process (waited {wait:g} s). A conversation has one writer "
        "and any number of readers: close the other one, wait longer, or open it read-only."
    )
