"""Tables of a store, and how a store of an older version becomes one of this.

```
ocrmem_meta            key, value                          the schema's version
ocrmem_conversations   name, settings                      what its pages were made with
ocrmem_messages        conversation, position, role, text  the truth; everything below can be made again
ocrmem_pages           conversation, span of the text      full pages alone: they never change
ocrmem_features        page, what the encoder gave
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from ocrmem.errors import ConfigError, StoreError

try:
    import sqlalchemy as sa
    from sqlalchemy import event, exc
except ImportError:
    raise ConfigError(
        "a store needs the package SQLAlchemy, which is not installed: pip install 'ocrmem[store]'"
    ) from None

SCHEMA_VERSION = 1
"""Raised with every change of the tables; `MIGRATIONS` leads from each version to the next."""

MARK = "json:"
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
"""Characters that no database takes as text."""


class AnyText(sa.types.TypeDecorator[str]):
    """Text of any characters: what a database would refuse or cut is written as JSON behind a mark."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        if value is not None and (value.startswith(MARK) or UNSTORABLE.search(value)):
            return MARK + json.dumps(value)
        return value

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return json.loads(value[len(MARK) :]) if value is not None and value.startswith(MARK) else value


metadata = sa.MetaData()
meta = sa.Table(
    "ocrmem_meta",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
conversations = sa.Table(
    "ocrmem_conversations",
    metadata,
    # AUTOINCREMENT: the number of a deleted conversation never comes again.
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("name", AnyText, nullable=False, unique=True),
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("settings", sa.Text),
    sqlite_autoincrement=True,
)


def _conversation_id(**options: Any) -> sa.Column[int]:
    key = sa.ForeignKey("ocrmem_conversations.id", ondelete="CASCADE")
    return sa.Column("conversation_id", sa.Integer, key, nullable=False, **options)


messages = sa.Table(
    "ocrmem_messages",
    metadata,
    _conversation_id(primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("content", AnyText, nullable=False),
    sa.Column("created", sa.String(32), nullable=False),
)
pages = sa.Table(
    "ocrmem_pages",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    _conversation_id(),
    sa.Column("level", sa.Integer, nullable=False),
    sa.Column("text_start", sa.Integer, nullable=False),
    sa.Column("text_end", sa.Integer, nullable=False),
    sa.Column("num_tokens", sa.Integer, nullable=False),
    sa.Column("page_key", sa.String(64), nullable=False),
    sa.UniqueConstraint("conversation_id", "text_start"),
    sqlite_autoincrement=True,
)
features = sa.Table(
    "ocrmem_features",
    metadata,
    sa.Column("page_id", sa.Integer, sa.ForeignKey("ocrmem_pages.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("num_rows", sa.Integer, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("dtype", sa.String(16), nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.Column("crc32", sa.BigInteger, nullable=False),
)

MIGRATIONS: dict[int, Callable[[sa.Connection], None]] = {}
"""Version to what makes a store of it one of the next, inside one transaction."""


def bring_up_to_date(connection: sa.Connection, *, where: str) -> None:
    """Create the tables, or run the migrations that are missing, in the caller's transaction.

    Raises:
        StoreError: the store is of a newer version than this package knows.
    """
    if not sa.inspect(connection).has_table(meta.name):
        metadata.create_all(connection)
        connection.execute(meta.insert().values(key="schema_version", value=str(SCHEMA_VERSION)))
        return
    version = schema_version(connection)
    check_version(version, where=where)
    while version < SCHEMA_VERSION:
        MIGRATIONS[version](connection)
        version += 1
        connection.execute(meta.update().where(meta.c.key == "schema_version").values(value=str(version)))


def schema_version(connection: sa.Connection) -> int:
    """The version of a store that has tables."""
    return int(connection.execute(sa.select(meta.c.value).where(meta.c.key == "schema_version")).scalar_one())


def check_version(version: int, *, where: str) -> None:
    """Raise unless this package can read a store of that version, after migrating it if need be."""
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"store {where} is of version {version}, written by a newer ocrmem; this one knows versions up to "
            f"{SCHEMA_VERSION}. Nothing was changed. Upgrade ocrmem, or give another store."
        )


__all__ = [
    "AnyText",
    "bring_up_to_date",
    "check_version",
    "conversations",
    "event",
    "exc",
    "features",
    "messages",
    "meta",
    "pages",
    "sa",
    "schema_version",
]
