import json

import pytest
from memory.parts import chitchat_path

from ocrmem.data.conversations import parse_conversation, parse_history, read_conversations
from ocrmem.errors import DataError
from ocrmem.types import Message

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def parse(*messages, **extra):
    return parse_conversation({"messages": list(messages), **extra}, source="chat.jsonl:7")


def message(content="hi", role="user", **extra):
    return {"role": role, "content": content, **extra}


REPLY = message("hello", role="assistant")


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_roles_parts_and_extra_keys():
    conversation = parse(
        message("be brief", role="system"),
        message([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], name="Ann"),
        message("42", role="tool", tool_call_id="x"),
        REPLY,
        id="c1",
        strict=True,
    )
    assert [(m.role, m.content) for m in conversation.messages] == [
        ("system", "be brief"),
        ("user", "one two"),
        ("tool", "42"),
        ("assistant", "hello"),
    ]
    assert conversation.source == "chat.jsonl:7"


@pytest.mark.parametrize(
    "content",
    [
        "\ud800 alone",
        "nul\x00 and bell\x07",
        "\u202eright to left\u2066 isolate",
        "👩‍👩‍👧 family",
        "e\u0301 and Z\u0351\u036b\u0343",
        "",
        "x" * 5_000_000,
    ],
    ids=["surrogate", "controls", "bidi", "emoji", "marks", "nothing", "5MB"],
)
def test_any_content_survives_a_file(tmp_path, content):
    path = write(tmp_path / "a.jsonl", {"messages": [message(content), REPLY]})
    assert read_conversations(path).conversations[0].messages[0].content == content


BAD_VALUES = {
    "list": ([], r"chat.jsonl:7: expected an object \{\"messages\": \[…\]\}, got a list\."),
    "no messages": ({"turns": [], "id": 1}, r'has no "messages"; its keys are \'turns\', \'id\'\.'),
    "messages null": ({"messages": None}, r'"messages" is null, expected a list of messages'),
    "empty": ({"messages": []}, r"chat.jsonl:7: the conversation is empty.*Give at least one message"),
    "no reply": ({"messages": [message(), message()]}, r"none of the 2 messages is by the assistant"),
    "message": ({"messages": ["hi"]}, r"message 0: expected an object .* got the string 'hi'"),
    "no role": (
        {"messages": [{"content": "x"}]},
        r"message 0: no role\. Give one of system, user, assistant, tool",
    ),
    "near role": (
        {"messages": [message(role="asistant")]},
        r"unknown role 'asistant'. Did you mean 'assistant'\?",
    ),
    "other name": ({"messages": [message(role="human")]}, r"unknown role 'human'. Did you mean 'user'\?"),
    "far role": (
        {"messages": [message(role="zzz")]},
        r"unknown role 'zzz'. Known: assistant, system, tool, user",
    ),
    "role number": ({"messages": [message(role=3)]}, r"message 0: unknown role 3\. Known"),
    "role list": ({"messages": [message(role=[])]}, r"message 0: unknown role \[\]\. Known"),
    "null": (
        {"messages": [REPLY, message(None)]},
        r"message 1: content is null, expected a string or a list",
    ),
    "number": ({"messages": [message(4.5)]}, r"message 0: content is the number 4\.5"),
    "boolean": ({"messages": [message(True)]}, r"message 0: content is the boolean true"),
    "object": ({"messages": [message({"text": "x"})]}, r"message 0: content is an object"),
    "no content": ({"messages": [{"role": "user"}]}, r"message 0: no content\. Give a string"),
    "image": (
        {"messages": [message([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": "y"}])]},
        r"message 0: content part 1 is of type 'image_url', expected \{\"type\": \"text\"",
    ),
    "part": ({"messages": [message(["x"])]}, r"content part 0 is the string 'x'"),
    "key": (
        {"messages": [message(tool_calls=[])]},
        r"unknown key 'tool_calls'. Did you mean 'tool_call_id'\?.*Tool calls",
    ),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_value(name):
    value, match = BAD_VALUES[name]
    with pytest.raises(DataError, match=match):
        parse_conversation(value, source="chat.jsonl:7")


def test_a_prompt_needs_no_reply():
    value = {"messages": [message()]}
    assert parse_conversation(value, source="x", require_reply=False).messages == (Message("user", "hi"),)


BAD_LINES = {
    "json": (b'{"messages": [}', r"a.jsonl:3: broken JSON at column 15: Expecting value.*--skip-bad-lines"),
    "cut": (b'{"messages": [{"role": "us', r"a.jsonl:3: broken JSON at column 24: Unterminated string"),
    "bytes": (
        b'{"messages": "\xff"}',
        r"a.jsonl:3: byte 15 of the line, 0xFF, is not UTF-8. Save the file as UTF-8",
    ),
    "digits": (b"1" * 5000, r"a.jsonl:3: the JSON cannot be read: Exceeds the limit"),
    "depth": (b"[" * 200_000, r"a.jsonl:3: the JSON cannot be read: .*recursion"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named(tmp_path, name):
    line, match = BAD_LINES[name]
    path = write(tmp_path / "a.jsonl", GOOD, b"", line, GOOD)
    with pytest.raises(DataError, match=match):
        read_conversations(path)


def test_bad_lines_can_be_skipped_and_are_reported(tmp_path):
    path = write(tmp_path / "a.jsonl", b"{", GOOD, b'{"messages": []}', GOOD)
    file = read_conversations(path, skip_bad_lines=True)
    assert [c.source for c in file.conversations] == [f"{path}:2", f"{path}:4"]
    assert [number for number, _ in file.bad_lines] == [1, 3]
    assert file.bad_lines[0][1].startswith("broken JSON at column 2")
    assert file.bad_lines[1][1].startswith("the conversation is empty")


def test_nothing_but_bad_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", b"{", b"}")
    with pytest.raises(DataError, match=r"a.jsonl' has 2 broken lines and nothing else.*first is line 1: broken JSON"):
        read_conversations(path, skip_bad_lines=True)


def test_empty_missing_and_unreadable_file(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl' has no lines; expected one \{\"messages\": \[…\]\} object a line"):
        read_conversations(write(tmp_path / "a.jsonl", b"", b"  "))
    with pytest.raises(DataError, match=r"none.jsonl' cannot be read: No such file or directory. Give the path"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        read_conversations(tmp_path)


def test_byte_order_mark_line_ends_and_limit(tmp_path):
    line = json.dumps(GOOD).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\r\n{broken")
    assert len(read_conversations(path, max_conversations=2).conversations) == 2


def test_chitchat_reads_whole():
    file = read_conversations(chitchat_path())
    assert len(file.conversations) == 2441
    assert not file.bad_lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n", []),
        ("hello\nthere\n", [Message("user", "hello\nthere\n")]),
        ("{x} is a set", [Message("user", "{x} is a set")]),
        (json.dumps(GOOD, indent=2), [Message("user", "hi"), Message("assistant", "hello")]),
        (json.dumps(GOOD) + "\n{broken", [Message("user", "hi"), Message("assistant", "hello")]),
        ('{"messages": [{"role": "user", "content": "hi"}]}', [Message("user", "hi")]),
    ],
)
def test_history(text, expected):
    assert parse_history(text, source="stdin") == expected


def test_bad_history():
    with pytest.raises(DataError, match=r"stdin: the text begins like a JSON object but is broken\. Give one whole"):
        parse_history('{"messages": [', source="stdin")
    with pytest.raises(DataError, match=r'stdin: the object has no "messages"'):
        parse_history('{"a": 1}', source="stdin")
