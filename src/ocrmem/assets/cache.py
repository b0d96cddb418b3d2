"""The one cache folder, and sealed folders in it: complete, checked, and noticed when they change.

```
$OCRMEM_CACHE/assets/NAME/
    .lock                  held by the process that downloads or prepares
    .partial-*/            work in progress; never read, swept by the next process that holds the lock
    SHA12/source/          the file as it lay in the wheel            } each with a seal inside, and put in
    SHA12/prepared-vN/     what the preparation made of it, if any    } place by one rename when complete
```
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from ocrmem.assets.registry import Progress
from ocrmem.files import fsync

CACHE_VARIABLE = "OCRMEM_CACHE"
"""Environment variable that moves the cache."""
SEAL = ".ocrmem-seal.json"
"""File inside a sealed folder: size, modification time and SHA-256 of every other file in it."""
PARTIAL = ".partial-"
"""How the names of unfinished folders begin."""


def cache_dir() -> Path:
    """The cache folder: `$OCRMEM_CACHE`, or the user's cache folder of this system. It need not exist yet."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else platformdirs.user_cache_path("ocrmem")


def asset_dir(name: str) -> Path:
    """Everything that the cache holds of one asset."""
    return cache_dir() / "assets" / name


@contextlib.contextmanager
def exclusive(folder: Path, *, progress: Progress) -> Iterator[None]:
    """Let one process at a time work in `folder`, and sweep what a killed one left behind.

    The lock is the kernel's, so it goes with the process that held it, however that ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another process that works in {folder}")
        lock.acquire()
    try:
        for leftover in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)  # a killed process's pip may still write there
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A fresh folder for unfinished work in `parent`, gone at the end unless it was published."""
    folder = parent / f"{PARTIAL}{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def seal(folder: Path) -> dict[str, str]:
    """Force every file of a folder to disk, record what they are, and give their SHA-256 by relative path."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL):
        fsync(path)
        status = path.stat()
        entries[path.relative_to(folder).as_posix()] = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": sha256_file(path),
        }
    temporary = folder / f"{SEAL}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    fsync(temporary)
    temporary.replace(folder / SEAL)
    return {name: entry["sha256"] for name, entry in entries.items()}


def is_intact(folder: Path, expected: Mapping[str, str] | None) -> bool:
    """Whether a sealed folder still holds what was sealed.

    Size and modification time decide, since hashing the 540 MB of the default LLM at every start would cost
    half a second or more. A file whose modification time moved is hashed again, and the seal renewed if the
    content is right.

    Args:
        expected: SHA-256 by relative path that the sealed files must have; None if only the seal can tell.
    """
    try:
        entries = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        sealed = {name: str(entry["sha256"]) for name, entry in entries.items()}
        if not sealed or (expected is not None and sealed != dict(expected)):
            return False
        touched = False
        for name, entry in entries.items():
            status = (folder / name).stat()
            if status.st_size != entry["size"]:
                return False
            if status.st_mtime_ns != entry["mtime_ns"]:
                touched = True
                if sha256_file(folder / name) != entry["sha256"]:
                    return False
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # no seal, or a damaged one
        return False
    if touched:
        with contextlib.suppress(OSError):  # a read-only cache works too, only slower
            seal(folder)
    return True


def publish(finished: Path, place: Path) -> None:
    """Put a finished, sealed folder in its place, in one rename.

    A broken one there goes where the finished one was, to be swept with it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.rename(finished.with_name("broken"))
    finished.rename(place)
    fsync(place.parent)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
