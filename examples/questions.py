"""Ask an adapter about text that it never saw: `python examples/questions.py [ADAPTER]`.

Every question is about a history of 512 to 1,024 characters, and is answered three times, greedily: with nothing of the
history, with the memory made of it, and with its full text. The questions are the first ones of a fixed seed, whatever
their answers are like. Then the adapter reads a short text aloud.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
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

SHIPPED = Path(__file__).resolve().parent.parent / "adapters" / "smollm2-pp-ocr-2x"
ARMS = {"none": "no memory", "memory": "memory", "full-text": "full text"}
HISTORY_CHARS = 1024
QUESTIONS = 5
"""Of each kind."""
ANSWER_TOKENS = 48
READ_CHARS = 200
SEED = 0
CELL_CHARS = 110
"""Longest answer in a table; the rest is cut."""


def main() -> None:
    """The command: tables for people, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("adapter", nargs="?", type=Path, default=SHIPPED, help="adapter folder; none: the shipped one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    try:
        result = ask(arguments.adapter)
    except OcrmemError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result, Console(highlight=False))


def ask(adapter: Path) -> dict[str, Any]:
    """Questions, truths and answers, and what was read aloud.

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
        *reading_probes(documents, num_chars=READ_CHARS, n=1, seed=SEED),
    ]
    check_not_trained(probes, read_manifest(adapter).get("documents", ()))
    contexts = Contexts(probes, processor, device=model.device)
    prompts = [
        make_prompt(probe, contexts.context(arm, number), processor.chat_format)
        for arm in ARMS
        for number, probe in enumerate(probes)
    ]
    answers = iter(Scorer(model, processor).answer(prompts, max_new_tokens=[room(prompt) for prompt in prompts]))
    asked: list[dict[str, Any]] = [
        {
            "task": probe.task,
            "question": probe.turns[-1].content,
            "sentence": probe.query,
            "truth": probe.target,
            "history": probe.history,
            "history_tokens": len(contexts.history_ids[number]),
            "memory_tokens": contexts.budget(number) + processor.chat_format.separator_tokens(has_system=False),
            "answers": {},
        }
        for number, probe in enumerate(probes)
    ]
    for arm in ARMS:
        for item in asked:
            item["answers"][arm] = next(answers).strip()
    return {"adapter": adapter.name, "questions": asked[:-1], "reading": asked[-1]}


def room(prompt: Prompt) -> int:
    """Tokens that an answer may have: the fixed number, or more where the truth is longer."""
    return max(ANSWER_TOKENS, len(prompt.target) + len(prompt.target) // 4)
