"""What a growing memory costs, and whether its store keeps what it promised.

    python benchmarks/memory.py turns       # render + encode + prefill of one turn, at turn 10 and at turn 1,000
    python benchmarks/memory.py kills       # 200 kills at random moments while appending
    python benchmarks/memory.py processes   # 8 processes, one store, 10,000 messages
    python benchmarks/memory.py pages       # BM25 against the LLM's attention: which finds the page of a question
    python benchmarks/memory.py identifiers # identifiers of held-out conversations, with and without the ledger
    python benchmarks/memory.py densities   # what a page at half the width still tells the LLM
    python benchmarks/memory.py budgets     # what a larger budget still tells it, by the age of what is asked

Each writes `benchmarks/results/memory-NAME.json`. A turn is a question and a reply of a held-out encyclopaedia lead,
about 120 tokens together; the timings are CPU seconds of the adapter given by `--adapter`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from ocrmem import __version__
from ocrmem.assets.fetch import resolve
from ocrmem.config.growing import GrowingSettings
from ocrmem.data.conversations import read_conversations
from ocrmem.data.documents import read_documents
from ocrmem.data.processor import MEMProcessor
from ocrmem.evaluation.probes import CUED_RECALL
from ocrmem.files import write_text
from ocrmem.memory.ledger import identifiers
from ocrmem.memory.recall import PageIndex, best
from ocrmem.model.mem_model import MEMModel
from ocrmem.session.memory import Memory
from ocrmem.types import Message

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = {10: 12, 1000: 36}
"""Turns over which the work is averaged, around turn 10 and turn 1,000. It is higher where a page becomes full, and
much higher where the budget is full and the prompt's front changes, which happens about once in a dozen turns."""
REPLY_CHARACTERS = 420
"""Longest reply of a turn."""
BUDGETS = (640, 1024, 2048)
"""Budgets compared; the first is about the smallest that holds four pages."""
AGES = (2, 4, 6, 8, 12, 20, 30)
"""Turns before the last one whose sentences are asked for."""


def turns() -> Iterator[tuple[Message, Message]]:
    """A question and a reply, from one held-out lead after the other, over and over."""
    documents = read_documents(resolve("wiki-leads") / "heldout.jsonl")
    number = 0
    while True:
        for document in documents:
            text = document.text[:REPLY_CHARACTERS].rsplit(" ", 1)[0]
            number += 1
            yield (
                Message("user", f"Question {number}: what do you know about {document.title}?"),
                Message("assistant", text),
            )


