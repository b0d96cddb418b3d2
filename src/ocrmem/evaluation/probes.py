"""What an evaluation asks: probes made from held-out prose and conversations.

```
[history → compressed] [turns, as text; the last is the question] [assistant: prefix, given | target, scored]
```

Every maker is deterministic in its documents and its seed: the probes of one document depend on that document and the
seed alone (cloze histories also on the other leads), the order of the documents on the seed. Each task has one fixed
wording, unlike in training, so that results stay comparable.

Before a cued recall or cloze question stands one that is answered already, the same for every arm: it shows what form
an answer has. Without it the frozen LLM does not know, whatever text it is given, and the comparison would be of form.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePath
from typing import Literal, TypeVar

import numpy as np
import regex

from ocrmem.data.documents import Document, document_hash
from ocrmem.errors import DataError
from ocrmem.memory.history import history_text, turn_text
from ocrmem.types import Conversation, Message

Task = Literal["reading", "cued-recall", "cloze", "next-turn"]
Source = Literal["prose", "conversations"]
D = TypeVar("D", bound=Document | Conversation)

READING = "Repeat the text above word for word."
"""The question of a reading probe."""
CUED_RECALL = 'Complete the sentence from the {place} above that begins with these words: "{cue}"'
"""The question of a cued recall probe; the place is `text` or `conversation`."""
CLOZE = 'What belongs in the gap in this sentence about {title}? "{sentence}" Give the missing words and nothing else.'
"""The question of a cloze probe."""
PROBES = 4
"""Version of what is asked, kept with the results; 1 asked without the worked examples; before 3, ledger and
recalled text stood in front of the memory; before 4, recalled sentences need not share words with the question, and
the ledger took an eighth."""
GAP = "____"
"""What stands for the fact that a cloze probe asks for."""
CUED_RECALL_EXAMPLE = ("The old lighthouse on the northern cliff", "was built of grey stone by the islanders.")
"""Cue and answer of the question that stands before every cued recall question; its sentence is in no history."""
CLOZE_EXAMPLE = ("Bellmoor Bridge", "It was opened in ____ and carries two lanes of traffic over the river.", "1874")
"""Title, sentence and answer of the question that stands before every cloze question; they are in no history."""
SENTENCE_CHARS = (60, 240)
"""Shortest and longest sentence that a cued recall or cloze probe asks about."""
MIN_FILL = 0.9
"""Least share of the wanted characters that a piece of a longer text has."""
PIECES_TRIED = 8
"""Pieces of one document that are tried for a further cued recall probe."""
LEADS_TRIED = 64
"""Other leads that are tried for one cloze history."""

_SENTENCE_END = regex.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|\n|$")
_ABBREVIATION = regex.compile(
    r"(?:\b(?:\p{L}|Mr|Mrs|Ms|Dr|St|Mt|Jr|Sr|Prof|Gen|Col|Capt|Rev|Gov|Sen|vs|etc|No|vol|ed|ca|cf|e\.g|i\.e))\.\Z"
)
_NAME = r"\p{Lu}[\p{L}\p{M}'’-]{2,}(?: \p{Lu}[\p{L}\p{M}'’-]+)*"
_NUMBER = r"\d[\d,.]*\d"
_FACT = regex.compile(rf"(?:(?<=[\p{{Ll}},;] ){_NAME}|(?<=[ (]){_NUMBER})(?![\w–-]|[.,]\d)")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One question about a history, and the answer that is scored."""

    task: Task
    source: Source
    id: str
    """`document#number`; stable as long as the document, the seed and the sizes asked for are the same."""
    history: str
    """The text that is compressed."""
    turns: tuple[Message, ...]
    """Turns that stay text after the history; the last is the user's."""
    prefix: str = ""
    """Start of the assistant's reply that is given."""
    target: str
    """The rest of the reply, which is scored."""
    query: str
    """What a retriever is asked with."""
    document_hashes: tuple[str, ...]
    """`document_hash` of the whole text of every document in the history."""


@dataclass(frozen=True, eq=False)
class _Text:
    """A document of either source as it is drawn, and where pieces and sentences of it are."""

    source: Source
    id: str
    text: str
    starts: list[int]
    """Characters where a piece may begin, ascending: sentences of prose, turns of conversations."""
    sentences: list[tuple[int, int]]
    """Half-open ranges of whole sentences; none reaches over a line break or from one turn into the next."""


