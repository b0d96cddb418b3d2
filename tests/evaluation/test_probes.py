"""Probes from real held-out conversations and a little prose."""

import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ocrmem.assets.fetch import resolve
from ocrmem.data.conversations import read_conversations
from ocrmem.data.documents import Document, document_hash
from ocrmem.errors import DataError
from ocrmem.evaluation.probes import (
    CLOZE,
    CUED_RECALL,
    GAP,
    READING,
    check_not_trained,
    cloze_probes,
    cued_recall_probes,
    next_turn_probes,
    reading_probes,
)
from ocrmem.memory.history import history_text, turn_text
from ocrmem.types import Conversation, Message

HARBOUR = Document(
    "harbour",
    "Harbour",
    "The old harbour of the town was dug by hand, and it took the masons nineteen years to line it with stone. "
    "Dr. Ada Venn kept the first tide tables there, in a notebook that is now in the museum at Leith. "
    "Ships of more than 2,400 tons were turned away until the channel was blasted deeper in the spring of 1871. "
    "It is busy. Nobody knows who paid for the lighthouse on the northern pier, which burned down twice in a decade.\n"
    "Today the basin holds yachts and one museum ship, and the warehouses around it are flats with a view of the sea.",
)
MILL = Document(
    "mill",
    "Mill at Brede",
    "The mill at Brede ground corn for four villages until the railway came and flour could be had for less. "
    "Its wheel is 11 metres across and was cast in one piece at the foundry of Samuel Orme in the next valley. "
    "A fire in 1902 took the roof, and the owner sold the stones to a brewery that wanted them for its yard.",
)
BRIDGE = Document(
    "bridge",
    "Bridge",
    "A rope bridge once crossed the gorge, and a toll of two eggs was asked of everybody who did not live there. "
    "The iron bridge that replaced it was designed by Clara Whitlock, who had built 37 others in the same county.",
)
LEADS = [HARBOUR, MILL, BRIDGE]


@pytest.fixture(scope="module")
def conversations():
    return read_conversations(resolve("chitchat") / "heldout.jsonl").conversations


def by_id(conversations):
    return {conversation.source.rpartition("/")[2]: conversation for conversation in conversations}


def document_of(probe):
    return probe.id.rpartition("#")[0]


def test_reading_of_conversations(conversations):
    probes = reading_probes(conversations, num_chars=1024, n=150, seed=3)
    texts = {name: history_text(c.messages) for name, c in by_id(conversations).items()}
    assert len(probes) == 150 == len({document_of(probe) for probe in probes})
    for probe in probes:
        text = texts[document_of(probe)]
        assert 922 <= len(probe.history) <= 1024
        start = text.index(probe.history)
        assert start == 0 or text[start - 1] == "\n"
        assert probe.history.startswith(("user: ", "assistant: "))
        assert text[start + len(probe.history) :][:1] in ("", " ", "\n")
        assert probe.target == probe.history.strip() == probe.history
        assert probe.turns == (Message("user", READING),)
        assert (probe.prefix, probe.source, probe.task) == ("", "conversations", "reading")
        assert probe.document_hashes == (document_hash(text),)


def test_reading_pieces_of_a_document_do_not_overlap():
    text = HARBOUR.text.replace("\n", " ") + " " + MILL.text
    probes = reading_probes([Document("long", "", text)], num_chars=150, n=99, seed=0)
    spans = sorted((text.index(p.history), text.index(p.history) + len(p.history)) for p in probes)
    assert len(spans) >= 3
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    assert all(text[start - 2 : start] == ". " for start, _ in spans if start)
    assert {probe.source for probe in probes} == {"prose"}


def test_what_is_too_short_gives_no_reading():
    assert reading_probes(LEADS, num_chars=1024, n=5, seed=0) == []
    assert reading_probes([Document("word", "", "x" * 500)], num_chars=300, n=5, seed=0) == []


def test_a_start_of_a_sentence_is_not_an_abbreviation():
    histories = {p.history for seed in range(30) for p in reading_probes([HARBOUR], num_chars=80, n=50, seed=seed)}
    assert any(history.startswith("Dr. Ada Venn") for history in histories)
    assert not any(history.startswith("Ada") for history in histories)


