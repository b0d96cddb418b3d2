"""What the projection is trained to do: tasks, their mixture, and a curriculum of lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ocrmem.errors import ConfigError

Task = Literal["reconstruction", "continuation", "recall", "cloze", "reply"]
TASKS: tuple[Task, ...] = ("reconstruction", "continuation", "recall", "cloze", "reply")
Features = Literal["ocr", "mean-pooling", "convolution"]
FEATURES: tuple[Features, ...] = ("ocr", "mean-pooling", "convolution")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the curriculum."""

    steps: int
    """Optimizer steps."""
    min_units: int = 1
    """Shortest history, in units of the encoder: lines for `pp-ocr`, pages for an encoder of whole pages."""
    max_units: int
    """Longest history; lengths are drawn log-uniformly between the two."""
    pieces: int | None = None
    """Pieces to one memory token, no more than `projection.pieces`, and a divisor of those of an encoder's unit: less
    compression than at the end, for a start at which the frozen LLM can read what it is given. None: all of them."""
    tasks: dict[str, float] = field(default_factory=lambda: {"reconstruction": 1.0})
    """Shares of the samples and of the loss, by task: `reconstruction` (repeat the text), `continuation` (what
    follows), `recall` (what came after a quoted half sentence), `cloze` (fill a gap), `reply` (an assistant's turn in
    a conversation). They need not add up to 1."""
    distillation: float = 0.0
    """Weight of the KL divergence from the same frozen LLM with the full text, on continuation and reply, as far as
    these texts fit into the teacher's row, a fourth of `packed_length`."""
    exact: float = 0.0
    """Share of the samples of recall, cloze and reply, from 0 to 1, with exact text behind the memory in place of its
    oldest units, as the evaluation has it: identifiers (an eighth of the memory's tokens) and sentences recalled for
    a question (a quarter). A memory of one or two units has none. Above 0 it needs the package bm25s."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"a stage has steps={self.steps}: expected 1 or more.")
        if not 1 <= self.min_units <= self.max_units:
            raise ConfigError(
                f"a stage has min_units={self.min_units} and max_units={self.max_units}: expected 1 or more, and the "
                "first no larger than the second."
            )
        unknown = set(self.tasks) - set(TASKS)
        if unknown:
            raise ConfigError(f"a stage has unknown tasks {sorted(unknown)}; the tasks are {', '.join(TASKS)}.")
        if not any(share > 0 for share in self.tasks.values()) or any(share < 0 for share in self.tasks.values()):
            raise ConfigError(f"a stage has tasks={dict(self.tasks)}: expected shares of 0 or more, one above 0.")
        if self.distillation < 0:
            raise ConfigError(f"a stage has distillation={self.distillation}: expected 0 or more.")
        if not 0 <= self.exact <= 1:
            raise ConfigError(f"a stage has exact={self.exact}: expected a share from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Training on a corpus that was encoded ahead."""

    corpora: tuple[str, ...]
    """JSONL files of documents or conversations; a path whose first part is an asset name is looked up there."""
    eval_corpora: tuple[str, ...] = ()
    """Files for evaluation while training."""
    max_chars: int | None = None
    """Characters taken of each file, from documents spread over it; None: all."""
    lexicon: float = 0.0
    """Further documents for reconstruction, as a share of the characters of corpora and copies, made of random words:
    from the corpora with rare ones as often as the square root of their frequency says, from the LLM's whole
    vocabulary, and figures. What no language model can guess has to be read."""
    shifts: int = 0
    """Copies of the corpora that begin some words or turns later, so that other characters share a memory token."""
    warm_start_steps: int = 300
    """Steps, before the first stage, that bring each memory token near the mean embedding of the text tokens that it
    covers; the LLM does not run."""
    warm_start_weight: float = 1.0
    """Weight of the distance to those embeddings. 0, for a run that goes on from an adapter: learn to read
    (`projection.read_tokens`) alone."""
    warm_start_lexicon: float = 0.0
    """Share of the text that is read without an LLM, from 0 to 1, that is the `lexicon`, beside that which it has of
    all text: so that rare tokens are met as often as common ones. That is the warm start's, and that of
    `reading_tokens`."""
    reading_tokens: int = 0
    """With `projection.read_tokens`: in each step of the LLM so many memory tokens of pages of their own are read, to
    learn to read, and not those of the LLM, whose memory is made of the true tokens either way. So what is read can be
    other text, and there can be less of it. 0: the LLM's own pages are read, as in stages of fewer `pieces`."""
    stages: tuple[Stage, ...]
    """The curriculum, one stage after the other."""
    packed_length: int = 16384
    """Positions of one packed row; a step has `per_device_train_batch_size` of them."""
    features: Features = "ocr"
    """What the projection reads: pages, or for the trained rivals of an evaluation the text tokens themselves,
    averaged (`mean-pooling`) or side by side (`convolution`: kernel and stride are the tokens of one memory token, or
    of one of its `projection.pieces`)."""
    compile: bool = False
    """Compile the LLM's layers, those of the projection and the loss. Pays on a GPU after a minute."""
    features_on_device: bool = False
    """Copy the features of the whole corpus to the GPU: 0.3 MB for 1,000 characters with `pp-ocr`."""
    log_memory_steps: int = 100
    """Every so many steps, log how much of the memory varies within a page, and the loss under a wrong page."""

    def __post_init__(self) -> None:
        if not self.corpora or not self.stages:
            raise ConfigError("objectives need at least one file in `corpora` and one stage in `stages`.")
        if self.features not in FEATURES:
            raise ConfigError(f"objectives.features={self.features!r}: expected one of {', '.join(FEATURES)}.")
        if self.warm_start_weight < 0:
            raise ConfigError(f"objectives.warm_start_weight={self.warm_start_weight}: expected 0 or more.")
        if not 0 <= self.warm_start_lexicon <= 1 or (self.warm_start_lexicon and not self.lexicon):
            raise ConfigError(
                f"objectives.warm_start_lexicon={self.warm_start_lexicon} with lexicon={self.lexicon}: expected a "
                "share from 0 to 1, and a lexicon above 0 to take it from."
            )
        if self.reading_tokens < 0:
            raise ConfigError(f"objectives.reading_tokens={self.reading_tokens}: expected 0 or more.")
        if self.packed_length < 512:
            raise ConfigError(f"objectives.packed_length={self.packed_length}: expected 512 or more positions.")
        if self.warm_start_steps < 0 or self.shifts < 0 or self.log_memory_steps < 1:
            raise ConfigError(
                "objectives: expected warm_start_steps and shifts of 0 or more and log_memory_steps of 1 or more."
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole curriculum."""
        return self.warm_start_steps + sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage | None:
        """The stage of an optimizer step, from 0; None during the warm start. The last stage goes on for ever."""
        step -= self.warm_start_steps
        if step < 0:
            return None
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


def share_of(tasks: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and shares that add up to 1."""
    names = tuple(name for name in TASKS if tasks.get(name, 0) > 0)
    total = sum(tasks[name] for name in names)
    return names, tuple(tasks[name] / total for name in names)