def reading_probes(documents: Sequence[D], *, num_chars: int, n: int, seed: int) -> list[Probe]:
    """Repeat the history word for word.

    Histories are pieces of one document, of 0.9 to 1 times `num_chars` characters, from the start of a sentence or
    turn to a word boundary; those of one document do not overlap. Shorter documents give none.

    Args:
        documents: all prose or all conversations; a conversation is read as `history_text` draws it.
        n: probes at most. A document gives its next one when every other has given as many, or has no more.
    """

    def make(document: D, rng: np.random.Generator) -> Iterator[Probe]:
        text = _as_text(document)
        taken: list[tuple[int, int]] = []
        for start in rng.permutation(text.starts).tolist():
            end = _piece_end(text.text, start, num_chars, math.ceil(MIN_FILL * num_chars))
            if end is None or any(start < other_end and other < end for other, other_end in taken):
                continue
            taken.append((start, end))
            yield Probe(
                task="reading",
                source=text.source,
                id=f"{text.id}#{len(taken) - 1}",
                history=text.text[start:end],
                turns=(Message("user", READING),),
                target=text.text[start:end],
                query=READING,
                document_hashes=(_hash(document),),
            )

    return _spread(documents, make, n=n, seed=seed)


def cued_recall_probes(
    documents: Sequence[D], *, history_chars: int, n: int, seed: int, min_history_chars: int = 512
) -> list[Probe]:
    """Give the second half of a sentence in the history; the question quotes its first half.

    A place in the history is drawn uniformly and the sentence nearest to it taken, among those of 60 to 240
    characters whose first half occurs once in the history. No sentence is asked about twice.

    Args:
        documents: all prose or all conversations.
        history_chars: characters of a history at most; a shorter document is one whole.
        min_history_chars: characters of a history at least, where that is under 0.9 times `history_chars`.
    """
    shortest = min(min_history_chars, math.ceil(MIN_FILL * history_chars))

    def make(document: D, rng: np.random.Generator) -> Iterator[Probe]:
        text = _as_text(document)
        starts = text.starts if len(text.text) > history_chars else text.starts[:1]
        ends = [_piece_end(text.text, start, history_chars, shortest) for start in starts]
        pieces = [(start, end) for start, end in zip(starts, ends, strict=True) if end is not None]
        asked: set[tuple[int, int]] = set()
        tries = 0
        while pieces and tries < PIECES_TRIED:
            tries += 1
            start, end = pieces[int(rng.integers(len(pieces)))]
            if (found := _cue(text, start, end, rng, asked)) is None:
                continue
            (first, last), middle = found
            cue = text.text[first:middle].rstrip()
            place = "text" if text.source == "prose" else "conversation"
            yield Probe(
                task="cued-recall",
                source=text.source,
                id=f"{text.id}#{len(asked)}",
                history=text.text[start:end],
                turns=_after_example(
                    CUED_RECALL.format(place=place, cue=CUED_RECALL_EXAMPLE[0]),
                    CUED_RECALL_EXAMPLE[1],
                    CUED_RECALL.format(place=place, cue=cue),
                ),
                target=text.text[middle:last],
                query=cue,
                document_hashes=(_hash(document),),
            )
            asked.add((first, last))
            tries = 0

    return _spread(documents, make, n=n, seed=seed)


def _after_example(question: str, answer: str, asked: str) -> tuple[Message, ...]:
    return Message("user", question), Message("assistant", answer), Message("user", asked)


def _cue(
    text: _Text, start: int, end: int, rng: np.random.Generator, asked: Collection[tuple[int, int]]
) -> tuple[tuple[int, int], int] | None:
    """A sentence within [start, end) that was not asked about, and where its second half begins."""
    history = text.text[start:end]
    found = [
        (sentence, middle)
        for sentence in text.sentences
        if start <= sentence[0] and sentence[1] <= end and sentence not in asked
        if (middle := _middle(text.text, *sentence)) is not None
        if history.count(text.text[sentence[0] : middle].rstrip()) == 1
    ]
    place = rng.uniform(start, end)
    return min(found, key=lambda item: abs(sum(item[0]) / 2 - place)) if found else None


def _middle(text: str, start: int, end: int) -> int | None:
    """Where the word nearest to the middle begins; None where the sentence is too short or too long."""
    length = end - start
    if not SENTENCE_CHARS[0] <= length <= SENTENCE_CHARS[1]:
        return None
    words = [match.end() for match in regex.finditer(r"\s(?=\S)", text, pos=start, endpos=end)]
    word = min(words, key=lambda word: abs(word - start - length / 2), default=start)
    return word if 0.3 * length < word - start < 0.7 * length else None


