"""`ocrmem chat` in the terminal, and `ocrmem store`."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from session.parts import make_memory, talk

from ocrmem.cli import chat, chat_terminal
from ocrmem.errors import ConfigError, DataError
from ocrmem.memory.store import MemoryStore
from ocrmem.types import Message

ROOT = Path(__file__).resolve().parents[2]


def ocrmem(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ocrmem", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture
def say(monkeypatch):
    """Types lines into a terminal on a memory, and gives the memory back; an exception is raised where it is typed."""

    def run(*lines, memory=None, store=None, tokens=4, answer=None):
        memory = memory or make_memory(store=store)
        typed = iter(lines)

        def read(prompt=""):
            line = next(typed, None)
            if line is None:
                raise EOFError
            if isinstance(line, type):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        terminal = chat_terminal.Terminal(
            memory,
            name="default",
            where=None if store is None else store.where,
            answer=answer or (lambda asked: chat.answer(memory, asked, tokens, 0.0, False)),
        )
        terminal.run(interactive=True)
        return memory

    return run


def test_questions_are_answered_and_kept(say, capsys):
    memory = say("Hello?", "", "And now?", "/quit", "never asked")
    assert [message.role for message in memory.messages] == ["user", "assistant"] * 2
    out, error = capsys.readouterr()
    assert memory.messages[1].content in out
    assert "no memory: all 1 turns stay text" in error
    assert "conversation 'default': 0 messages, not kept" in error


def test_pages_tokens_and_help(say, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    memory = make_memory()
    say("/pages", "/tokens", memory=memory)
    out = capsys.readouterr().out
    assert "no pages: all of the conversation is text." in out or "nothing was said yet." in out
    memory.extend(talk(110))
    say(f"/pages {tmp_path / 'pages'}", "/tokens", "/help", "/wrong", memory=memory)
    out, error = capsys.readouterr()
    assert len(list((tmp_path / "pages").glob("*.png"))) == len(memory.pages)
    assert "level 1 (denser)" in out
    assert "of 640 in the budget" in out
    assert "text tokens of the oldest turns are on no page any more" in out
    assert "/forget [N]" in out
    assert "/wrong is no command" in error


def test_forget(say, capsys):
    memory = make_memory()
    memory.extend(talk(10))
    say("/forget 2", "no", "/forget 99", "/forget x", memory=memory)
    out = capsys.readouterr().out
    assert "nothing was forgotten" in out
    assert "there are 10 messages; give a number from 1 to that" in out
    assert memory.messages == talk(10)
    say("/forget 2", "yes", memory=memory)
    assert memory.messages == talk(8)
    say("/forget", "yes", memory=memory)
    assert memory.messages == []


def test_export(say, capsys, tmp_path):
    memory = make_memory()
    memory.extend(talk(4))
    target = tmp_path / "talk.jsonl"
    say("/export", f"/export {target}", f"/export {target}", "/export /proc/none/x", memory=memory)
    out = capsys.readouterr().out
    assert "give the path of a new file" in out
    assert "4 messages in" in out
    assert "exists already" in out
    assert "cannot be written" in out
    assert json.loads(target.read_text())["messages"] == [message.as_dict() for message in talk(4)]
    assert chat.read_history(str(target)) == talk(4)


def test_an_interrupted_answer_is_kept_as_far_as_it_came(say, capsys):
    memory = make_memory()

    def answer(asked):
        pieces = memory.reply(asked, stream=True, max_new_tokens=9)
        next(pieces)
        pieces.close()
        raise KeyboardInterrupt

    say("Hello?", KeyboardInterrupt, memory=memory, answer=answer)
    error = capsys.readouterr().err
    assert "stopped; what you see of the answer is kept" in error
    assert "/quit or Ctrl-D leaves" in error
    assert len(memory.messages) == 2


def test_a_question_without_an_answer_can_be_tried_again(say, capsys, tmp_path):
    store = MemoryStore(tmp_path / "memory.sqlite")
    memory = make_memory(store=store)

    def answer(asked):
        memory.append(Message("user", asked))
        raise KeyboardInterrupt

    say("Hello?", memory=memory, store=store, answer=answer)
    assert "the question is kept, and /retry answers it" in capsys.readouterr().err
    memory.close()
    memory = say("/retry", "/retry", store=store)
    error = capsys.readouterr().err
    assert "its last question has no answer yet (/retry gives one): Hello?" in error
    assert "nothing was asked" in error
    assert [message.role for message in memory.messages] == ["user", "assistant"]


def test_an_error_does_not_end_the_conversation(say, capsys):
    def answer(asked):
        raise ConfigError("too long")

    say("Hello?", "/tokens", answer=answer)
    out, error = capsys.readouterr()
    assert "error: too long" in error
    assert "nothing was said yet" in out


def test_a_history_begins_a_conversation_or_agrees_with_it(tmp_path):
    memory = make_memory(store=MemoryStore(tmp_path / "memory.sqlite"))
    chat.begin(memory, talk(4), "default")
    chat.begin(memory, talk(2), "default")
    chat.begin(memory, [], "default")
    assert memory.messages == talk(4)
    with pytest.raises(DataError, match="has 4 messages already, and does not begin with the history given"):
        chat.begin(memory, talk(3, start=1), "default")


def test_stores_from_the_command_line(tmp_path):
    path, file = tmp_path / "memory.sqlite", tmp_path / "in.jsonl"
    assert "there is no store" in ocrmem("store", "list", "--store", path).stderr
    file.write_text(json.dumps({"name": "one", "messages": [message.as_dict() for message in talk(3)]}) + "\n")
    assert "1 conversations added, 0 already there" in ocrmem("store", "import", file, "--store", path).stdout
    listed = json.loads(ocrmem("store", "list", "--store", path, "--json").stdout)
    assert [(row["name"], row["messages"]) for row in listed] == [("one", 3)]
    assert "1 conversations in" in ocrmem("store", "export", tmp_path / "out.jsonl", "--store", path).stdout
    assert json.loads((tmp_path / "out.jsonl").read_text())["name"] == "one"
    done = ocrmem("store", "delete", "two", "--store", path)
    assert (done.returncode, "has no conversation 'two'" in done.stderr) == (1, True)
    assert "deleted 'one' (3 messages)" in ocrmem("store", "delete", "one", "--store", path).stdout
    assert "is vacuumed" in ocrmem("store", "vacuum", "--store", path).stdout
    assert b"is about thing" not in path.read_bytes()


@pytest.mark.slow
def test_a_killed_chat_goes_on_where_it_was(tmp_path):
    """On the real weights, through a pipe: kill it while it answers, ask again."""
    store = tmp_path / "memory.sqlite"
    command = [sys.executable, "-m", "ocrmem", "chat", str(ROOT / "adapters/smollm2-pp-ocr-2x"), "--store", str(store)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("Tell me a long story about a dog called Bruno.\n")
        process.stdin.flush()
        assert process.stdout.read(1), "the answer has begun"
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    with MemoryStore(store, read_only=True) as opened:
        conversation = opened.find("default")
        assert conversation is not None
        assert opened.messages(conversation)[0].content == "Tell me a long story about a dog called Bruno."
    done = ocrmem(*command[3:], "-q", "What is the dog called?", "--max-new-tokens", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recent_turns"] >= 2
