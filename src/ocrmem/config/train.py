"""The training config: what `ocrmem train CONFIG.yaml` reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.llm import LLMSettings
from ocrmem.config.loader import from_mapping, load_yaml
from ocrmem.config.memory import MemorySettings
from ocrmem.config.objectives import ObjectiveSettings
from ocrmem.config.projection import ProjectionSettings
from ocrmem.errors import ConfigError


def _word(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as False."""
    return "off" if value is False else value


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The conversations."""

    train: str = "chitchat/train.jsonl"
    """JSONL file, one conversation a line; a path whose first part is an asset name is looked up in that asset."""
    eval: str | None = None
    """JSONL file for evaluation during training; None: no evaluation."""
    max_conversations: int | None = None
    """Read only the first conversations of each file."""
    max_eval_samples: int | None = None
    """Evaluate on this many samples, evenly spread over the file; None: on all."""
    samples: Literal["with_memory", "all"] = "with_memory"
    """`with_memory`: replies whose prompt is long enough to have a memory; the others cannot teach the projection."""
    max_reply_tokens: int = 512
    """A longer reply is cut for training."""
    packing: bool = False
    """Put the samples of a batch into one row, one after the other and none seeing another, in place of padding them to
    the longest. Set `llm.attn_implementation: packed` with it on a GPU, whose kernel passes over what other samples
    hold; other implementations are given a mask."""
    pad_to_multiple_of: int | None = None
    """Round the positions of a batch up to a multiple of this: fewer shapes to compile for. None: no padding beyond the
    longest sample."""
    skip_bad_lines: bool = False
    """Count and report broken lines instead of stopping at the first."""

    def __post_init__(self) -> None:
        if self.max_reply_tokens < 1:
            raise ConfigError(f"data.max_reply_tokens={self.max_reply_tokens}: expected 1 or more.")
        for name in ("max_conversations", "max_eval_samples", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}={value}: expected 1 or more, or null.")


TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    "accelerator_config": {"non_blocking": True},  # batches are in pinned memory; the host need not wait for the copy
}
"""What ocrmem changes of `transformers.TrainingArguments`' own defaults; `training` in a config overrides both."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    output_dir: str
    """Folder of the run: checkpoints while it runs, the adapter in `adapter/` when it is done."""
    llm: LLMSettings = field(default_factory=LLMSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    page: dict[str, Any] = field(default_factory=dict)
    """Page settings that differ from the encoder's preset (`RenderSettings`)."""
    memory: MemorySettings = field(default_factory=MemorySettings)
    projection: ProjectionSettings = field(default_factory=ProjectionSettings)
    data: DataSettings = field(default_factory=DataSettings)
    objectives: ObjectiveSettings | None = None
    """Tasks on a corpus that is encoded ahead; they take the place of `data`. None: the replies of `data.train`."""
    optimizer: Literal["muon"] | None = None
    """`muon` (with objectives): `torch.optim.Muon` for the projection's matrices and AdamW for the rest. None: what
    `training.optim` names, AdamW by default."""
    adapter: str | None = None
    """Adapter folder to start from; None: a fresh projection. It may have fewer pieces than `projection.pieces`, where
    `projection.merge` is true for both and a piece has the same width: the run begins as that adapter, and the pieces
    that it lacks count nothing until they are learnt, or with `projection.deal_tokens` as much as its last. It may have
    fewer `projection.text_layers` and `projection.merged_layers`, and with as many `projection.num_layers`, for
    `projection.read_tokens`, read none."""
    memory_token: str | None = None
    """Placeholder token; None: a reserved token of the LLM's vocabulary is chosen."""
    gradient_check: Annotated[Literal["error", "warn", "off"], BeforeValidator(_word)] = "error"
    """Check one batch's gradient flow before the first step: stop the run if it cannot learn, warn, or do nothing."""
    compile: bool = False
    """Compile the LLM's layers, which takes a minute on a GPU, then half the time a step and less memory; see
    `objectives.compile` for runs with objectives."""
    compile_memory_budget: float = 1.0
    """With `compile`: share of their activations that layers keep for the backward pass; torch's partitioner chooses
    which. A little below 1, queries and keys are turned and attention is run twice, and a layer keeps a fifth less; 0.7
    repeats a small matrix product too."""
    loss_chunk_size: int | None = 256
    """Labels of a batch whose logits are in memory at a time; null: all. 256 take 0.4 GB with a vocabulary of 150,000.
    Runs with objectives keep all."""
    feature_cache: str | None = None
    """Folder of the feature cache; None: `features/` in the ocrmem cache."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any `transformers.TrainingArguments` field, by its own name."""

    def __post_init__(self) -> None:
        if not 0 < self.compile_memory_budget <= 1:
            raise ConfigError(f"compile_memory_budget={self.compile_memory_budget}: expected more than 0, at most 1.")
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ConfigError(f"loss_chunk_size={self.loss_chunk_size}: expected 1 or more, or null.")
        if self.projection.read_tokens and self.objectives is None and self.adapter is None:
            raise ConfigError(
                f"projection.read_tokens={self.projection.read_tokens} without `objectives` would never learn to read: "
                "that is learnt from the text of the pages, which replies alone do not give. Add `objectives`, name an "
                "`adapter` that reads, or set projection.read_tokens=0."
            )


def load_train_config(path: Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read and check a training config; see `TrainConfig` for the keys."""
    return from_mapping(TrainConfig, load_yaml(path, overrides), where="")