@pytest.mark.parametrize("make", ["reading", "cued", "next"])
def test_probes_depend_on_documents_and_seed_alone(conversations, make):
    def probes(given, seed, n=60):
        if make == "reading":
            return reading_probes(given, num_chars=512, n=n, seed=seed)
        if make == "cued":
            return cued_recall_probes(given, history_chars=1024, n=n, seed=seed)
        return next_turn_probes(given, n=n, seed=seed, max_history_chars=2048, min_history_chars=200)

    given = conversations[:40]
    assert probes(given, 7) == probes(given, 7)
    assert probes(given, 7) != probes(given, 8)
    assert probes(given, 7)[:20] == probes(given, 7, n=20)
    alone = {probe.id: probe for probe in probes(given[:1], 7, n=3)}
    together = {probe.id: probe for probe in probes(given, 7, n=400)}
    assert alone
    assert all(together[name] == probe for name, probe in alone.items())


def test_probes_are_spread_evenly(conversations):
    given = conversations[:30]
    everything = Counter(map(document_of, cued_recall_probes(given, history_chars=1024, n=10**6, seed=0)))
    some = cued_recall_probes(given, history_chars=1024, n=75, seed=0)
    counts = Counter(map(document_of, some))
    assert len(some) == 75
    assert counts.keys() == everything.keys()
    most = max(counts.values())
    assert all(count >= most - 1 or count == everything[name] for name, count in counts.items())


def test_cued_recall_of_conversations(conversations):
    probes = cued_recall_probes(conversations, history_chars=1024, n=400, seed=1)
    assert len(probes) == 400
    messages = {name: [m.content for m in c.messages] for name, c in by_id(conversations).items()}
    for probe in probes:
        sentence = next(probe.query + gap + probe.target for gap in (" ", "\n") if probe.query + gap in probe.history)
        assert sentence in probe.history
        assert any(sentence in content for content in messages[document_of(probe)])
        assert "\n" not in sentence
        assert 60 <= len(sentence) <= 240
        assert 0.3 * len(sentence) <= len(probe.query) <= 0.7 * len(sentence)
        assert probe.history.count(probe.query) == 1
        assert probe.target == probe.target.strip() != ""
        assert 512 <= len(probe.history) <= 1024
        assert probe.turns[-1] == Message("user", CUED_RECALL.format(place="conversation", cue=probe.query))
        assert [turn.role for turn in probe.turns] == ["user", "assistant", "user"]
        assert probe.turns[1].content not in probe.history


def test_cued_sentences_lie_everywhere_in_the_history(conversations):
    probes = cued_recall_probes(conversations, history_chars=1024, n=1000, seed=2)
    places = [(p.history.index(p.query) + len(p.query)) / len(p.history) for p in probes]
    counts = np.histogram(places, bins=5, range=(0, 1))[0]
    assert counts.min() > 120
    assert counts.max() < 280


def test_cued_recall_of_prose_passes_over_a_cue_that_stands_twice():
    probes = cued_recall_probes([HARBOUR], history_chars=2000, n=50, seed=0, min_history_chars=100)
    assert {probe.history for probe in probes} == {HARBOUR.text}
    assert len(probes) == 5 == len({probe.query for probe in probes})
    assert "Dr. Ada Venn" in next(p.query for p in probes if "Venn" in p.query)
    assert "above" in probes[0].turns[0].content
    assert "text" in probes[0].turns[0].content
    first = HARBOUR.text[: HARBOUR.text.index("years")]
    twice = Document("twice", "", f"{HARBOUR.text}\n{first}machines, which cost more than anybody in the town had.")
    cues = {p.query for p in cued_recall_probes([twice], history_chars=2000, n=50, seed=0, min_history_chars=100)}
    assert cues
    assert not any(twice.text.count(cue) > 1 for cue in cues)


def test_cloze():
    probes = cloze_probes(LEADS, history_chars=1400, n=100, seed=0)
    assert {"2,400", "1871", "1902", "11", "Samuel Orme", "Clara Whitlock", "37", "Leith"} <= {p.target for p in probes}
    assert "Ships" not in {p.target for p in probes}
    titles = {lead.id: lead.title for lead in LEADS}
    starts_with_its_lead = set()
    for probe in probes:
        lines = sorted(f"{lead.title}: {lead.text}" for lead in LEADS if f"{lead.title}: {lead.text}" in probe.history)
        assert len(lines) == len(probe.document_hashes) >= 2
        assert sum(map(len, lines)) + len(lines) - 1 == len(probe.history) <= 1400
        assert probe.history.lower().count(probe.target.lower()) == 1
        assert probe.query.count(GAP) == 1
        assert probe.query.replace(GAP, probe.target) in probe.history
        title = titles[document_of(probe)]
        assert f"{title}: " in probe.history
        assert probe.turns[-1] == Message("user", CLOZE.format(title=title, sentence=probe.query))
        assert probe.turns[:2] == probes[0].turns[:2]  # the same worked example before every question
        assert not set(title.lower().split()) & set(probe.target.lower().split())
        starts_with_its_lead.add(probe.history.startswith(title))
    assert starts_with_its_lead == {True, False}
    assert {h for p in probes for h in p.document_hashes} == {document_hash(lead.text) for lead in LEADS}


