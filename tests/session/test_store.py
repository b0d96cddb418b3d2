"""The store: what it was given it has, whoever writes, whatever breaks."""

import json
import logging
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from session import many, postgres
from session.kills import kill_often
from session.parts import make_memory, make_model, talk

from ocrmem.errors import DataError, StoreBusyError, StoreError, StoreMismatchError
from ocrmem.memory import store_schema
from ocrmem.memory.store import MemoryStore, StoredPage
from ocrmem.session.jsonl import export_jsonl, import_jsonl
from ocrmem.types import Message

ODD = [
    Message("system", ""),
    Message("user", "json:[1]"),
    Message("user", "NUL \x00 and lone \ud800 surrogate"),
    Message("tool", "ünï → 漢字 🎉\r\n\t"),
    Message("assistant", "'; DROP TABLE ocrmem_messages; --"),
]
QUESTION = "What was turn 3 about?"


@pytest.fixture(scope="module")
def server():
    if postgres.binaries() is None:
        pytest.skip("no PostgreSQL server is installed here (apt-get install postgresql)")
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request, tmp_path):
    if request.param == "sqlite":
        yield str(tmp_path / "memory.sqlite")
        return
    url = request.getfixturevalue("server")
    yield url
    with MemoryStore(url) as store, store._transaction(write=True) as connection:
        store_schema.metadata.drop_all(connection)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.sqlite"


def page(start=0, end=9, key="a" * 64, features_VE=None):
    features_VE = torch.randn(3, 5).half() if features_VE is None else features_VE
    return StoredPage(0, start, end, 3, key, features_VE)


def test_it_has_what_it_was_given(where):
    with MemoryStore(where) as store:
        chat = store.create("chat \x00 one")
        store.append(chat, ODD[:2], position=0)
        store.append(chat, ODD[2:], position=2)
        kept = page()
        store.change_pages(chat, removed=[], added=[kept, page(9, 12)], settings={"encoder": "x"})
        other = store.create("other")
        store.append(other, ODD[:1], position=0)
    with MemoryStore(where) as store:
        found = store.find("chat \x00 one")
        assert (found.num_messages, found.num_pages, found.settings) == (5, 2, {"encoder": "x"})
        assert store.messages(found) == ODD
        assert store.messages(found, start=3) == ODD[3:]
        (first, second) = store.pages(found)
        assert first.features_VE.equal(kept.features_VE)
        assert (second.start, second.end) == (9, 12)
        store.change_pages(found, removed=[0], added=[], settings={})
        assert [each.start for each in store.pages(found)] == [9]
        assert [each.name for each in store.conversations()] == ["chat \x00 one", "other"]
        store.delete(found)
        assert [each.name for each in store.conversations()] == ["other"]
        store.vacuum()
        assert store.messages(store.find("other")) == ODD[:1]


def test_one_writer_and_many_readers(where):
    store, second = MemoryStore(where), MemoryStore(where)
    chat = store.create("chat")
    lock = store.writer(chat)
    with pytest.raises(StoreBusyError, match=r"'chat' is being written by another process \(waited 0.2 s\)"):
        second.writer(chat, wait=0.2)
    store.append(chat, talk(1), position=0)
    assert second.messages(chat) == talk(1)
    with second.writer(second.create("other")):
        pass
    lock.release()
    lock.release()
    with second.writer(chat):
        second.append(chat, talk(1, start=1), position=1)
    with pytest.raises(StoreBusyError, match="has 2 messages, but this writer knows 1: somebody else has written"):
        store.append(chat, talk(1), position=1)
    assert store.messages(chat) == talk(2)


def test_a_memory_goes_on_where_it_was(where):
    model = make_model()
    with make_memory(model, store=MemoryStore(where)) as memory:
        memory.extend(talk(60))
        expected = memory.logits(QUESTION)
        keys = [each.key for each in memory.prompt(QUESTION).pages]
    model.ocr_embed.calls.clear()
    with make_memory(model, store=MemoryStore(where)) as memory:
        assert memory.messages == talk(60)
        assert (memory.logits(QUESTION) - expected).abs().max() <= 1e-4
        assert [each.key for each in memory.prompt(QUESTION).pages] == keys
        assert sum(model.ocr_embed.calls) == 1, "the tail page alone"
        memory.extend(talk(50, start=60))
        expected = memory.logits(QUESTION)
        assert memory.tokens.left_out > 0
        ledger = memory.prompt(QUESTION).ledger
    with make_memory(model, store=MemoryStore(where), recall=1) as memory:
        at_once = make_memory(model, recall=1)
        at_once.extend(talk(110))
        assert memory.prompt("turn 2?").recalled == at_once.prompt("turn 2?").recalled
        assert memory.prompt(QUESTION).tokens == at_once.prompt(QUESTION).tokens
    with make_memory(model, store=MemoryStore(where)) as memory:
        assert (memory.logits(QUESTION) - expected).abs().max() <= 1e-4
        assert memory.prompt(QUESTION).ledger == ledger


