"""What the projection learns from: samples drawn from a bank, task by task.

```
[system … memory, exact text] [user: an instruction] [assistant: the labelled answer]
```

Instructions vary, and several tasks share one memory format, so that the projection learns to put the text before the
LLM and not to make it transcribe whatever it is asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import regex

from ocrmem.config.objectives import Stage, share_of
from ocrmem.data.bank import Bank
from ocrmem.errors import ConfigError, DataError
from ocrmem.memory.chat_format import ChatFormat
from ocrmem.training.exact_text import MIN_UNITS, exact_ids
from ocrmem.types import Message

REPEAT = (
    "Repeat the text above.",
    "Repeat the text above word for word.",
    "Write out what stands above, exactly as it is.",
    "What does the text above say? Give it verbatim.",
    "Copy the passage above.",
    "Please transcribe everything above.",
    "Quote the whole text above.",
    "Reproduce the earlier text without changing a word.",
    "Say again exactly what was said before.",
    "Type out the text you were given.",
)
CONTINUE = (
    "Continue the text above.",
    "What comes next? Go on writing.",
    "Write how the text above goes on.",
    "Carry on from where the text stops.",
    "Please continue.",
)
RECALL = (
    'Complete the sentence from the text above that begins with: "{}"',
    'Which words came after "{}"?',
    'How did this go on: "{}"',
    'The text above says "{}". What follows?',
    'Finish this quotation from above: "{}"',
)
CLOZE = (
    'What belongs in the gap? "{}"',
    'Fill in the blank, using the text above: "{}"',
    '"{}" Which word or number is missing? Answer with it alone.',
    'Going by the text above, complete: "{}"',
)
GAP = "____"
CONTINUATION_TOKENS = 96
"""Labelled tokens of a continuation."""
REPLY_TOKENS = 128
"""A longer reply is cut, or where replies are labelled before it, left out."""
QUESTIONS = 4
"""Questions about one memory, one turn each, where the text has so many sentences to ask about."""
RECENT_TURNS = 8
"""Most turns of a conversation that stay text in front of a reply."""
JOINED = 4
"""Most texts of which the memory behind questions is made."""
ATTEMPTS = 8
"""Places tried for a task before another document is drawn."""

_SENTENCE = regex.compile(r"[^\n.!?]{60,240}[.!?\n]")
_FACT = regex.compile(r"(?<=[a-z,;] )(?:\p{Lu}\p{Ll}{2,}(?: \p{Lu}\p{Ll}+)*|\d[\d,.]*\d)(?![\w-])")


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample, its memory still as units of the bank. T positions."""

    task: str
    input_ids_T: np.ndarray
    """int64, placeholders in the places of the memory."""
    labelled_T: np.ndarray
    """bool: positions whose token is a label."""
    units: list[int]
    """The bank's units of its memory, in order."""
    teacher_ids_T: np.ndarray | None = None
    """The same prompt with the text in place of the memory, where the task is distilled."""
    teacher_labelled_T: np.ndarray | None = None


