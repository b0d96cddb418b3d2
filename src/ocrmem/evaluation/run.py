"""`ocrmem eval`: one adapter on held-out text, against its rivals, to one results file."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers

from ocrmem import __version__
from ocrmem.assets.fetch import resolve
from ocrmem.config.objectives import Features
from ocrmem.data.conversations import read_conversations
from ocrmem.data.documents import Document, read_documents
from ocrmem.data.processor import MEMProcessor
from ocrmem.evaluation import metrics, probes
from ocrmem.evaluation.arms import Contexts, arms_left_out
from ocrmem.evaluation.probes import Probe
from ocrmem.evaluation.report import SCALE_ARMS, SCHEMA, check_schema
from ocrmem.evaluation.rivals import RIVALS, Rival, load_rival
from ocrmem.evaluation.scoring import Prompt, Scorer, make_prompt
from ocrmem.evaluation.settings import UNTRAINED, EvalSettings
from ocrmem.model.adapter import read_manifest
from ocrmem.model.mem_model import MEMModel
from ocrmem.model.projection import Projection
from ocrmem.types import Conversation

READING_ROOM = 1.25
"""A greedy reconstruction may have so many times the tokens of its target."""
ANSWERED = ("none", "full-text", "bm25", "memory", "shuffled-memory", *RIVALS)
"""Arms whose answers are generated and read; the others are scored by cross entropy alone."""
LEFT_OUT = (("llmlingua-2", "its model is in no package registry, so it could not be had"),)
"""Arms that no evaluation can have, and why."""

Key = TypeVar("Key")


Rows = list[dict[str, Any]]
Progress = Callable[[str, int, int], None]
"""Takes what is being done, how many are done, and how many there are."""


def evaluate(
    adapter: Path,
    settings: EvalSettings,
    *,
    rivals: Mapping[Features, Path] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress = lambda *_: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate an adapter folder.

    Args:
        rivals: folders of trained rivals by kind; each is an arm.
        keep: called with the results so far after each length and each task, so that a run that is stopped loses one
            of them at most; and before the first, so that what cannot be kept fails before it is measured.

    Returns:
        The results file's content, by `report.SCHEMA`.

    Raises:
        ConfigError: a rival does not fit the adapter.
        DataError: a probe is made of a document that the adapter or a rival was trained on.
    """
    model = MEMModel.from_pretrained(adapter, device=device)
    if dtype is not None:
        model.base_llm_model.to(dtype)  # pyright: ignore[reportArgumentType] - a dtype, whatever the decorator says
    model.eval()
    processor = MEMProcessor.from_model(model)
    conversations = read_conversations(_file(settings.conversations)).conversations
    documents = read_documents(_file(settings.prose))
    manifest = read_manifest(adapter)
    probes.check_held_out(documents, conversations, manifest.get("documents", ()))
    loaded = [load_rival(kind, folder, model=model) for kind, folder in (rivals or {}).items()]
    for rival in loaded:
        probes.check_held_out(documents, conversations, rival.manifest.get("documents", ()), who=f"rival {rival.kind}")
    left_out = [(kind, "no trained projection was given") for kind in RIVALS if kind not in (rivals or {})]
    run = _Run(model, processor, settings, progress, loaded)
    about = {
        "schema": SCHEMA,
        "probes": probes.PROBES,
        "command": " ".join(["ocrmem", *sys.argv[1:]]),
        "created": datetime.date.today().isoformat(),
        "versions": {
            "ocrmem": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU",
        "seeds": list(settings.seeds),
        "adapter": {"name": adapter.name, "steps": int(manifest.get("steps", 0)), "memory_ratio": 1.0},
        "rivals": [{"arm": rival.kind, "steps": int(rival.manifest.get("steps", 0))} for rival in loaded],
        "reading": [],
        "using": [],
        "mean_gain": [],
        "cost": [],
        "left_out": [
            {"arm": arm, "reason": reason}
            for arm, reason in (*LEFT_OUT, *left_out, *arms_left_out(), *settings.not_asked_for())
        ],
    }

    def results() -> dict[str, Any]:
        about["adapter"]["memory_ratio"] = statistics.fmean(run.ratios) if run.ratios else 1.0
        return check_schema(json.loads(json.dumps(about)), source="results")

    keep(results())
    if "reading" in settings.parts:
        for rows in run.reading(documents, conversations):
            about["reading"] += rows
            keep(results())
    if "using" in settings.parts:
        for rows in run.using(documents, conversations):
            about["using"] += rows
            about["mean_gain"] = run.mean_gains()
            keep(results())
    if "cost" in settings.parts:
        about["cost"] = run.cost(conversations)
    return results()


def _file(path: str) -> Path:
    first, _, rest = path.partition("/")
    return Path(path) if Path(path).exists() or not rest else resolve(first) / rest


class _Run:
    def __init__(
        self,
        model: MEMModel,
        processor: MEMProcessor,
        settings: EvalSettings,
        progress: Progress,
        rivals: Sequence[Rival] = (),
    ) -> None:
        self.rivals = rivals
        self.model, self.processor, self.settings = model, processor, settings
        self.progress = progress
        self.device = next(model.proj.parameters()).device
        self.ratios: list[float] = []
        self.losses: dict[tuple[str, str], dict[str, Any]] = {}
        generator = torch.Generator().manual_seed(settings.seeds[0])
        self.untrained = _untrained(model, generator)

    def reading(self, documents: Sequence[Document], conversations: Sequence[Conversation]) -> Iterator[Rows]:
        """Reconstruction, length by length: teacher-forced accuracy, and of answers greedy errors and identifiers."""
        joined = [_joined(documents, start) for start in range(0, len(documents), 12)]
        for chars in self.settings.reading_chars:
            contexts: dict[str, Contexts] = {}
            prompts: dict[tuple[str, str], list[Prompt]] = {}
            accuracies: dict[tuple[str, str], np.ndarray] = {}
            for source, given in (("prose", documents if chars < 1000 else joined), ("conversations", conversations)):
                make = functools.partial(_reading, given, chars)
                found = self._deal(make, max(1, self.settings.samples // 4))
                if not found:  # no text is that long
                    continue
                contexts[source] = self._contexts(found)
                for arm in ("memory", *contexts[source].rivals, "full-text", "none"):
                    prompts[source, arm] = self._prompts(arm, contexts[source])
                    scorer = self._scorer(f"reading {chars} {source}: {arm}", len(found))
                    _, accuracies[source, arm] = scorer.score(prompts[source, arm])
            asked = {key: chosen for key, chosen in prompts.items() if key[1] != "none"}  # it has nothing to repeat
            answers: dict[tuple[str, str], list[str]] = {}
            if self.settings.answers:
                answers = self._answers(
                    f"reading {chars}: answers", asked, lambda prompt: int(READING_ROOM * len(prompt.target)) + 4
                )
            yield [
                self._read(arm, source, chars, contexts[source], accuracy, answers.get((source, arm), []))
                for (source, arm), accuracy in accuracies.items()
            ]

    def _prompts(self, arm: str, contexts: Contexts) -> list[Prompt]:
        given = [contexts.context(arm, index) for index in range(len(contexts.probes))]
        return [make_prompt(p, c, self.processor.chat_format) for p, c in zip(contexts.probes, given, strict=True)]

    def _answers(
        self, name: str, prompts: Mapping[Key, list[Prompt]], room: Callable[[Prompt], int]
    ) -> dict[Key, list[str]]:
        """Greedy answers of all arms in one call; `room` says how many tokens the answer to a prompt may have."""
        flat = [prompt for chosen in prompts.values() for prompt in chosen]
        answers = iter(self._scorer(name, len(flat)).answer(flat, max_new_tokens=[room(prompt) for prompt in flat]))
        return {key: list(itertools.islice(answers, len(chosen))) for key, chosen in prompts.items()}

    def _read(
        self, arm: str, source: str, chars: int, contexts: Contexts, accuracy: np.ndarray, answers: list[str]
    ) -> dict[str, Any]:
        pairs = list(zip(answers, [probe.target for probe in contexts.probes], strict=True)) if answers else []
        seed = self.settings.seeds[0]
        ratio = statistics.fmean(
            len(ids) / max(1, context.num_tokens + self.separators)
            for ids, context in zip(contexts.history_ids, contexts.memories, strict=True)
        )
        if arm == "memory":
            self.ratios.append(ratio)
        return {
            "source": source,
            "num_chars": chars,
            "arm": arm,
            "ratio": ratio if arm in ("memory", *RIVALS) else 1.0,
            "n": len(contexts.probes),
            "token_accuracy": metrics.mean_interval(accuracy, seed=seed).as_json(),
            "cer": self._interval([metrics.character_error_rate(a, t) for a, t in pairs]),
            "identifier_recall": self._interval([_or_nan(metrics.identifier_recall(a, t)) for a, t in pairs]),
        }

    def _interval(self, values: list[float]) -> dict[str, Any] | None:
        return metrics.mean_interval(values, seed=self.settings.seeds[0]).as_json() if values else None

    @property
    def separators(self) -> int:
        """Tokens of a memory besides its placeholders."""
        return self.processor.chat_format.separator_tokens(has_system=False)

    def using(self, documents: Sequence[Document], conversations: Sequence[Conversation]) -> Iterator[Rows]:
        """Cued recall, cloze questions and the next turn, one after the other, for every arm."""
        s = self.settings
        tasks: list[tuple[str, str, list[Probe]]] = [
            ("cued-recall", "prose", self._deal(lambda n, seed: probes.cued_recall_probes(
                documents, history_chars=s.history_chars, n=n, seed=seed), s.samples)),
            ("cued-recall", "conversations", self._deal(lambda n, seed: probes.cued_recall_probes(
                conversations, history_chars=s.history_chars, n=n, seed=seed), s.samples)),
            ("cloze", "prose", self._deal(lambda n, seed: probes.cloze_probes(
                documents, history_chars=s.history_chars, n=n, seed=seed), s.samples)),
            ("next-turn", "conversations", self._deal(lambda n, seed: probes.next_turn_probes(
                conversations, n=n, seed=seed, max_history_chars=s.history_chars, min_history_chars=512),
                s.next_turn_samples)),
        ]  # fmt: skip
        self.losses = {}
        for task, source, found in tasks:
            if not found:
                continue
            self.progress(f"{task} {source}: contexts", 0, len(found))
            contexts = self._contexts(found)
            self.progress(f"{task} {source}: contexts", len(found), len(found))
            prompts: dict[str, list[Prompt]] = {}
            losses: dict[str, np.ndarray] = {}
            for arm in filter(s.asks_for, (*contexts.arms, UNTRAINED)):
                prompts[arm] = self._prompts("memory" if arm == UNTRAINED else arm, contexts)
                scorer = self._scorer(f"{task} {source}: {arm}", len(found))
                trained = self.model.proj
                if arm == UNTRAINED:
                    self.model.proj = self.untrained
                losses[arm], _ = scorer.score(prompts[arm])
                self.model.proj = trained
            answers: dict[str, list[str]] = {}
            if task != "next-turn" and s.answers:
                asked = {arm: chosen for arm, chosen in prompts.items() if arm in ANSWERED}
                answers = self._answers(f"{task} {source}: answers", asked, lambda _: s.answer_tokens)
            budgets = {arm: statistics.fmean(p.context.num_tokens for p in chosen) for arm, chosen in prompts.items()}
            self.losses[task, source] = losses
            yield [self._row(task, source, arm, found, budgets[arm], losses, answers.get(arm)) for arm in losses]

    def mean_gains(self) -> list[dict[str, Any]]:
        """Mean of G over the tasks that `using` scored, the sources of a task together, for each arm."""
        tasks = list(dict.fromkeys(task for task, _ in self.losses))
        rows = []
        for arm in next(iter(self.losses.values()), ()):
            if arm in SCALE_ARMS:
                continue
            groups = []
            for task in tasks:
                scored = [losses for (of, _), losses in self.losses.items() if of == task]
                none, ours, full = (
                    np.concatenate([losses[name] for losses in scored]) for name in ("none", arm, "full-text")
                )
                groups.append((none, ours, full))
            gain = metrics.mean_gain(groups, seed=self.settings.seeds[0]).as_json()
            rows.append({"arm": arm, "tasks": ", ".join(tasks), "gain": gain})
        return rows

    def _row(
        self,
        task: str,
        source: str,
        arm: str,
        found: list[Probe],
        budget: float,
        losses: dict[str, Any],
        answers: list[str] | None,
    ) -> dict[str, Any]:
        seed = self.settings.seeds[0]
        fixed = arm in SCALE_ARMS
        row: dict[str, Any] = {
            "task": task,
            "source": source,
            "arm": arm,
            "n": len(found),
            "budget_tokens": budget,
            "ce": metrics.mean_interval(losses[arm], seed=seed).as_json(),
            "gain": None
            if fixed
            else metrics.gain_recovered(losses["none"], losses[arm], losses["full-text"], seed=seed).as_json(),
            "ce_over_memory": None
            if arm == "memory"
            else metrics.paired_difference(losses[arm], losses["memory"], seed=seed).as_json(),
            "exact_match": None,
            "token_f1": None,
            "transcribes": None,
        }
        if answers is not None:
            pairs = list(zip(answers, found, strict=True))
            scored = {
                "exact_match": [float(metrics.exact_match(a, p.target)) for a, p in pairs],
                "token_f1": [metrics.token_f1(a, p.target) for a, p in pairs],
                "transcribes": [float(metrics.transcribes(a, p.history, target=p.target)) for a, p in pairs],
            }
            row |= {key: metrics.mean_interval(values, seed=seed).as_json() for key, values in scored.items()}
        return row

    @torch.no_grad()
    def cost(self, conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
        """Medians of what one history of the longest kind costs, part by part, batch 1."""
        chars, repeats = self.settings.history_chars, self.settings.cost_repeats
        (probe,) = probes.next_turn_probes(
            conversations, n=1, seed=0, max_history_chars=chars, min_history_chars=chars // 2
        )
        processor, encoder = self.processor, self.model.ocr_embed
        contexts = Contexts([probe], processor, device=self.device)
        render = self._time(lambda: processor.pages(probe.history), repeats)
        pages = torch.stack([torch.from_numpy(page.image_HW) for page in processor.pages(probe.history)]).to(
            self.device
        )
        encode = self._time(lambda: encoder(pages), repeats)
        rows = []
        for arm, cached in (
            ("memory", False),
            ("memory", True),
            ("full-text", False),
            ("full-text", True),
            ("last-n", False),
        ):
            context = contexts.context(arm, 0)
            prompt = make_prompt(probe, context, processor.chat_format)
            rows.append({
                "arm": arm,
                "tokens": float(len(prompt.ids(processor.memory_token_id, with_target=False))),
                "render_ms": render if arm == "memory" and not cached else 0.0,
                "encode_ms": encode if arm == "memory" and not cached else 0.0,
                "prefill_ms": self._prefill(prompt, repeats, cached_prefix=arm == "full-text" and cached),
                "decode_ms_per_token": self._decode(prompt, repeats),
                "cached": cached,
            })  # fmt: skip
        return rows

    def _prefill(self, prompt: Any, repeats: int, *, cached_prefix: bool) -> float:
        scorer = self._scorer("cost", 0)
        batch = scorer._batch([prompt], with_target=False, pad_left=False)
        embeds = scorer._embeds(batch, [prompt])
        llm = self.model.base_llm_model
        if not cached_prefix:
            return self._time(lambda: llm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1), repeats)
        prefix = len(prompt.before) + len(prompt.context.text_ids)

        def after_prefix(cache: Any) -> None:
            llm(inputs_embeds=embeds[:, prefix:], past_key_values=cache, use_cache=True, logits_to_keep=1)

        def fresh() -> Any:
            return llm(inputs_embeds=embeds[:, :prefix], use_cache=True, logits_to_keep=1).past_key_values

        return self._time(after_prefix, repeats, setup=fresh)

    def _decode(self, prompt: Any, repeats: int) -> float:
        scorer = self._scorer("cost", 0)
        batch = scorer._batch([prompt], with_target=False, pad_left=False)
        llm = self.model.base_llm_model
        cache = llm(inputs_embeds=scorer._embeds(batch, [prompt]), use_cache=True, logits_to_keep=1).past_key_values
        token = batch["input_ids"][:, -1:]
        return self._time(lambda: llm(input_ids=token, past_key_values=cache, use_cache=True), repeats)

    def _time(self, call: Callable[..., Any], repeats: int, *, setup: Callable[[], Any] | None = None) -> float:
        times = []
        for number in range(repeats + 1):
            arguments = () if setup is None else (setup(),)
            self._wait()
            begun = time.perf_counter()
            call(*arguments)
            self._wait()
            if number:  # the first warms up
                times.append((time.perf_counter() - begun) * 1000)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _deal(self, make: Callable[[int, int], list[Probe]], n: int) -> list[Probe]:
        """Probes of the seeds in turn, none twice, until there are n."""
        found: dict[tuple[str, str, str], Probe] = {}
        for dealt in itertools.zip_longest(*(make(n, seed) for seed in self.settings.seeds)):
            for probe in dealt:
                if probe is not None and len(found) < n:
                    found.setdefault((probe.history, probe.query, probe.target), probe)
        return list(found.values())

    def _contexts(self, found: list[Probe]) -> Contexts:
        seed = self.settings.seeds[0]
        return Contexts(found, self.processor, device=self.device, seed=seed, rivals=self.rivals)

    def _scorer(self, name: str, total: int) -> Scorer:
        done = 0
        self.progress(name, done, total)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(name, done, total)

        return Scorer(self.model, self.processor, advance=advance)


def _untrained(model: MEMModel, generator: torch.Generator) -> Projection:
    """A fresh projection of the model's settings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 30, (1,), generator=generator)))
        fresh = Projection(
            model.config.projection_settings,
            feature_width=model.ocr_embed.feature_width,
            embedding_width=model.base_llm_model.config.get_text_config().hidden_size,
            embedding_rms=float(model.proj.embedding_rms),
            embeddings_CD=None if model.proj.reader is None else model.proj.reader.embeddings_CD,
            tokenizer=None if model.proj.reader is None else model.proj.reader.tokenizer,
        )
    return fresh.to(next(model.proj.parameters()).device).requires_grad_(False)


def _joined(documents: Sequence[Document], start: int) -> Document:
    """Twelve documents as one, for histories longer than any of them."""
    group = documents[start : start + 12]
    return Document(group[0].id + "+", group[0].title, "\n".join(document.text for document in group))


def _reading(documents: Any, chars: int, n: int, seed: int) -> list[Probe]:
    return probes.reading_probes(documents, num_chars=chars, n=n, seed=seed)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