def test_cloze_asks_for_nothing_that_stands_elsewhere_too():
    other = Document(
        "other", "Other", "In 1871 nobody in the valley had heard of Samuel Orme, who was 37 years old then."
    )
    probes = cloze_probes([HARBOUR, MILL, BRIDGE, other], history_chars=1800, n=100, seed=0)
    with_other = [probe for probe in probes if "Other: " in probe.history]
    assert with_other
    assert not {"1871", "Samuel Orme", "37"} & {p.target for p in with_other if len(p.document_hashes) == 4}


def test_cloze_asks_for_no_name_that_the_title_gives_away():
    def targets(title):
        leads = [HARBOUR, BRIDGE, Document("mill", title, MILL.text)]
        return {probe.target for probe in cloze_probes(leads, history_chars=1400, n=100, seed=0)}

    assert "Samuel Orme" in targets("Old mill")
    assert "Samuel Orme" not in targets("ORME's mill")


def test_next_turns(conversations):
    probes = next_turn_probes(conversations, n=2000, seed=0, max_history_chars=1500, min_history_chars=300)
    assert len(probes) == 2000 == len({probe.id for probe in probes})
    found = by_id(conversations)
    cut = 0
    for probe in probes:
        messages = found[document_of(probe)].messages
        index = next(
            i
            for i in range(8, len(messages))
            if messages[i - 8 : i] == probe.turns and messages[i].content == probe.target
        )
        before = history_text(messages[: index - 8])
        assert messages[index].role == "assistant"
        assert len(probe.turns) == 8
        assert probe.turns[-1] == Message("user", probe.query)
        assert before.endswith(probe.history)
        assert 300 <= len(probe.history) <= 1500
        if probe.history != before:
            cut += 1
            left = before.removesuffix(probe.history)
            newest = max((turn_text(m) for m in messages if left.endswith(turn_text(m))), key=len)
            assert len(newest) + len(probe.history) > 1500
        assert probe.target.strip()
    assert cut > 100


def test_next_turn_passes_over_system_messages_and_empty_replies():
    turns = [Message("system", "be kind"), *[Message("user", f"question {i}") for i in range(3)]]
    conversation = Conversation(
        (*turns, Message("assistant", " "), Message("user", "and now?"), Message("assistant", "now this")),
        "a/b.jsonl:4",
    )
    (probe,) = next_turn_probes([conversation], n=9, seed=0, max_history_chars=99, min_history_chars=1, recent_turns=2)
    assert probe.history == "user: question 0\nuser: question 1\nuser: question 2\n"
    assert (probe.turns, probe.target) == ((Message("assistant", " "), Message("user", "and now?")), "now this")
    assert probe.id == "b.jsonl:4#0"


def test_the_same_id_twice_is_refused():
    with pytest.raises(DataError, match="several documents have the same id, such as 'harbour#0'. Give each an id"):
        reading_probes([HARBOUR, Document("harbour", "", MILL.text)], num_chars=100, n=9, seed=0)


def test_documents_that_were_trained_on_are_refused(conversations):
    probes = cloze_probes(LEADS, history_chars=1400, n=100, seed=0)
    check_not_trained(probes, {document_hash("something else")})
    check_not_trained(probes, [])
    with pytest.raises(DataError) as caught:
        check_not_trained(probes, {document_hash(MILL.text), "0" * 64})
    affected = sum("Brede: " in probe.history for probe in probes)
    assert f"trained on 1 of the 3 documents of this evaluation, which are in {affected} of {len(probes)}" in str(
        caught.value
    )
    assert document_hash(MILL.text)[:12] in str(caught.value)
    assert "Evaluate on text that it has not seen" in str(caught.value)

    probes = reading_probes(conversations, num_chars=256, n=20, seed=0)
    trained = {document_hash(history_text(conversation.messages)) for conversation in conversations}
    with pytest.raises(DataError, match=r"trained on 20 of the 20 documents.*in 20 of 20 probes.*jsonl:\d+'\), …\."):
        check_not_trained(probes, trained)


def test_making_probes_needs_no_torch():
    code = (
        "import sys, ocrmem.evaluation.probes, ocrmem.evaluation.metrics, ocrmem.evaluation.report; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