class Clock:
    """CPU seconds spent in some functions, by name; other processes on the same cores change them little."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, name: str, owner: Any, attribute: str) -> None:
        """Count the time of a method."""
        function = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started

        setattr(owner, attribute, timed)


def load(adapter: Path) -> tuple[MEMModel, MEMProcessor]:
    """The model in float32, and its processor."""
    model = MEMModel.from_pretrained(adapter, dtype="float32")
    return model, MEMProcessor.from_model(model)


class Talk:
    """A memory that was brought to the turn before the first of a window, and its turns that are measured."""

    def __init__(self, model: MEMModel, processor: MEMProcessor, settings: GrowingSettings, first: int) -> None:
        self.memory = Memory(model, processor, settings=settings)
        self.clock = Clock()
        self.clock.watch("render", self.memory._pages, "append")
        self.clock.watch("encode", self.memory, "_encoded")
        self.clock.watch("prefill", self.memory._reader, "read")
        self.turns = turns()
        for _ in range(first - 3):
            self.memory.extend(next(self.turns))
        for _ in range(2):  # catches up, and warms the caches
            self.turn()

    def turn(self) -> dict[str, float]:
        """Ask, read, and append the reply; seconds by kind, and positions read."""
        question, reply = next(self.turns)
        self.clock.seconds = {}
        self.memory.append(question)
        started = time.perf_counter()
        self.memory.logits()
        whole = time.perf_counter() - started
        seconds = {name: self.clock.seconds.get(name, 0.0) for name in ("render", "encode", "prefill")}
        result = {**seconds, "work": sum(seconds.values()), "whole": whole, "read": float(self.memory.num_read)}
        self.memory.append(reply)
        return result


def measure_turns(arguments: argparse.Namespace) -> dict[str, Any]:
    """The bar: the work of turn 1,000 is at most 1.2 times that of turn 10. The two windows' turns are measured in
    turn, the shorter window again and again, so that a machine that becomes slower slows both."""
    model, processor = load(arguments.adapter)
    settings = GrowingSettings(
        budget_tokens=arguments.budget, ledger_share=arguments.ledger_share, densities=tuple(arguments.densities)
    )
    firsts = {centre: max(centre - window // 2, 6) + 1 for centre, window in WINDOWS.items()}
    talks: dict[int, Talk] = {}
    measured: dict[int, list[dict[str, float]]] = {centre: [] for centre in WINDOWS}
    for _ in range(max(WINDOWS.values())):
        for centre, window in WINDOWS.items():
            if len(measured[centre]) % window == 0:
                talks[centre] = Talk(model, processor, settings, firsts[centre])
            measured[centre].append(talks[centre].turn())
    windows = {
        str(centre): {
            "turns": [firsts[centre], firsts[centre] + WINDOWS[centre] - 1],
            "measured": len(found),
            "mean": {key: statistics.fmean(each[key] for each in found) for key in found[0]},
            "median": {key: statistics.median(each[key] for each in found) for key in found[0]},
            "worst": {key: max(each[key] for each in found) for key in found[0]},
            "prompt_tokens": talks[centre].memory.tokens.total,
            "memory_tokens": talks[centre].memory.tokens.memory,
            "left_out_tokens": talks[centre].memory.tokens.left_out,
        }
        for centre, found in measured.items()
    }
    early, late = windows["10"], windows["1000"]
    return {
        "windows": windows,
        "ratio_of_means": late["mean"]["work"] / early["mean"]["work"],
        "ratio_of_medians": late["median"]["work"] / early["median"]["work"],
    }


def measure_kills(arguments: argparse.Namespace) -> dict[str, Any]:
    """The bar: nothing acknowledged is lost, the file opens, pages and features agree with the text."""
    from session.kills import kill_often

    with tempfile.TemporaryDirectory() as folder:
        return kill_often(Path(folder) / "memory.sqlite", number=arguments.kills)


def measure_processes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The bar: none lost, none doubled, no deadlock."""
    from session import many, postgres

    with tempfile.TemporaryDirectory() as folder:
        result = {"sqlite": many.run(str(Path(folder) / "memory.sqlite"), processes=8, messages=arguments.messages)}
    if postgres.binaries() is not None:
        with postgres.server() as url:
            result["postgresql"] = many.run(url, processes=8, messages=arguments.messages)
    return result


def long_talk(number: int, *, turns_each: int = 8) -> list[tuple[list[Message], list[str]]]:
    """Conversations of several leads each, and the titles whose leads they hold."""
    documents = read_documents(resolve("wiki-leads") / "heldout.jsonl")
    talks = []
    for i in range(number):
        chosen = documents[i * turns_each : (i + 1) * turns_each]
        messages = []
        for document in chosen:
            messages += [Message("user", "Tell me something else."), Message("assistant", document.text[:600])]
        talks.append((messages, [document.title for document in chosen]))
    return talks


def measure_pages(arguments: argparse.Namespace) -> dict[str, Any]:
    """How often the page that holds what is asked for comes first, and among the first two."""
    model, processor = load(arguments.adapter)
    settings = GrowingSettings(budget_tokens=4096, densities=(1.0,), ledger_share=0.0)
    hits: dict[str, list[int]] = {"bm25": [], "attention": [], "attention-sum": [], "chance": []}
    index = PageIndex()
    for messages, titles in long_talk(arguments.samples):
        memory = Memory(model, processor, settings=settings)
        memory.extend(messages)
        for title in titles[:-2:2]:
            question = f"What did you tell me about {title}?"
            prompt = memory.prompt(question)
            texts = [page.text for page in prompt.pages]
            wanted = next((i for i, text in enumerate(texts) if title in text), None)
            if wanted is None or len(texts) < 3:
                continue
            ranked = best(index.scores(texts, question), len(texts))
            attention = memory.page_attention(prompt)
            tokens = torch.tensor([page.num_tokens for page in prompt.pages])
            orders = {
                "bm25": ranked,
                "attention": attention.argsort(descending=True).tolist(),
                "attention-sum": (attention * tokens).argsort(descending=True).tolist(),
                "chance": np.random.default_rng(len(hits["bm25"])).permutation(len(texts)).tolist(),
            }
            for name, order in orders.items():
                hits[name].append(order.index(wanted) if wanted in order else len(texts))
            print(len(hits["bm25"]), {name: ranks[-1] for name, ranks in hits.items()}, file=sys.stderr)
    return {
        name: {
            "questions": len(ranks),
            "first": statistics.fmean(rank == 0 for rank in ranks),
            "first_two": statistics.fmean(rank < 2 for rank in ranks),
        }
        for name, ranks in hits.items()
    }


