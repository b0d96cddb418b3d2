"""Files of text, read as pieces of whole lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ocrmem.errors import DataError

PIECE = 1 << 20
"""Characters read at once of a text file."""
MAX_PIECE = 16 << 20
"""Characters after which a text without a line break is cut."""


def pieces(source: Path | IO[str], *, size: int | None = None) -> Iterator[str]:
    """The text of a file or stream, `size` characters (`PIECE`) and the rest of a line at a time.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(source, Path):
        try:
            with source.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                yield from pieces(file, size=size)
        except OSError as error:
            raise DataError(
                f"{str(source)!r} cannot be read: {error.strerror or error}. Give a text file, or - for stdin."
            ) from None
        return
    while piece := source.read(size or PIECE):
        while not piece.endswith("\n") and len(piece) < MAX_PIECE and (more := source.readline(PIECE)):
            piece += more
        yield piece