def test_forgetting_overwrites_text_pages_and_features(path):
    model = make_model()
    secret = "Rosebud-7731 is the sled"
    with make_memory(model, store=MemoryStore(path)) as memory:
        memory.extend([*talk(20), Message("user", secret), *talk(21, start=21)])
        memory.prompt()
        data = memory._features[memory._pages.full[0].key].numpy().tobytes()
        pieces = [data[i : i + 32] for i in range(0, len(data), 32) if data[i : i + 32].count(0) < 8][:40]
        files = [path, path.with_name("memory.sqlite-wal")]
        everything = b"".join(file.read_bytes() for file in files)
        assert secret.encode() in everything
        assert sum(piece in everything for piece in pieces) > 30
        memory.forget(keep=20)
        after = b"".join(file.read_bytes() for file in files)
        assert secret.encode() not in after
        assert memory.messages == talk(20)
        memory.forget()
        after = b"".join(file.read_bytes() for file in files)
        assert not any(piece in after for piece in pieces)
        assert b"is about thing" not in after
        memory.extend(talk(3))
    with MemoryStore(path) as store:
        assert store.messages(store.find("default")) == talk(3)


def test_a_reader_in_the_way_of_a_deletion_is_said(path, caplog, monkeypatch):
    monkeypatch.setattr("ocrmem.memory.store.BUSY_SECONDS", 0.1)
    store = MemoryStore(path)
    chat = store.create("chat")
    store.append(chat, talk(3), position=0)
    reader = sqlite3.connect(path)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM ocrmem_messages").fetchone()
    with caplog.at_level(logging.WARNING):
        store.delete(chat)
    assert "another process is reading, so deleted text may stay" in caplog.text
    reader.close()


def test_a_newer_store_is_refused_and_unchanged(path):
    MemoryStore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE ocrmem_meta SET value = '99' WHERE key = 'schema_version'")
    for read_only in (False, True):
        with pytest.raises(StoreError, match="is of version 99, written by a newer ocrmem; this one knows"):
            MemoryStore(path, read_only=read_only)


def test_an_older_store_is_brought_up_to_date(path, monkeypatch):
    with MemoryStore(path) as store:
        chat = store.create("chat")
        store.append(chat, ODD, position=0)

    def add_column(connection):
        connection.exec_driver_sql("ALTER TABLE ocrmem_conversations ADD COLUMN note TEXT")

    def fail(connection):
        add_column(connection)
        raise RuntimeError("half way")

    monkeypatch.setattr(store_schema, "SCHEMA_VERSION", 2)
    monkeypatch.setitem(store_schema.MIGRATIONS, 1, fail)
    with pytest.raises(RuntimeError, match="half way"):
        MemoryStore(path)
    monkeypatch.setitem(store_schema.MIGRATIONS, 1, add_column)
    with MemoryStore(path) as store:
        assert store.messages(store.find("chat")) == ODD
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT value FROM ocrmem_meta").fetchall() == [("2",)]
        connection.execute("SELECT note FROM ocrmem_conversations")


def test_what_is_no_store_is_refused(path, tmp_path):
    path.write_text("just a text file, long enough to be no header of anything\n" * 9)
    with pytest.raises(StoreError, match="file is not a database. It is no SQLite file"):
        MemoryStore(path)
    with pytest.raises(StoreError, match="there is no store .* to read"):
        MemoryStore(tmp_path / "none.sqlite", read_only=True)
    sqlite3.connect(tmp_path / "empty.sqlite").execute("CREATE TABLE a (b)").connection.close()
    with pytest.raises(StoreError, match="holds no ocrmem store"):
        MemoryStore(tmp_path / "empty.sqlite", read_only=True)
    with pytest.raises(StoreError, match="cannot be in 'mysql'"):
        MemoryStore("mysql://user:secret@host/db")
    with pytest.raises(StoreError) as caught:
        MemoryStore("postgresql://user:secret@127.0.0.1:1/db")
    assert "Check that the server runs" in str(caught.value)
    assert "secret" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="no store can be made at"):
        MemoryStore(tmp_path / "file" / "store.sqlite")


