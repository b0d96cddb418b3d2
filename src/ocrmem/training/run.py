"""One training run, from config to adapter folder; started again, it goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import yaml
from transformers import TrainerCallback, set_seed

from ocrmem import __version__
from ocrmem.config.train import TrainConfig
from ocrmem.data.collator import MEMCollator
from ocrmem.data.documents import document_hash
from ocrmem.data.processor import MEMProcessor
from ocrmem.data.samples import MEMDataset
from ocrmem.errors import ConfigError
from ocrmem.files import write_text
from ocrmem.memory.features import FeatureStore
from ocrmem.memory.history import history_text
from ocrmem.memory.shards import ShardFolder
from ocrmem.model.adapter import default_card, read_manifest
from ocrmem.model.llm import compile_layers
from ocrmem.training.build import (
    build_dataset,
    build_eval_dataset,
    build_model,
    feature_folder,
    feature_store,
    training_arguments,
)
from ocrmem.training.build_objectives import build_objective_trainer
from ocrmem.training.encode import profile_of, warn_of_others
from ocrmem.training.hardware import bfloat16_settings, check_bfloat16
from ocrmem.training.packing import PackedRows
from ocrmem.training.trainer import MEMTrainer, last_checkpoint

log = logging.getLogger(__name__)

CONFIG_FILE = "train_config.yaml"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run gave."""

    adapter: Path
    """The adapter folder."""
    steps: int
    """Optimizer steps done in all, earlier pieces of the run included."""
    resumed_from: int
    """Step at which this piece began; 0 for a fresh run."""
    num_samples: int
    """Training samples in the data set."""
    log_history: list[dict[str, Any]]
    """Trainer's log: losses, learning rates, evaluations."""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**dataclasses.asdict(self), "adapter": str(self.adapter)}


