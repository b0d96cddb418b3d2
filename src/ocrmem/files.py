"""Writing files so that nothing a user made is ever lost: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path


def write_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write several files of one folder together.

    Every file is first written in full under a temporary name beside its place; only when all are safely on disk
    are they renamed, in the order given. A full disk or an error in a writer leaves the folder as it was.

    Args:
        folder: created if need be.
        writers: for each file name, a function that writes the file at the path it is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary = {name: folder / f".{name}{suffix}" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
            temporary[name].chmod(0o666 & ~_umask())  # safetensors writes 0600
            fsync(temporary[name])
        for name, path in temporary.items():
            path.replace(folder / name)
    except BaseException:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    fsync(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write one text file in UTF-8, atomically."""
    write_files(path.parent, {path.name: lambda temporary: temporary.write_text(text, encoding="utf-8")})


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