def cloze_probes(leads: Sequence[Document], *, history_chars: int, n: int, seed: int) -> list[Probe]:
    """Give the number or name that a sentence from one of several encyclopaedia leads is missing.

    A history is a number of leads in random order, each `title: text`, together at most `history_chars` characters,
    and at least two leads and half of that. The fact is a number of two or more digits, or a capitalised name that
    neither begins the sentence nor has a word of the title; it occurs once in the whole history, upper and lower case
    taken as the same.
    """
    leads = [lead for lead in leads if lead.title.strip() and lead.text.strip()]

    def make(lead: Document, rng: np.random.Generator) -> Iterator[Probe]:
        facts = _facts(lead)
        number = 0
        for index in rng.permutation(len(facts)).tolist():
            (start, end), (fact_start, fact_end) = facts[index]
            chosen = _companions(lead, leads, history_chars, rng)
            history = "".join(map(_lead_line, chosen)).rstrip()
            fact = lead.text[fact_start:fact_end]
            if len(chosen) < 2 or 2 * len(history) < history_chars or history.lower().count(fact.lower()) != 1:
                continue
            sentence = lead.text[start:fact_start] + GAP + lead.text[fact_end:end]
            yield Probe(
                task="cloze",
                source="prose",
                id=f"{lead.id}#{number}",
                history=history,
                turns=_after_example(
                    CLOZE.format(title=CLOZE_EXAMPLE[0], sentence=CLOZE_EXAMPLE[1]),
                    CLOZE_EXAMPLE[2],
                    CLOZE.format(title=lead.title.strip(), sentence=sentence),
                ),
                target=fact,
                query=sentence,
                document_hashes=tuple(map(_hash, chosen)),
            )
            number += 1

    return _spread(leads, make, n=n, seed=seed)


def _facts(lead: Document) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Every fact of a lead that can be asked for: the range of its sentence and its own."""
    title = set(regex.findall(r"\w+", lead.title.lower()))
    return [
        (sentence, match.span())
        for sentence in _sentences(lead.text, 0, len(lead.text))
        if SENTENCE_CHARS[0] <= sentence[1] - sentence[0] <= SENTENCE_CHARS[1]
        for match in _FACT.finditer(lead.text, *sentence)
        if title.isdisjoint(regex.findall(r"\w+", match.group().lower()))
    ]


def _lead_line(lead: Document) -> str:
    return f"{lead.title.strip()}: {lead.text.strip()}\n"


def _companions(lead: Document, leads: Sequence[Document], max_chars: int, rng: np.random.Generator) -> list[Document]:
    """The lead and as many others as fit, in random order."""
    chosen, left = [lead], max_chars - len(_lead_line(lead))
    for index in rng.integers(len(leads), size=LEADS_TRIED).tolist():
        other = leads[index]
        if other not in chosen and len(_lead_line(other)) <= left:
            chosen.append(other)
            left -= len(_lead_line(other))
    return [chosen[index] for index in rng.permutation(len(chosen)).tolist()]


def next_turn_probes(
    conversations: Sequence[Conversation], *, n: int, seed: int, max_history_chars: int, min_history_chars: int,
    recent_turns: int = 8,
) -> list[Probe]:  # fmt: skip
    """Say the assistant's next turn.

    The turns before the last `recent_turns` are the history, its oldest turns left out beyond `max_history_chars`.
    Leading system messages are in neither, for every arm alike.

    Args:
        min_history_chars: turns with less history are not asked for.
        recent_turns: turns that stay text; the last is the user's.
    """

    def make(conversation: Conversation, rng: np.random.Generator) -> Iterator[Probe]:
        messages = conversation.messages
        first = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
        number = 0
        for index in rng.permutation(np.arange(first + recent_turns, len(messages))).tolist():
            reply, question, recent = messages[index], messages[index - 1], index - recent_turns
            if reply.role != "assistant" or question.role != "user" or not reply.content.strip():
                continue
            sizes = accumulate(len(turn_text(message)) for message in reversed(messages[first:recent]))
            kept = sum(size <= max_history_chars for size in sizes)
            history = history_text(messages[recent - kept : recent])
            if len(history) < max(1, min_history_chars):
                continue
            yield Probe(
                task="next-turn",
                source="conversations",
                id=f"{_conversation_id(conversation)}#{number}",
                history=history,
                turns=messages[recent:index],
                target=reply.content,
                query=question.content,
                document_hashes=(_hash(conversation),),
            )
            number += 1

    return _spread(conversations, make, n=n, seed=seed)


def check_not_trained(probes: Sequence[Probe], trained: Collection[str], *, who: str = "adapter") -> None:
    """Refuse probes made of documents that an adapter or a rival was trained on.

    Args:
        trained: `document_hash` of every training document, or its first digits, from the training manifest.
        who: whose manifest it is, for the message.

    Raises:
        DataError: one of the documents is among them.
    """
    lengths = {len(digest) for digest in trained}
    short = frozenset(trained)
    trained = {digest for probe in probes for digest in probe.document_hashes for n in lengths if digest[:n] in short}
    documents = {digest: probe.id.rpartition("#")[0] for probe in reversed(probes) for digest in probe.document_hashes}
    seen = [digest for digest in documents if digest in trained]
    if not seen:
        return
    affected = sum(not trained.isdisjoint(probe.document_hashes) for probe in probes)
    shown = ", ".join(f"{digest[:12]} (in probes of {documents[digest]!r})" for digest in seen[:5])
    raise DataError(
        f"the {who} was trained on {len(seen)} of the {len(documents)} documents of this evaluation, which are in "
        f"{affected} of {len(probes)} probes: {shown}{', …' if len(seen) > 5 else ''}. Evaluate on text that it has "
        "not seen, such as the held-out files of the data sets, or train it again without these documents."
    )


def check_held_out(
    documents: Sequence[Document],
    conversations: Sequence[Conversation],
    trained: Sequence[str],
    *,
    who: str = "adapter",
) -> None:
    """Refuse to evaluate on files that hold a document of the training manifest.

    Args:
        who: whose manifest it is, for the message.

    Raises:
        DataError: some document was trained on.
    """
    whole = [
        Probe(task="reading", source="prose", id=id_, history=text, turns=(), target=text, query="",
              document_hashes=(document_hash(text),))
        for id_, text in (
            *((document.id, document.text) for document in documents),
            *((conversation.source, history_text(conversation.messages)) for conversation in conversations),
        )
    ]  # fmt: skip
    check_not_trained(whole, trained, who=who)


def _hash(document: Document | Conversation) -> str:
    """As in a training manifest, where a conversation's text is that of its history."""
    whole = history_text(document.messages) if isinstance(document, Conversation) else document.text
    return document_hash(whole)