@torch.no_grad()
def target_nats(memory: Memory, question: str, before: str, target: str) -> tuple[float, bool]:
    """Nats a token of a target behind the reply's given beginning, and whether each of its tokens is the likeliest."""
    processor = memory.processor
    prompt = memory.prompt(question)
    start = processor.chat_format.ids(processor.chat_format.clean(before.rstrip()))
    ids = processor.chat_format.ids(processor.chat_format.clean(" " * (before != before.rstrip()) + target))
    logits = [memory._reader.read([*prompt.slots, *start], memory._features)]
    logits += [memory._reader.step(token) for token in ids[:-1]]
    scores = torch.stack(logits)
    wanted = torch.tensor(ids)
    return float(F.cross_entropy(scores, wanted)), bool((scores.argmax(-1) == wanted).all())


def measure_identifiers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Identifiers of held-out conversations: kept in the ledger; and given back by the LLM, ledger on and off.

    The LLM is asked to repeat a sentence, whose beginning is given up to the identifier; that the identifier comes
    next, each of its tokens the likeliest, counts as given back.
    """
    model, processor = load(arguments.adapter)
    conversations = read_conversations(resolve("chitchat") / "heldout.jsonl").conversations
    kept = shown = total = 0
    exact: dict[str, list[bool]] = {"on": [], "off": []}
    nats: dict[str, list[float]] = {"on": [], "off": []}
    verbatim: dict[str, list[bool]] = {"on": [], "off": []}
    for conversation in conversations:
        if len(exact["on"]) >= arguments.samples:
            break
        messages = list(conversation.messages)
        memories = {}
        for name, share in (("on", arguments.ledger_share), ("off", 0.0)):
            memories[name] = Memory(
                model, processor, settings=GrowingSettings(budget_tokens=arguments.budget, ledger_share=share)
            )
            memories[name].extend(messages)
        prompt = memories["on"].prompt("What was it?")
        if not prompt.pages:
            continue
        history = prompt.split.history
        found = [(message.content, text) for message in history for _, text in identifiers(message.content)]
        if not found:
            continue
        ledger = memories["on"]._ledger.entries
        total += len({text for _, text in found})
        kept += len({text for _, text in found} & set(ledger))
        listed = set(memories["on"]._ledger.shown(prompt.tokens.ledger + 4)) if prompt.ledger else set()
        shown += len({text for _, text in found} & listed)
        for content, text in list(dict.fromkeys(found))[:3]:
            if text not in listed:
                continue
            before = content[: content.index(text)][-80:] if text in content else ""
            question = "Repeat word for word a sentence from earlier in this conversation."
            for name, memory in memories.items():
                loss, right = target_nats(memory, question, f'"{before}', text)
                exact[name].append(right)
                nats[name].append(loss)
                verbatim[name].append(text in memory.prompt(question).text.rpartition(question[:20])[0])
        print(
            len(exact["on"]),
            statistics.fmean(exact["on"] or [0]),
            statistics.fmean(exact["off"] or [0]),
            file=sys.stderr,
        )
    return {
        "conversations_with_memory_identifiers": total,
        "kept_share": kept / max(total, 1),
        "shown_share": shown / max(total, 1),
        **{
            f"ledger_{name}": {
                "asked": len(exact[name]),
                "verbatim_in_prompt": statistics.fmean(verbatim[name]),
                "given_back_exactly": statistics.fmean(exact[name]),
                "nats_a_token": statistics.fmean(nats[name]),
            }
            for name in exact
        },
    }


def measure_densities(arguments: argparse.Namespace) -> dict[str, Any]:
    """Nats a token of the second half of a sentence that stands on a page of each density, its first half given."""
    model, processor = load(arguments.adapter)
    documents = read_documents(resolve("wiki-leads") / "heldout.jsonl")
    nats: dict[str, list[float]] = {"1.0": [], "0.75": [], "0.5": [], "left out": []}
    tokens: dict[str, list[int]] = {name: [] for name in nats}
    for number, document in enumerate(documents[: arguments.samples]):
        memory = Memory(
            model, processor, settings=GrowingSettings(budget_tokens=2048, densities=(1.0, 0.75, 0.5), ledger_share=0.0)
        )
        text = document.text[:900]
        others = " ".join(other.text for other in documents[number + 1 : number + 6])[:2000]
        memory.extend([Message("user", "Tell me something."), Message("assistant", text), Message("user", "Go on.")])
        memory.append(Message("assistant", others))
        sentence = text.partition(". ")[0]
        half = sentence.rfind(" ", 0, len(sentence) // 2)
        if half < 20 or len(sentence) > 300:
            continue
        question = f'Go on with what you said: "{sentence[:half]}'
        prompt = memory.prompt(question)
        if not prompt.pages:
            continue
        for level, name in enumerate(nats):
            pages = list(prompt.pages)
            if name != "left out":
                drawn = memory._pages._renderers[level].pages(text)
                records = [memory._pages._record(level, page, text, 0) for page in drawn]
                memory._features.update({record.key: memory._encoded(record) for record in records})
                pages = records
            else:
                pages = [memory._pages.pages[-1]]
            counts = memory._counts([*memory._messages, Message("user", question)])
            assembled = memory._assembled(counts, pages, "", "")
            ids = processor.chat_format.ids(sentence[half:])
            logits = [memory._reader.read(assembled.slots, memory._features)]
            logits += [memory._reader.step(token) for token in ids[:-1]]
            nats[name].append(float(F.cross_entropy(torch.stack(logits), torch.tensor(ids))))
            tokens[name].append(sum(page.num_tokens for page in pages))
        print(len(nats["1.0"]), {name: round(statistics.fmean(v), 3) for name, v in nats.items()}, file=sys.stderr)
    return {
        name: {
            "samples": len(values),
            "nats_a_token": statistics.fmean(values),
            "tokens": statistics.fmean(tokens[name]),
        }
        for name, values in nats.items()
    }


def measure_budgets(arguments: argparse.Namespace) -> dict[str, Any]:
    """Nats a token of the second half of a sentence, its first half given, by budget and by how many turns ago it was
    said; and how many of these sentences the memory of that budget had left out."""
    model, processor = load(arguments.adapter)
    rows: dict[tuple[int, int], list[tuple[float, bool]]] = {}
    given = turns()
    for number in range(arguments.samples):
        said = [next(given) for _ in range(max(AGES) + 2)]
        features: dict[str, torch.Tensor] = {}
        for budget in BUDGETS:
            settings = GrowingSettings(budget_tokens=budget, ledger_share=arguments.ledger_share)
            memory = Memory(model, processor, settings=settings)
            memory._features = dict(features)  # of pages that another budget has too
            memory.extend([message for turn in said for message in turn])
            for age in AGES:
                sentence = said[-age - 1][1].content.partition(". ")[0]
                half = sentence.rfind(" ", 0, len(sentence) // 2)
                if half < 20:
                    continue
                cue, target = sentence[:half], sentence[half:]
                question = CUED_RECALL.format(place="conversation", cue=cue)
                loss, _ = target_nats(memory, question, "", target)
                pages = "".join(page.text for page in memory.prompt(question).pages)
                rows.setdefault((budget, age), []).append((loss, cue not in pages.replace("\n", " ")))
            features |= memory._features
        means = {
            budget: statistics.fmean(x for (b, _), v in rows.items() if b == budget for x, _ in v) for budget in BUDGETS
        }
        print(number + 1, {budget: round(mean, 3) for budget, mean in means.items()}, file=sys.stderr)
    return {
        "rows": [
            {
                "budget": budget,
                "turns_ago": age,
                "asked": len(found),
                "nats_a_token": statistics.fmean(loss for loss, _ in found),
                "left_out": statistics.fmean(gone for _, gone in found),
            }
            for (budget, age), found in rows.items()
        ]
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "turns": measure_turns,
    "kills": measure_kills,
    "processes": measure_processes,
    "pages": measure_pages,
    "identifiers": measure_identifiers,
    "densities": measure_densities,
    "budgets": measure_budgets,
}


def main() -> None:
    """Run one part and write its file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--adapter", type=Path, default=ROOT / "adapters" / "smollm2-pp-ocr-2x")
    parser.add_argument("--budget", type=int, default=GrowingSettings().tokens)
    parser.add_argument("--densities", type=float, nargs="+", default=list(GrowingSettings().densities))
    parser.add_argument("--ledger-share", type=float, default=GrowingSettings().ledger_share)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    sys.path[0] = str(ROOT / "tests")  # the small model, and what kills and races
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.set_verbosity_error()
    started = time.monotonic()
    measured = PARTS[arguments.part](arguments)
    result = {
        "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        "created": datetime.date.today().isoformat(),
        "versions": {
            "ocrmem": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "where": "2 cores",
        "threads": torch.get_num_threads(),
        "adapter": arguments.adapter.name,
        "seconds": round(time.monotonic() - started, 1),
        **measured,
    }
    write_text(arguments.output / f"memory-{arguments.part}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
