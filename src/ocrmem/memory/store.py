"""A store: conversations with their messages, pages and features, in one SQLite file or a PostgreSQL database.

```
append ─▶ one transaction, on disk before it returns          readers see whole transactions and never wait
pages  ─▶ one transaction for the pages and their features    writers of different conversations take turns
```
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import sqlite3
import time
import urllib.parse
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ocrmem.errors import StoreBusyError, StoreError
from ocrmem.memory.store_lock import WriterLock, lock_by, lock_file
from ocrmem.memory.store_schema import (
    bring_up_to_date,
    check_version,
    conversations,
    event,
    exc,
    features,
    messages,
    meta,
    pages,
    sa,
    schema_version,
)
from ocrmem.types import Message

if TYPE_CHECKING:
    import torch  # slow to import, and of no use to a listing or an export

log = logging.getLogger(__name__)

BUSY_SECONDS = 60.0
"""How long a transaction waits for another process's, before it is an error."""
LOCK_SPACE = 0x6F63726D
"""First number of PostgreSQL's advisory locks, so that they are not another program's."""
ROWS_AT_ONCE = 1000
"""Messages read or written by one statement."""


@dataclass(frozen=True)
class StoredConversation:
    """One conversation of a store, without its messages."""

    id: int
    name: str
    created: str
    """UTC, ISO 8601."""
    settings: dict[str, Any] | None
    """What its pages were made with; None: it has none yet."""
    num_messages: int
    num_pages: int


@dataclass(frozen=True, eq=False)
class StoredPage:
    """One full page; its text is that of the conversation's history from `start` to `end`."""

    level: int
    start: int
    end: int
    num_tokens: int
    key: str
    features_VE: torch.Tensor | None
    """The rows in use, on the CPU; None where they are damaged."""