def train(config: TrainConfig, *, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> TrainResult:
    """Train, and write the adapter to `output_dir/adapter`.

    A run that was killed goes on from its last checkpoint when it is started again with the same config, and gives
    bit for bit what it would have given (on the CPU; on a GPU as far as its kernels are deterministic).

    Args:
        resume: go on even though the config differs from that of the run in `output_dir`.
        callbacks: further Trainer callbacks.

    Raises:
        ConfigError: `output_dir` holds a run with other settings.
        MemoryNeverAppearsError: no sample would have a memory.
    """
    run_dir = Path(config.output_dir)
    check_same_run(config, run_dir, resume=resume)
    trainer, train_dataset = (
        build_trainer(config, callbacks=callbacks)
        if config.objectives is None
        else build_objective_trainer(config, callbacks=callbacks)
    )
    model = trainer.model
    checkpoint = last_checkpoint(run_dir)
    resumed_from = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    if trainer.args.should_save:
        write_text(run_dir / CONFIG_FILE, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    adapter = run_dir / ADAPTER_FOLDER
    history = trainer.state.log_history
    weights = {f"proj.{name}": value for name, value in trainer.full_weights().items()}  # by all processes together
    if trainer.args.should_save:
        manifest = training_manifest(train_dataset, config, steps=trainer.state.global_step)
        card = training_card(model.config, config, history)
        model.save_pretrained(adapter, state_dict=weights, model_card=card, manifest=manifest)
    return TrainResult(
        adapter=adapter,
        steps=trainer.state.global_step,
        resumed_from=resumed_from,
        num_samples=len(train_dataset),
        log_history=history,
    )


def build_trainer(config: TrainConfig, *, callbacks: Sequence[TrainerCallback] = ()) -> tuple[MEMTrainer, MEMDataset]:
    """Everything that a run needs, ready to train; seeded, so that a fresh projection is reproducible."""
    arguments = training_arguments(config)
    check_bfloat16(bfloat16_settings(config), arguments.device)
    set_seed(arguments.seed)
    model, processor = build_model(config)
    train_dataset = build_dataset(config.data.train, config.data, processor)
    log.info("training on %s", train_dataset.report)
    model.loss_chunk_size = config.loss_chunk_size
    if config.compile:
        torch._functorch.config.activation_memory_budget = config.compile_memory_budget
        compile_layers(model.base_llm_model)
    trainer = MEMTrainer(
        model,
        arguments,
        train_dataset=train_dataset,
        eval_dataset=build_eval_dataset(config, processor),
        data_collator=MEMCollator(
            processor.pad_token_id,
            pad_to_multiple_of=config.data.pad_to_multiple_of,
            packing=config.data.packing,
            memory_token_id=processor.memory_token_id,
            tokens_per_page=model.ocr_embed.tokens_per_page,
            position_stride=model.position_stride,
        ),
        feature_store=store_of(config, processor),
        gradient_check=config.gradient_check,
        callbacks=list(callbacks),
    )
    return trainer, train_dataset


def store_of(config: TrainConfig, processor: MEMProcessor) -> FeatureStore:
    """The run's feature cache, with a warning where it holds only what another encoder or page setting made."""
    shards = ShardFolder(feature_folder(config), profile_of(config, processor))
    if not shards.count():
        warn_of_others(shards)
    return feature_store(config)


def first_batch(config: TrainConfig) -> tuple[MEMTrainer, dict[str, Any]]:
    """The trainer of a run, and its first training batch as the model takes it."""
    trainer, dataset = build_trainer(config)
    size = min(trainer.args.per_device_train_batch_size, len(dataset))
    samples = [dataset[index] for index in range(size)]
    return trainer, trainer._prepare_inputs(trainer.data_collator(samples))


def check_same_run(config: TrainConfig, run_dir: Path, *, resume: bool) -> None:
    """Refuse to go on in a folder that holds a run with other settings, unless told to."""
    path = run_dir / CONFIG_FILE
    if resume or not path.exists() or last_checkpoint(run_dir) is None:
        return
    old = _flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    new = _flat(json.loads(json.dumps(dataclasses.asdict(config))))
    changes = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]
    if changes:
        raise ConfigError(
            f"{str(run_dir)!r} holds checkpoints of a run with other settings ({'; '.join(changes[:5])}). Give another "
            "output_dir, set the settings back, or pass --resume to go on from its last checkpoint with the new ones."
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        return {k: v for key, value in values.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    if isinstance(values, (list, tuple)):
        values = list(values)
    return {prefix.rstrip("."): values}


def training_manifest(dataset: PackedRows | MEMDataset, config: TrainConfig, *, steps: int) -> dict[str, Any]:
    """What an adapter was trained on: the first 16 hex digits of the hash of every document, and the files' names;
    with those of the adapter that the run started from.

    `ocrmem eval` refuses text whose hash is listed.
    """
    if isinstance(dataset, PackedRows):
        hashes = next(iter(dataset.samplers.values())).bank.hashes()
    else:
        hashes = [document_hash(history_text(conversation.messages)) for conversation in dataset.conversations]
    corpora = (config.data.train,) if config.objectives is None else config.objectives.corpora
    before = read_manifest(Path(config.adapter)) if config.adapter is not None else {}
    return {
        "documents": sorted({*before.get("documents", ()), *(value[:16] for value in hashes)}),
        "corpora": sorted({*before.get("corpora", ()), *corpora}),
        "steps": before.get("steps", 0) + steps,
    }


def training_card(mem_config: Any, config: TrainConfig, history: list[dict[str, Any]]) -> str:
    """The adapter's model card with what was measured while it was trained."""
    trained_on = config.data.train if config.objectives is None else ", ".join(config.objectives.corpora)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    figures = [f"- ocrmem {__version__}, {history[-1]['step'] if history else 0} optimizer steps on `{trained_on}`"]
    if losses:
        figures.append(
            f"- training loss (nats per reply token): {losses[0]:.4f} at the start, {losses[-1]:.4f} at the end"
        )
    if evals:
        held_out = config.data.eval if config.objectives is None else ", ".join(config.objectives.eval_corpora)
        figures.append(f"- loss on `{held_out}`: {evals[0]:.4f} at first, {evals[-1]:.4f} at last")
    measured = "Measured while training:\n\n" + "\n".join(figures)
    return default_card(mem_config).replace(
        "Measured figures: none were recorded when this adapter was saved.", measured
    )