class Frame:
    """What a chat template writes around the memory, the questions and the answers.

    Args:
        bare: an empty system text in place of the template's own, as for a conversation with another one.

    Raises:
        ConfigError: the template does more to a conversation than to join such pieces.
    """

    def __init__(self, chat_format: ChatFormat, *, bare: bool = False) -> None:
        self.chat_format = chat_format
        system = [Message("system", "")] if bare else []
        ask, answer = "PROBE-ask-TEXT", "PROBE-answer-TEXT"
        two = [Message("user", ask), Message("assistant", answer)] * 2
        whole = chat_format.text([*system, *two], add_generation_prompt=False, num_placeholders=1)
        head, _, rest = whole.partition(chat_format.memory_token)
        opening, _, rest = rest.partition(ask)
        between, _, rest = rest.partition(answer)
        turn, _, rest = rest.partition(ask)
        ending = rest.partition(answer)[2]
        prompt = chat_format.text([*system, two[0]], add_generation_prompt=True, num_placeholders=1)
        if prompt != head + chat_format.memory_token + opening + ask + between or not turn.startswith(ending):
            raise ConfigError(
                "the LLM's chat template changes earlier turns when later ones come, so training samples cannot be "
                "joined from pieces. Set tokenizer.chat_template to a plain one, such as ChatML."
            )
        self.head = self.ids(head)
        self.opening, self.between = opening, between
        end_ids = self.ids(ending)
        kept = len(end_ids) - chat_format.num_reply_tail
        self.end, self.end_tail = end_ids[:kept], end_ids[kept:]
        self.next_turn = turn[len(ending) :]

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece."""
        return self.chat_format.ids(text)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - lives as long as the run
    def question(self, text: str, *, first: bool) -> tuple[int, ...]:
        """From the end of the memory, or of an answer, to the start of the next answer."""
        cleaned = self.chat_format.clean(text)
        return tuple(self.ids((self.opening if first else self.next_turn) + cleaned + self.between))


class TaskSampler:
    """Draws samples from a bank.

    Args:
        bank: the corpus.
        frame: the LLM's chat template.
        memory_token_id: the placeholder's id.
    """

    def __init__(self, bank: Bank, frame: Frame, *, memory_token_id: int) -> None:
        self.bank, self.frame, self.memory_token_id = bank, frame, memory_token_id
        self.bare_head = Frame(frame.chat_format, bare=True).head
        shuffled = np.array([document.shuffled for document in bank.documents])
        is_conversation = np.array([bool(document.turns) for document in bank.documents])
        clean = np.array(
            [
                not (bank.token_ids_T[bank.first_token_K[k] : bank.first_token_K[k + 1]] == memory_token_id).any()
                for k in range(len(bank.documents))
            ]
        )
        weights = bank.num_units_K * clean
        self._pools = {
            "all": _cumulated(weights),
            "ordered": _cumulated(weights * ~shuffled),
            "shuffled": _cumulated(weights * shuffled),
            "prose": _cumulated(weights * ~is_conversation * ~shuffled),
        }
        self._cuts = [(k, cut) for (k, cut) in bank.tails if clean[k] and self._replies(k, cut)]
        self._draw: dict[str, Callable[[np.random.Generator, Stage], Sample | None]] = {
            "reconstruction": self._reconstruction,
            "continuation": self._continuation,
            "recall": self._recall,
            "cloze": self._cloze,
            "reply": self._reply,
        }
        if self._pools["all"] is None:
            raise DataError("the corpora hold no text. Give files with documents or conversations.")

    def sample(self, rng: np.random.Generator, stage: Stage) -> Sample:
        """One sample of a stage.

        Raises:
            DataError: none of the stage's tasks can be drawn from the corpora.
        """
        names, shares = share_of(stage.tasks)
        for _ in range(1000):
            task = names[int(rng.choice(len(names), p=shares))]
            sample = self._draw[task](rng, stage)
            if sample is not None:
                return sample
        raise DataError(
            f"the corpora have no text for the tasks {', '.join(names)} with histories of {stage.min_units} to "
            f"{stage.max_units} units: `reply` needs conversations, the others documents that long. Change the tasks "
            "or the corpora."
        )

    def run(self, rng: np.random.Generator, stage: Stage, *, pool: str = "all") -> tuple[int, int, int] | None:
        """A document and a run of its units: (document, first, one past the last).

        Args:
            pool: `all` documents, those `ordered` (not shuffled), those `shuffled`, or `prose`.
        """
        cumulated = self._pools[pool]
        if cumulated is None:
            return None
        document = int(np.searchsorted(cumulated, rng.integers(cumulated[-1]), side="right"))
        length = _log_uniform(rng, stage.min_units, stage.max_units)
        count = int(self.bank.num_units_K[document])
        if count < min(length, stage.min_units):
            return None
        length = min(length, count)
        first = int(rng.integers(count - length + 1))
        return document, first, first + length

    def has(self, pool: str, units: int) -> bool:
        """Whether a document of a pool (see `run`) has so many units."""
        cumulated = self._pools[pool]
        if cumulated is None:
            return False
        inside = np.diff(cumulated, prepend=0) > 0
        return bool((self.bank.num_units_K[inside] >= units).any())

    def _reconstruction(self, rng: np.random.Generator, stage: Stage) -> Sample | None:
        run = self.run(rng, stage)
        if run is None:
            return None
        document, first, stop = run
        question = REPEAT[int(rng.integers(len(REPEAT)))]
        bare = bool(rng.integers(2))
        return self.reconstruction(document, first, stop, question=question, bare=bare)

    def reconstruction(self, document: int, first: int, stop: int, *, question: str, bare: bool = False) -> Sample:
        """Repeat the units [first, stop) of a document."""
        start, end = self._characters(document, first, stop)
        return self._build(
            "reconstruction",
            self.units(document, first, stop),
            [(question, self._text_ids(document, start, end))],
            bare=bare,
        )

    def _continuation(self, rng: np.random.Generator, stage: Stage) -> Sample | None:
        run = self.run(rng, stage, pool="prose")
        if run is None:
            return None
        document, first, stop = run
        start, end = self._characters(document, first, stop)
        first_token, last_token = self.bank.token_range(document, end, len(self.bank.documents[document].text))
        if last_token - first_token < CONTINUATION_TOKENS // 4:
            return None
        cut = last_token - first_token > CONTINUATION_TOKENS
        limit = int(self.bank.token_starts_T[first_token + CONTINUATION_TOKENS]) if cut else 1 << 40
        return self._build(
            "continuation",
            self.units(document, first, stop),
            [(CONTINUE[int(rng.integers(len(CONTINUE)))], self._text_ids(document, end, limit))],
            ends=not cut,
            full_text=self._text_ids(document, start, end),
        )

    def _recall(self, rng: np.random.Generator, stage: Stage) -> Sample | None:
        def ask(text: str, start: int, end: int) -> tuple[str, str] | None:
            words = [match.end() for match in regex.finditer(r"\S+(?= )", text[start:end])]
            middle = [word for word in words if 0.35 * (end - start) < word < 0.65 * (end - start)]
            if not middle:
                return None
            cut = start + middle[int(rng.integers(len(middle)))]
            cue = text[start:cut].strip()
            return RECALL[int(rng.integers(len(RECALL)))].format(cue), text[cut:end].strip()

        return self._questions("recall", rng, stage, ask)

    def _cloze(self, rng: np.random.Generator, stage: Stage) -> Sample | None:
        def ask(text: str, start: int, end: int) -> tuple[str, str] | None:
            facts = list(_FACT.finditer(text, start, end))
            if not facts:
                return None
            fact = facts[int(rng.integers(len(facts)))]
            sentence = text[start : fact.start()] + GAP + text[fact.end() : end]
            return CLOZE[int(rng.integers(len(CLOZE)))].format(sentence.strip()), fact.group()

        return self._questions("cloze", rng, stage, ask)

    def _questions(
        self,
        task: str,
        rng: np.random.Generator,
        stage: Stage,
        ask: Callable[[str, int, int], tuple[str, str] | None],
    ) -> Sample | None:
        """Questions about one text or several, one after the other in the memory."""
        for _ in range(ATTEMPTS):
            drawn = [self.run(rng, stage, pool="ordered") for _ in range(1 + int(rng.integers(JOINED)))]
            units: list[int] = []
            texts: list[str] = []
            sentences: list[tuple[str, int, int]] = []
            for run in drawn:
                if run is None or (units and len(units) + run[2] - run[1] > stage.max_units):
                    continue
                units += self.units(*run)
                text, (start, end) = self.bank.documents[run[0]].text, self._characters(*run)
                texts.append(text[start:end])
                sentences += [(text, *match.span()) for match in _SENTENCE.finditer(text, start, end)]
            order = rng.permutation(len(sentences))[: QUESTIONS * 2]
            turns = [asked for i in order if (asked := ask(*sentences[i])) and asked[1]][:QUESTIONS]
            if turns:
                answers = [
                    (question, self.frame.ids(self.frame.chat_format.clean(answer))) for question, answer in turns
                ]
                units, exact = self._exchanged(rng, stage, units, texts, [question for question, _ in turns])
                return self._build(task, units, answers, exact=exact)
        return None

    def _replies(self, document: int, cut: int) -> list[int]:
        """Numbers of the turns of the assistant, up to `RECENT_TURNS` after the cut, that have a user turn between."""
        turns = self.bank.documents[document].turns
        after = next((i for i, turn in enumerate(turns) if turn[1] >= cut), len(turns))
        return [
            i
            for i in range(after + 1, min(after + RECENT_TURNS, len(turns)))
            if turns[i][0] == "assistant" and turns[i - 1][0] == "user" and turns[i][2] > turns[i][1]
        ]

    def _reply(self, rng: np.random.Generator, stage: Stage) -> Sample | None:
        """The assistant's turns after a cut, every one labelled where the two take turns."""
        if not self._cuts:
            return None
        document, cut = self._cuts[int(rng.integers(len(self._cuts)))]
        before, tail = self.bank.tails[document, cut]
        first = max(0, before - _log_uniform(rng, stage.min_units, stage.max_units))
        units = self.units(document, first, before) + ([tail] if tail >= 0 else [])
        if not units:
            return None
        replies = self._replies(document, cut)
        source = self.bank.documents[document]
        recent = [
            Message("user" if role == "user" else "assistant", source.text[start:end])
            for role, start, end in source.turns
            if start >= cut
        ]
        before_recent = len(source.turns) - len(recent)
        chat_format = self.frame.chat_format
        count = replies[0] - before_recent
        prompt = chat_format.text(recent[:count], add_generation_prompt=True, num_placeholders=1)
        after = prompt.partition(chat_format.memory_token)[2]
        answers = [self.frame.ids(chat_format.clean(recent[reply - before_recent].content)) for reply in replies]
        turns: list[tuple[str | None, Sequence[int]]] = [(None, answers[0][:REPLY_TOKENS])]
        for earlier, reply, answer in zip(replies, replies[1:], answers[1:], strict=False):
            if reply != earlier + 2 or max(len(answers[0]), len(answer)) > REPLY_TOKENS:
                break
            turns.append((recent[reply - before_recent - 1].content, answer))
        start = int(self.bank.unit_start_U[units[0]])
        kept, exact = self._exchanged(rng, stage, units, [source.text[start:cut]], [recent[count - 1].content])
        return self._build(
            "reply",
            kept,
            turns,
            after=self.frame.ids(after),
            ends=len(answers[0]) <= REPLY_TOKENS,
            full_text=self._text_ids(document, start, cut),
            exact=exact,
        )

    def _exchanged(
        self, rng: np.random.Generator, stage: Stage, units: list[int], texts: Sequence[str], questions: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        """The units of a memory and the token ids behind it: for the stage's share of the samples exact text in place
        of the oldest units, recalled for one of the questions."""
        if not stage.exact or len(units) < MIN_UNITS or rng.random() >= stage.exact:
            return units, []
        question = questions[int(rng.integers(len(questions)))]
        chat_format, whole = self.frame.chat_format, self.bank.num_tokens(units)
        exact = exact_ids(texts, question, num_tokens=whole, chat_format=chat_format, rng=rng)
        if not exact:
            return units, []
        num_tokens = self.bank.num_tokens
        enough = (n for n in range(1, len(units)) if whole - num_tokens(units[n:]) >= len(exact))
        left_out = next(enough, None)
        return (units, []) if left_out is None else (units[left_out:], exact)

    def _build(
        self,
        task: str,
        units: list[int],
        turns: Sequence[tuple[str | None, Sequence[int]]],
        *,
        after: Sequence[int] = (),
        ends: bool = True,
        full_text: Sequence[int] | None = None,
        exact: Sequence[int] = (),
        bare: bool = False,
    ) -> Sample:
        """Join the pieces; `after` stands for the questions where the turns have none, `exact` behind the memory, and
        `full_text` for both where the sample is distilled."""
        body: list[int] = []
        labelled: list[bool] = []
        for number, (question, answer) in enumerate(turns):
            asked = after if question is None else self.frame.question(question, first=number == 0)
            closing = list(self.frame.end) if ends else []
            body += [*asked, *answer, *closing]
            labelled += [False] * len(asked) + [True] * (len(answer) + len(closing))
            if number + 1 < len(turns):
                body += self.frame.end_tail
                labelled += [False] * len(self.frame.end_tail)
        head = self.bare_head if bare else self.frame.head
        memory = [self.memory_token_id] * self.bank.num_tokens(units)

        def join(middle: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
            ids = np.array([*head, *middle, *body], dtype=np.int64)
            return ids, np.array([False] * (len(head) + len(middle)) + labelled)

        ids_T, labelled_T = join([*memory, *exact])
        teacher_T, teacher_labelled_T = (None, None) if full_text is None else join(full_text)
        return Sample(task, ids_T, labelled_T, units, teacher_T, teacher_labelled_T)

    def units(self, document: int, first: int, stop: int) -> list[int]:
        """The bank's numbers of the units [first, stop) of a document."""
        begin = int(self.bank.first_unit_K[document])
        return list(range(begin + first, begin + stop))

    def _characters(self, document: int, first: int, stop: int) -> tuple[int, int]:
        begin = int(self.bank.first_unit_K[document])
        return int(self.bank.unit_start_U[begin + first]), int(self.bank.unit_end_U[begin + stop - 1])

    def _text_ids(self, document: int, start: int, end: int) -> list[int]:
        """Token ids of the characters [start, end), white space at both ends left out.

        They are a slice of the document's own ids, but for the first token, which in the document has the space
        before it.
        """
        text = self.bank.documents[document].text
        end = min(end, len(text))
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        first, last = self.bank.token_range(document, start, end)
        if first == last:
            return []
        stop = int(self.bank.token_starts_T[first + 1]) if first + 1 < last else end
        return [*self._piece(text[start:stop].rstrip()), *self.bank.token_ids_T[first + 1 : last].tolist()]

    @functools.lru_cache(maxsize=65536)  # noqa: B019 - lives as long as the run
    def _piece(self, text: str) -> tuple[int, ...]:
        return tuple(self.frame.ids(text))


def _cumulated(weights: np.ndarray) -> np.ndarray | None:
    cumulated = np.cumsum(weights)
    return cumulated if len(cumulated) and cumulated[-1] > 0 else None


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return min(high, int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))