class MemoryStore:
    """Conversations on disk.

    Any number of processes may use one store. A conversation has one writer at a time (`writer`) and any number of
    readers. Whatever a method has written is on disk when it returns.

    Args:
        where: path of an SQLite file, made if need be, or a PostgreSQL URL
            (`postgresql://user:password@host/database`).
        read_only: change nothing, and take a file that cannot be written.

    Raises:
        StoreError: it is no store, is of a newer version, or cannot be opened.
    """

    def __init__(self, where: str | Path, *, read_only: bool = False) -> None:
        self.read_only = read_only
        self._path: Path | None = None
        text = str(where)
        if "://" in text:
            self._engine, self.where = _server(text)
        else:
            self._path = Path(where)
            self._engine, self.where = _file(self._path, read_only=read_only), repr(text)
        with self._transaction(write=not read_only) as connection:
            if not read_only:
                if self._path is None:  # two processes may find an empty database at once
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:space, 0)"), {"space": LOCK_SPACE})
                bring_up_to_date(connection, where=self.where)
            elif not sa.inspect(connection).has_table(meta.name):
                raise StoreError(f"{self.where} holds no ocrmem store. Give the path of one, or open it for writing.")
            else:
                check_version(schema_version(connection), where=self.where)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def conversations(self) -> list[StoredConversation]:
        """All conversations, oldest first."""
        return self._find()

    def find(self, name: str) -> StoredConversation | None:
        """The conversation of that name, if there is one."""
        return next(iter(self._find(conversations.c.name == name)), None)

    def create(self, name: str) -> StoredConversation:
        """An empty conversation; the existing one where the name is taken.

        Raises:
            StoreError: the store is read-only.
        """
        with contextlib.suppress(exc.IntegrityError), self._transaction(write=True) as connection:
            connection.execute(conversations.insert().values(name=name, created=_now()))
        found = self.find(name)
        assert found is not None
        return found

    def writer(self, conversation: StoredConversation, *, wait: float = 0.0) -> WriterLock:
        """The right to write a conversation.

        Args:
            wait: seconds to wait for another process to let go of it.

        Raises:
            StoreBusyError: another process has it.
        """
        self._check_writable()
        if self._path is not None:
            folder = self._path.with_name(self._path.name + "-locks")
            return lock_file(folder, conversation.id, name=conversation.name, wait=wait)
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        numbers = {"space": LOCK_SPACE, "id": conversation.id}

        def try_lock() -> bool:
            return bool(connection.execute(sa.text("SELECT pg_try_advisory_lock(:space, :id)"), numbers).scalar_one())

        return lock_by(try_lock, connection.invalidate, name=conversation.name, wait=wait)

    def messages(self, conversation: StoredConversation, *, start: int = 0) -> list[Message]:
        """Messages in order, from the position `start` on."""
        query = (
            sa.select(messages.c.role, messages.c.content)
            .where(messages.c.conversation_id == conversation.id, messages.c.position >= start)
            .order_by(messages.c.position)
        )
        with self._transaction() as connection:
            return [Message(role, content) for role, content in connection.execute(query)]

    def append(self, conversation: StoredConversation, new: Sequence[Message], *, position: int) -> None:
        """Write messages behind all others; all of them, or none.

        Args:
            position: how many messages the writer believes there are.

        Raises:
            StoreBusyError: there are more or fewer, so somebody else has written.
            StoreError: the disk is full, or the store cannot be written.
        """
        own = messages.c.conversation_id == conversation.id
        rows = [
            {
                "conversation_id": conversation.id,
                "position": position + i,
                "role": message.role,
                "content": message.content,
                "created": _now(),
            }
            for i, message in enumerate(new)
        ]
        with self._transaction(write=True) as connection:
            found = connection.execute(sa.select(sa.func.max(messages.c.position)).where(own)).scalar()
            count = 0 if found is None else found + 1
            if count != position:
                raise StoreBusyError(
                    f"conversation {conversation.name!r} has {count} messages, but this writer knows {position}: "
                    "somebody else has written or deleted some. Nothing was written; open the conversation again."
                )
            for begin in range(0, len(rows), ROWS_AT_ONCE):
                connection.execute(messages.insert(), rows[begin : begin + ROWS_AT_ONCE])

    def pages(self, conversation: StoredConversation) -> list[StoredPage]:
        """Full pages with their features, in the order of their text."""
        query = (
            sa.select(pages, features)
            .join(features, features.c.page_id == pages.c.id, isouter=True)
            .where(pages.c.conversation_id == conversation.id)
            .order_by(pages.c.text_start)
        )
        with self._transaction() as connection:
            return [
                StoredPage(row.level, row.text_start, row.text_end, row.num_tokens, row.page_key, _unpacked(row))
                for row in connection.execute(query)
            ]

    def change_pages(
        self,
        conversation: StoredConversation,
        *,
        removed: Sequence[int],
        added: Sequence[StoredPage],
        settings: dict[str, Any],
    ) -> None:
        """Remove pages by their first characters, add others, and say what they were made with; all or nothing."""
        own = pages.c.conversation_id == conversation.id
        with self._transaction(write=True) as connection:
            for begin in range(0, len(removed), ROWS_AT_ONCE):
                part = pages.c.text_start.in_(removed[begin : begin + ROWS_AT_ONCE])
                connection.execute(pages.delete().where(own, part))
            for page in added:
                assert page.features_VE is not None
                values = {"level": page.level, "text_start": page.start, "text_end": page.end}
                values |= {"num_tokens": page.num_tokens, "page_key": page.key, "conversation_id": conversation.id}
                inserted = connection.execute(pages.insert().values(values))
                key = inserted.inserted_primary_key
                assert key is not None
                connection.execute(features.insert().values(page_id=key[0], **_packed(page.features_VE)))
            where = conversations.c.id == conversation.id
            connection.execute(conversations.update().where(where).values(settings=json.dumps(settings)))

    def delete(self, conversation: StoredConversation, *, keep: int = 0) -> None:
        """Delete a conversation, or its messages from position `keep` on, and every page that holds any of them.

        Text, pages and features are overwritten, not just marked as free. An empty conversation is removed whole.
        """
        with self._transaction(write=True) as connection:
            if keep <= 0:
                connection.execute(conversations.delete().where(conversations.c.id == conversation.id))
            else:
                own = messages.c.conversation_id == conversation.id
                connection.execute(messages.delete().where(own, messages.c.position >= keep))
                # A page may hold text of a kept and of a deleted message; pages can be made again.
                connection.execute(pages.delete().where(pages.c.conversation_id == conversation.id))
        self._wipe()

    def vacuum(self) -> None:
        """Give the space of what was deleted back to the disk. It takes as much free space as the store has."""
        self._check_writable()
        self._autocommit("VACUUM")
        self._wipe()

    def _wipe(self) -> None:
        """Let nothing that was deleted stay readable: in SQLite's log, or in PostgreSQL's dead rows."""
        if self._path is None:
            for table in (messages, pages, features, conversations):
                self._autocommit(f"VACUUM {table.name}")
            return
        busy = self._autocommit("PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            log.warning(
                "%s: another process is reading, so deleted text may stay in the file %s-wal until the last one closes "
                "the store, or `ocrmem store vacuum` is run.",
                self.where,
                self._path.name,
            )

    def _autocommit(self, statement: str) -> int:
        with _named_errors(self.where), self._engine.connect() as connection:
            alone = connection.execution_options(isolation_level="AUTOCOMMIT", ocrmem_begin=None)
            result = alone.exec_driver_sql(statement)
            return int(result.scalar() or 0) if result.returns_rows else 0

    def _find(self, *where: sa.ColumnElement[bool]) -> list[StoredConversation]:
        own = conversations.c.id
        counts = [
            sa.select(sa.func.count()).where(table.c.conversation_id == own).scalar_subquery()
            for table in (messages, pages)
        ]
        query = sa.select(conversations, *counts).where(*where).order_by(conversations.c.id)
        with self._transaction() as connection:
            return [
                StoredConversation(
                    id=number,
                    name=name,
                    created=created,
                    settings=None if settings is None else json.loads(settings),
                    num_messages=num_messages,
                    num_pages=num_pages,
                )
                for number, name, created, settings, num_messages, num_pages in connection.execute(query)
            ]

    def _check_writable(self) -> None:
        if self.read_only:
            raise StoreError(f"store {self.where} was opened read-only; open it for writing.")

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[sa.Connection]:
        if write:
            self._check_writable()
        with (
            _named_errors(self.where),
            self._engine.connect().execution_options(
                ocrmem_begin="BEGIN IMMEDIATE" if write else "BEGIN"
            ) as connection,
            connection.begin(),
        ):
            yield connection


