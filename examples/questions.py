"""Ask an adapter about text that it never saw: `python examples/questions.py [ADAPTER]`.

Every question is about a history of 512 to 1,024 characters, and is answered three times, greedily: with nothing of the
history, with the memory made of it, and with its full text. Then short texts are read aloud. Questions and texts are
the first ones of a fixed seed, whatever becomes of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

import regex
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ocrmem import MEMModel, MEMProcessor
from ocrmem.assets.fetch import resolve
from ocrmem.data.conversations import read_conversations
from ocrmem.data.documents import read_documents
from ocrmem.errors import OcrmemError
from ocrmem.evaluation.arms import Contexts
from ocrmem.evaluation.metrics import character_error_rate, exact_match, token_f1
from ocrmem.evaluation.probes import check_not_trained, cloze_probes, cued_recall_probes, reading_probes
from ocrmem.evaluation.scoring import Prompt, Scorer, make_prompt
from ocrmem.model.adapter import read_manifest

ADAPTER = Path(__file__).resolve().parent.parent / "adapters" / "smollm2-pp-ocr-2x"
ARMS = {"none": "no memory", "memory": "memory", "full-text": "full text"}
"""What stands for the history, and what people call it."""
ASKED = {
    "cloze": "What belongs in the gap?",
    "cued-recall": "How does the sentence go on?",
}
"""Tasks with a right answer, and their questions in short."""
SEED = 0
HISTORY_CHARS = 1024
QUESTIONS = 5
"""Of each task."""
ANSWER_TOKENS = 48
READ_CHARS = 200
READINGS = 2
"""Texts read aloud, of each source."""
CELL_CHARS = 120
"""Longest answer in a table; the rest is cut."""


def main() -> None:
    """The command: tables for people, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("adapter", nargs="?", type=Path, default=ADAPTER, help="adapter folder; none: the shipped one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    try:
        items = ask(arguments.adapter)
    except OcrmemError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        print(json.dumps(items))
    else:
        show(items, Console(highlight=False))


def ask(adapter: Path) -> list[dict[str, Any]]:
    """Every question with its history, the truth and the three answers.

    Raises:
        DataError: the adapter was trained on one of the texts.
    """
    model = MEMModel.from_pretrained(adapter)
    processor = MEMProcessor.from_model(model)
    documents = read_documents(resolve("wiki-leads") / "heldout.jsonl")
    conversations = read_conversations(resolve("chitchat") / "heldout.jsonl").conversations
    probes = [
        *cloze_probes(documents, history_chars=HISTORY_CHARS, n=QUESTIONS, seed=SEED),
        *cued_recall_probes(conversations, history_chars=HISTORY_CHARS, n=QUESTIONS, seed=SEED),
        *reading_probes(documents, num_chars=READ_CHARS, n=READINGS, seed=SEED),
        *reading_probes(conversations, num_chars=READ_CHARS, n=READINGS, seed=SEED),
    ]
    check_not_trained(probes, read_manifest(adapter).get("documents", ()))
    contexts = Contexts(probes, processor, device=model.device)
    prompts = [
        make_prompt(probe, contexts.context(arm, number), processor.chat_format)
        for number, probe in enumerate(probes)
        for arm in ARMS
    ]
    answers = iter(Scorer(model, processor).answer(prompts, max_new_tokens=[room(prompt) for prompt in prompts]))
    separators = processor.chat_format.separator_tokens(has_system=False)
    return [
        {
            "task": probe.task,
            "question": probe.turns[-1].content,
            "sentence": probe.query,
            "history": probe.history,
            "history_tokens": len(contexts.history_ids[number]),
            "memory_tokens": contexts.budget(number) + separators,
            "truth": probe.target,
            "answers": {arm: next(answers).strip() for arm in ARMS},
        }
        for number, probe in enumerate(probes)
    ]


def room(prompt: Prompt) -> int:
    """Tokens that an answer may have: a fixed number, or more where the truth is longer."""
    return max(ANSWER_TOKENS, len(prompt.target) * 5 // 4)


def of_task(items: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """The items of one task."""
    return [item for item in items if item["task"] == task]


def mean_f1(items: list[dict[str, Any]], arm: str) -> float:
    """Mean token F1 of one arm's answers."""
    return statistics.fmean(token_f1(item["answers"][arm], item["truth"]) for item in items)


def scores(items: list[dict[str, Any]]) -> list[list[str]]:
    """A table, its head first: how many answers of each arm are right, and how near they come."""
    rows = [["", *(f"{task}: {kind}" for task in ASKED for kind in ("right", "token F1"))]]
    for arm, name in ARMS.items():
        row = [name]
        for task in ASKED:
            chosen = of_task(items, task)
            right = sum(exact_match(item["answers"][arm], item["truth"]) for item in chosen)
            row += [f"{right} of {len(chosen)}", f"{mean_f1(chosen, arm):.2f}"]
        rows.append(row)
    return rows


def cost(items: list[dict[str, Any]]) -> str:
    """What the histories would take as text, and what they take as memory."""
    history, memory = (sum(item[key] for item in items) for key in ("history_tokens", "memory_tokens"))
    return (
        f"{len(items)} histories of {history} text tokens in all became {memory} memory tokens, separators included "
        f"({history / memory:.2f} times fewer)."
    )


def short(text: str, longest: int = CELL_CHARS) -> str:
    """On one line, cut at a word."""
    return textwrap.shorten(text, longest, placeholder=" …")


def show(items: list[dict[str, Any]], console: Console) -> None:
    """All of it, on the terminal."""
    for task, question in ASKED.items():
        table = Table("", question, title=f"{task}, greedy answers", title_justify="left")
        for item in of_task(items, task):
            table.add_row("question", escape(item["sentence"]))
            table.add_row("truth", escape(item["truth"]))
            for arm, name in ARMS.items():
                text = item["answers"][arm]
                right = " [green]✓[/green]" if exact_match(text, item["truth"]) else ""
                table.add_row(name, escape(short(text)) + right)
            table.add_section()
        console.print(table)
    head, *rows = scores(items)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(cost(items))
    for item in of_task(items, "reading"):
        table = Table("", escape(item["question"]))
        table.add_row("original", escape(" ".join(item["truth"].split())))
        table.add_row("memory", escape(" ".join(item["answers"]["memory"].split())))
        table.add_row("errors", ", ".join(f"{name} {rate}" for name, rate in error_rates(item).items()))
        console.print(table)


def error_rates(item: dict[str, Any]) -> dict[str, str]:
    """Character error rate of what was read aloud, from the memory and from the full text."""
    return {
        ARMS[arm]: f"{character_error_rate(item['answers'][arm], item['truth']):.0%}" for arm in ("memory", "full-text")
    }


def markdown(items: list[dict[str, Any]]) -> str:
    """All of it, for a report."""
    parts = []
    for task, question in ASKED.items():
        rows = [[question, "truth", *ARMS.values()]]
        for item in of_task(items, task):
            answers = [
                f"**{plain(short(text))}** ✓" if exact_match(text, item["truth"]) else plain(short(text))
                for text in item["answers"].values()
            ]
            rows.append([plain(item["sentence"]), plain(item["truth"]), *answers])
        parts.append(grid(rows))
    parts += [grid(scores(items)), cost(items)]
    rows = [["read aloud: original", "from the memory", "character error rate", "the same from the full text"]]
    for item in of_task(items, "reading"):
        rows.append([plain(item["truth"]), plain(item["answers"]["memory"]), *error_rates(item).values()])
    parts.append(grid(rows))
    return "\n\n".join(parts)


def grid(rows: list[list[str]]) -> str:
    """A Markdown table, its head first."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def plain(text: str) -> str:
    """Text on one line that Markdown takes as it stands."""
    return regex.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    main()
