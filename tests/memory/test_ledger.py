"""The ledger: what pictures lose is found, kept once, newest first, within a budget."""

import time

import pytest
from memory.parts import chitchat, shared_tokenizer

from ocrmem.memory.ledger import Ledger, identifiers

FOUND = [
    ("see https://a.example/c?d=1#e, then", "url", "https://a.example/c?d=1#e"),
    ("on www.example.org/x.", "url", "www.example.org/x"),
    ("mail bob.x+y@ex-am.co.uk today", "email", "bob.x+y@ex-am.co.uk"),
    ("in src/main.py, line", "file", "src/main.py"),
    ("edit /etc/hosts now", "file", "/etc/hosts"),
    ("as report_final.pdf.", "file", "report_final.pdf"),
    (r"under C:\Users\me\x.txt there", "file", r"C:\Users\me\x.txt"),
    ("at 0xDEADbeef it", "hex", "0xDEADbeef"),
    ("commit c96e6ee1 broke", "hex", "c96e6ee1"),
    ("id 550e8400-e29b-41d4-a716-446655440000!", "hex", "550e8400-e29b-41d4-a716-446655440000"),
    ("colour #ff00aa,", "hex", "#ff00aa"),
    ("on 2024-03-01T10:30:00Z it", "date", "2024-03-01T10:30:00Z"),
    ("on March 3rd, 2024 we", "date", "March 3rd, 2024"),
    ("the 24th of december is", "date", "24th of december"),
    ("am 24.12.2023 um", "date", "24.12.2023"),
    ("at 10:30 am sharp", "date", "10:30 am"),
    ("weighs 3.5kg or", "number", "3.5kg"),
    ("costs $4,500.25 net", "number", "$4,500.25"),
    ("about 20% of", "number", "20%"),
    ("a mere 12 monkeys", "number", "12"),
    ("is 10 000 km away", "number", "10 000 km"),
    ("call +1 (202) 555-0143 or", "number", "+1 (202) 555-0143"),
    ("at 192.168.0.1 on", "number", "192.168.0.1"),
    ("loss 1.5e-4 then", "number", "1.5e-4"),
    ("of my_var in", "code", "my_var"),
    ("of camelCase in", "code", "camelCase"),
    ("of torch.nn.functional in", "code", "torch.nn.functional"),
    ("call foo() in", "code", "foo()"),
    ("an RX-480 in", "code", "RX-480"),
    ("pass --no-store to", "code", "--no-store"),
    ("since v1.2.3-rc1 it", "code", "v1.2.3-rc1"),
    ("gate B12 is", "code", "B12"),
    ('said "the quick fox" and', "quote", "the quick fox"),
    ("called ‘x’ and “Project Aurora” there", "quote", "Project Aurora"),
]


@pytest.mark.parametrize(("text", "kind", "expected"), FOUND, ids=[each[2] for each in FOUND])
def test_an_identifier_is_found_exactly(text, kind, expected):
    assert (kind, expected) in list(identifiers(text))


@pytest.mark.parametrize(
    "text",
    [
        "I don't think it's so.",
        "Maybe he may come, novels in march.",
        "a 5 b",
        "Yes--or no--there",
        "well-known, and/or",
    ],
)
def test_plain_words_are_no_identifiers(text):
    assert list(identifiers(text)) == []


@pytest.mark.parametrize("unit", ["a", "a.", "1", "1.", "a@", "/", "A1", "a-", "x_", "'", '"', "0x", "://", "a/b."])
def test_rubbish_takes_no_time(unit):
    started = time.monotonic()
    list(identifiers(unit * (100_000 // len(unit))))
    assert time.monotonic() - started < 3


def count(texts):
    return [len(ids) for ids in shared_tokenizer()(list(texts), add_special_tokens=False)["input_ids"]]


def make_ledger():
    return Ledger(heading="Exact: ", count_tokens=count)


def test_newest_first_and_each_once():
    ledger = make_ledger()
    for text in ("use main.py", "it weighs 3 kg", "again main.py and v1.2.3"):
        ledger.add(text)
    assert ledger.entries == ["v1.2.3", "main.py", "3 kg"]
    assert ledger.text(100) == "Exact: v1.2.3 · main.py · 3 kg"


def test_within_its_budget():
    ledger = make_ledger()
    ledger.add(" ".join(f"file_{n}.txt" for n in range(300)))
    for budget in (0, 3, 10, 50, 200):
        text = ledger.text(budget)
        assert sum(count([text])) <= budget
        assert (text == "") == (budget <= 10)
    assert ledger.text(60).startswith("Exact: file_299.txt · file_298.txt")


def test_it_remembers_no_more_than_any_budget_holds(monkeypatch):
    monkeypatch.setattr("ocrmem.memory.ledger.MAX_ENTRIES", 5)
    ledger = make_ledger()
    ledger.add(" ".join(f"file_{n}.txt" for n in range(9)))
    assert ledger.entries == [f"file_{n}.txt" for n in range(8, 3, -1)]


def test_identifiers_put_into_conversations_are_kept():
    inserted, found = 0, 0
    for conversation, (text, _, expected) in zip(chitchat(len(FOUND)), FOUND, strict=True):
        ledger = make_ledger()
        for number, message in enumerate(conversation.messages):
            ledger.add(f"{message.content} {text}" if number == 3 else message.content)
        inserted += 1
        found += expected in ledger.entries
    assert found / inserted >= 0.95