def _conversation_id(conversation: Conversation) -> str:
    """`file.jsonl:12`, without the folder, which differs from machine to machine."""
    return PurePath(conversation.source).name


def _as_text(document: Document | Conversation) -> _Text:
    if isinstance(document, Document):
        sentences = _sentences(document.text, 0, len(document.text))
        return _Text("prose", document.id, document.text, [start for start, _ in sentences], sentences)
    text, starts, sentences = "", [], []
    for message in document.messages:
        starts.append(len(text))
        text += turn_text(message)
        sentences += _sentences(text, len(text) - 1 - len(message.content), len(text) - 1)
    return _Text("conversations", _conversation_id(document), text, starts, sentences)


def _sentences(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Ranges of the sentences in [start, end), without the white space around them.

    A sentence ends at a line break, or at `.`, `!`, `?` or `…` before white space, unless that is the full stop of an
    initial or a common abbreviation, or a lower-case word follows.
    """
    found = []
    for match in _SENTENCE_END.finditer(text, start, end):
        stop = match.end()
        goes_on = text[stop : stop + 1] == " " and text[stop + 1 : stop + 2].islower()
        if match.group() and stop < end and (goes_on or _ABBREVIATION.search(text, start, stop)):
            continue
        sentence = text[start:stop]
        if sentence.strip():
            begin = start + len(sentence) - len(sentence.lstrip())
            found.append((begin, begin + len(sentence.strip())))
        start = stop
    return found


def _piece_end(text: str, start: int, longest: int, shortest: int) -> int | None:
    """The last word boundary that ends a piece from `start` in length; None where there is none."""
    for end in range(min(start + longest, len(text)), start + shortest - 1, -1):
        if not text[end - 1].isspace() and (end == len(text) or text[end].isspace()):
            return end
    return None


def _spread(
    documents: Sequence[D], make: Callable[[D, np.random.Generator], Iterator[Probe]], *, n: int, seed: int
) -> list[Probe]:
    """Probes of documents in random order, one of each and then the next of each, until there are n.

    Every document has random numbers of its own, so that its probes do not change with the documents beside it.
    """
    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    shuffled = [documents[index] for index in order]
    waiting = deque(make(document, np.random.default_rng([seed, int(_hash(document), 16)])) for document in shuffled)
    probes: list[Probe] = []
    while waiting and len(probes) < n:
        maker = waiting.popleft()
        probe = next(maker, None)
        if probe is not None:
            probes.append(probe)
            waiting.append(maker)
    twice = [name for name, count in Counter(probe.id for probe in probes).items() if count > 1]
    if twice:
        raise DataError(f"several documents have the same id, such as {twice[0]!r}. Give each an id of its own.")
    return probes