def test_read_only(path):
    with make_memory(store=MemoryStore(path)) as memory:
        memory.extend(talk(40))
        expected = memory.logits(QUESTION)
    reader = make_memory(store=MemoryStore(path, read_only=True))
    assert (reader.logits(QUESTION) - expected).abs().max() <= 1e-4
    with pytest.raises(StoreError, match="was opened read-only; open it for writing"):
        reader.append(talk(1)[0])
    assert reader.messages == talk(40)
    with pytest.raises(StoreError, match="has no conversation 'none', and is read-only"):
        make_memory(store=MemoryStore(path, read_only=True), conversation="none")


def as_nobody(work):
    """What `work` returns, done by a user whom permissions bind; root would write anything."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.write(writing, json.dumps(work()).encode())
        except BaseException as error:
            os.write(writing, json.dumps(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as file:
        return json.load(file)


def test_a_file_that_cannot_be_written():
    folder = Path(tempfile.mkdtemp(prefix="ocrmem-read-only-"))
    path = folder / "memory.sqlite"

    def work():
        with pytest.raises(StoreError) as refused:
            MemoryStore(path)
        store = MemoryStore(path, read_only=True)
        return str(refused.value), len(store.messages(store.find("chat")))

    try:
        with MemoryStore(path) as store:
            store.append(store.create("chat"), talk(3), position=0)
        path.chmod(0o444)
        folder.chmod(0o555)
        answer = as_nobody(work)
        assert len(answer) == 2, answer
        refused, messages = answer
        assert "open the store read-only, or make it writable" in refused
        assert messages == 3
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_full_disk_loses_nothing_that_was_acknowledged(path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    code = (
        "import sys, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from ocrmem.memory.store import MemoryStore\nfrom ocrmem.errors import StoreError\n"
        "from ocrmem.types import Message\nstore = MemoryStore(sys.argv[1])\nchat = store.create('chat')\n"
        "try:\n    for n in range(10_000):\n"
        "        store.append(chat, [Message('user', f'{n} ' + 'x' * 500)], position=n)\n        print(n, flush=True)\n"
        "except StoreError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False, preexec_fn=limited
    )
    assert done.returncode == 0, done.stderr
    *acknowledged, error = done.stdout.splitlines()
    assert "everything before it was. Free some space." in error
    with MemoryStore(path) as store:
        chat = store.find("chat")
        assert len(store.messages(chat)) == len(acknowledged) > 10
        store.append(chat, talk(1), position=len(acknowledged))


def test_a_memory_whose_store_fails_is_as_it_was(path, monkeypatch):
    store = MemoryStore(path)
    memory = make_memory(store=store)
    memory.extend(talk(4))
    with store._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    store._engine.dispose()
    connect = sqlite3.connect

    def full(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.execute(f"PRAGMA max_page_count={pages}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(StoreError, match="The disk is full; nothing of this write was kept"):
        memory.extend([Message("user", "x" * 200_000)])
    assert memory.messages == talk(4)
    monkeypatch.undo()
    store._engine.dispose()
    memory.extend(talk(2, start=4))
    assert store.messages(store.find("default")) == talk(6)


def test_other_parts_are_never_mixed(path):
    with make_memory(make_model(), store=MemoryStore(path)) as memory:
        memory.extend(talk(40))
        memory.logits(QUESTION)
        keys = {each.key for each in memory.pages}
    with pytest.raises(StoreMismatchError, match="made with other parts: encoder pooling .* there, pooling .* here"):
        make_memory(make_model(scale=2.0), store=MemoryStore(path))
    with pytest.raises(StoreMismatchError, match="LLM .* there, other weights of the same shape here"):
        make_memory(make_model(seed=1), store=MemoryStore(path))
    with pytest.raises(StoreMismatchError, match="LLM .*llama.* there, .*qwen3.* here"):
        make_memory(make_model("qwen3"), store=MemoryStore(path))
    other = make_model(scale=2.0)
    with make_memory(other, store=MemoryStore(path), reencode=True) as memory:
        assert memory.messages == talk(40)
        fresh = make_memory(other)
        fresh.extend(talk(40))
        assert (memory.logits(QUESTION) - fresh.logits(QUESTION)).abs().max() <= 1e-4
        assert not keys & {each.key for each in memory.pages}
    with MemoryStore(path) as store:
        assert not keys & {each.key for each in store.pages(store.find("default"))}
    make_memory(other, store=MemoryStore(path)).close()


def test_another_budget_makes_the_pages_anew(path):
    with make_memory(budget=2048, store=MemoryStore(path)) as memory:
        memory.extend(talk(110))
        memory.prompt()
    with make_memory(budget=640, store=MemoryStore(path)) as memory:
        at_once = make_memory(budget=640)
        at_once.extend(talk(110))
        assert [each.key for each in memory.pages] == [each.key for each in at_once.pages]
        assert memory.tokens == at_once.tokens


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ocrmem_features SET data = zeroblob(length(data))",
        "DELETE FROM ocrmem_features WHERE page_id = (SELECT min(id) FROM ocrmem_pages)",
        "UPDATE ocrmem_messages SET content = 'changed' WHERE position = 3",
        "UPDATE ocrmem_pages SET text_start = text_start + 1",
        "DELETE FROM ocrmem_pages WHERE text_start = (SELECT min(text_start) FROM ocrmem_pages WHERE text_start > 0)",
    ],
)
def test_pages_that_disagree_with_the_text_are_made_again(path, caplog, statement):
    with make_memory(budget=2048, store=MemoryStore(path)) as memory:
        memory.extend(talk(60))
        memory.prompt()
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    with make_memory(budget=2048, store=MemoryStore(path)) as memory:
        assert "is damaged or not of this text; the pages are made again" in caplog.text
        fresh = make_memory(budget=2048)
        fresh.extend(memory.messages)
        assert (memory.logits(QUESTION) - fresh.logits(QUESTION)).abs().max() <= 1e-4
    caplog.clear()
    make_memory(budget=2048, store=MemoryStore(path)).close()
    assert "made again" not in caplog.text


def test_two_memories_on_one_conversation(path):
    memory = make_memory(store=MemoryStore(path))
    with pytest.raises(StoreBusyError, match="'default' is being written by another process"):
        make_memory(store=MemoryStore(path))
    make_memory(store=MemoryStore(path), conversation="other").close()
    memory.append(talk(1)[0])
    memory.close()
    with make_memory(store=MemoryStore(path)) as second:
        assert second.messages == talk(1)


def test_a_message_of_five_megabytes(path):
    text = "".join(f"Line {n} of a very long report.\n" for n in range(156_000))
    assert len(text) > 5_000_000
    with make_memory(store=MemoryStore(path)) as memory:
        memory.append(Message("user", text))
    with MemoryStore(path) as store:
        assert store.messages(store.find("default")) == [Message("user", text)]


def test_export_and_import(path, tmp_path):
    store = MemoryStore(path)
    for name, turns in {"one": ODD, "two \ud800": talk(3), "empty": []}.items():
        store.append(store.create(name), turns, position=0)
    target = tmp_path / "out" / "all.jsonl"
    assert export_jsonl(store, target) == 2
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["one", "two \ud800"]
    other = MemoryStore(tmp_path / "other.sqlite")
    other.append(other.create("one"), talk(1), position=0)
    done = import_jsonl(other, target)
    assert (done.added, done.already_there) == (["one (2)", "two \ud800"], [])
    assert done.renamed == {"one": "one (2)"}
    assert other.messages(other.find("one (2)")) == ODD
    again = import_jsonl(other, target)
    assert (again.added, again.already_there) == ([], ["one (2)", "two \ud800"])
    assert export_jsonl(store, target, name="one") == 1
    with pytest.raises(DataError, match="has no conversation 'three' with messages; it has 'one'"):
        export_jsonl(store, target, name="three")
    target.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"messages": 3}\n')
    with pytest.raises(DataError, match="all.jsonl:2"):
        import_jsonl(other, target)
    assert other.messages(other.find("all.jsonl:1")) == [Message("user", "hi")]


def test_kills_at_random_moments(path):
    done = kill_often(path, number=12, at_least=21)
    assert done["messages"] > 20, done
    assert done["pages"] > 0, done


def test_many_processes(where):
    done = many.run(where, processes=8, messages=320)
    assert done["messages"] == 320