def _file(path: Path, *, read_only: bool) -> sa.Engine:
    if not read_only and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"no store can be made at {str(path)!r}: {error.strerror or error}.") from error
    if read_only and not path.exists():
        raise StoreError(f"there is no store {str(path)!r} to read. Give the path of one.")
    name = f"file:{urllib.parse.quote(str(path.absolute()))}"
    mode = "ro" if read_only else "rwc"
    if read_only and not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists():
        mode += "&immutable=1"  # else SQLite would make files beside it even to read

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{name}?mode={mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA foreign_keys=ON")
        if not read_only:
            connection.execute("PRAGMA secure_delete=ON")
            _use_wal(connection)
            connection.execute("PRAGMA synchronous=FULL")
        return connection

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.QueuePool, pool_size=2)

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A writer begins as one (IMMEDIATE): a reader could not become one without starting anew.
        statement = connection.get_execution_options().get("ocrmem_begin", "BEGIN")
        if statement is not None:
            connection.exec_driver_sql(statement)

    return engine


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch a new file to the write-ahead log; SQLite does not wait for others in this one statement."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _server(url: str) -> tuple[sa.Engine, str]:
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:
        raise StoreError("the store's URL cannot be read. Give postgresql://user:password@host/database.") from None
    if parsed.get_backend_name() != "postgresql":
        raise StoreError(
            f"a store cannot be in {parsed.get_backend_name()!r}. Give the path of an SQLite file, or "
            "postgresql://user:password@host/database."
        )
    try:
        engine = sa.create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    except ImportError:
        raise StoreError(
            "a store in PostgreSQL needs the package psycopg, which is not installed: pip install 'ocrmem[postgres]'"
        ) from None
    return engine, repr(parsed.render_as_string(hide_password=True))


@contextlib.contextmanager
def _named_errors(where: str) -> Iterator[None]:
    """Say what a database's error means for the user; a broken rule of the tables stays as it is."""
    try:
        yield
    except exc.IntegrityError:
        raise
    except (exc.DBAPIError, sqlite3.Error) as error:
        reason = str(getattr(error, "orig", None) or error).strip()
        raise StoreError(f"store {where}: {reason}. {_advice(reason)}") from error


def _advice(reason: str) -> str:
    advice = {
        "readonly": "The file or its folder cannot be written: open the store read-only, or make it writable.",
        "not a database": "It is no SQLite file; give the path of a store, or of a new file.",
        "full": "The disk is full; nothing of this write was kept, everything before it was. Free some space.",
        "disk I/O": "The disk refuses to write (full, or a limit on file sizes); nothing of this write was kept, "
        "everything before it was. Free some space.",
        "locked": f"Another process was writing for more than {BUSY_SECONDS:g} seconds. Try again.",
        "unable to open": "Check the path, and that its folder can be written.",
        "malformed": "The file is damaged. Restore a copy, or save what can be read with `ocrmem store export`.",
        "connection": "Check that the server runs, and the URL's host, user, password and database.",
    }
    return next((text for word, text in advice.items() if word in reason), "Nothing of this step was written.")


def _packed(features_VE: torch.Tensor) -> dict[str, Any]:
    import torch

    array = features_VE.cpu().contiguous()
    data = array.view(torch.uint8).numpy().tobytes()
    return {
        "num_rows": array.shape[0],
        "width": array.shape[1],
        "dtype": str(array.dtype).removeprefix("torch."),
        "data": data,
        "crc32": zlib.crc32(data),
    }


def _unpacked(row: Any) -> torch.Tensor | None:
    """features_VE; None where they are missing or damaged, so that the page is encoded again."""
    import torch

    dtype = getattr(torch, row.dtype or "", None)
    if row.data is None or not isinstance(dtype, torch.dtype) or zlib.crc32(row.data) != row.crc32:
        return None
    if len(row.data) != row.num_rows * row.width * dtype.itemsize:
        return None
    flat = torch.frombuffer(bytearray(row.data), dtype=torch.uint8)
    return flat.view(dtype).reshape(row.num_rows, row.width)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
