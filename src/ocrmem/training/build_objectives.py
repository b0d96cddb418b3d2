"""From a training config with objectives to its trainer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback, set_seed

from ocrmem.config.objectives import Stage, share_of
from ocrmem.config.train import TrainConfig
from ocrmem.data.bank import Bank, BankDocument, build_bank
from ocrmem.data.processor import MEMProcessor
from ocrmem.encoders.base import OCREncoder
from ocrmem.encoders.pp_ocr import PPOCREncoder
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import ConfigError, DataError
from ocrmem.memory.recall import load_bm25s
from ocrmem.training.build import build_model, feature_folder, find_data, training_arguments
from ocrmem.training.corpus import lexicon_documents, read_corpora, shifted_documents
from ocrmem.training.objectives import FeatureSource, ObjectiveTrainer
from ocrmem.training.packing import PackedRows, fill
from ocrmem.training.rivals import RivalEncoder
from ocrmem.training.tasks import REPEAT, Frame, Sample, TaskSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EVAL_UNITS = (1, 6)
"""Lengths, in units, at which held-out reconstruction is measured while training."""
EVAL_ROWS = 2
"""Packed rows of each length."""
EVAL_CHARS = 400_000
"""Held-out characters taken of each file for evaluation while training."""


def build_objective_trainer(
    config: TrainConfig, *, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[ObjectiveTrainer, PackedRows]:
    """Everything that a run with objectives needs: the corpora drawn, encoded and tokenised, and the trainer."""
    settings = config.objectives
    assert settings is not None
    # A thread that pins memory while a CUDA graph is captured is refused by CUDA, and ends the run; a row is small.
    unpinned = {"dataloader_pin_memory": False, "accelerator_config": {"non_blocking": False}}
    arguments = training_arguments(config, max_steps=settings.total_steps, per_device_train_batch_size=1, **unpinned)
    set_seed(arguments.seed)
    rival = None if settings.features == "ocr" else settings.features
    model, processor = build_model(config, rival=rival)
    if settings.warm_start_steps and not settings.warm_start_weight and model.proj.reader is None:
        raise ConfigError(
            f"objectives.warm_start_steps={settings.warm_start_steps} with warm_start_weight=0 learns nothing in a "
            "projection that reads no tokens. Set projection.read_tokens (rivals have none), a weight above 0, or no "
            "steps."
        )
    model.to(arguments.device)  # pyright: ignore[reportArgumentType] - a device, whatever the decorator says
    frame = Frame(processor.chat_format)
    encoder = model.ocr_embed.drawn if isinstance(model.ocr_embed, RivalEncoder) else model.ocr_embed

    def bank(paths: Sequence[str], max_chars: int | None) -> Bank:
        with arguments.main_process_first(desc="drawing and encoding the corpora"):
            return corpus_bank(
                config,
                paths,
                encoder=encoder,
                tokenizer=processor.tokenizer,
                max_chars=max_chars,
                device=arguments.device,
                num_workers=arguments.dataloader_num_workers,
            )

    train_bank = bank(settings.corpora, settings.max_chars)
    processor.warn_of_unread("".join(document.text for document in train_bank.documents))
    rows = PackedRows(
        samplers(train_bank, config, frame, processor),
        settings,
        seed=arguments.seed,
        rows_per_step=arguments.world_size * arguments.gradient_accumulation_steps,
        pad_token_id=processor.pad_token_id,
        position_stride=config.memory.position_stride,
        reading_bank=train_bank if model.proj.reader is not None else None,
        dealt=model.config.projection_settings.deal_tokens,
    )
    embedding = model.get_input_embeddings()

    def source(bank: Bank, on_device: bool) -> FeatureSource:
        return FeatureSource(bank, settings.features, embedding=embedding, device=arguments.device, on_device=on_device)

    eval_rows: dict[str, list[dict[str, Any]]] = {}
    eval_source = None
    if settings.eval_corpora:
        eval_chars = min(EVAL_CHARS, max(2000, (settings.max_chars or 10 * EVAL_CHARS) // 10))
        eval_bank = bank(settings.eval_corpora, eval_chars)
        eval_rows = evaluation_rows(samplers(eval_bank, config, frame, processor), rows)
        eval_source = source(eval_bank, settings.features_on_device)
    trainer = ObjectiveTrainer(
        model,
        arguments,
        rows=rows,
        eval_rows=eval_rows,
        settings=settings,
        source=source(train_bank, settings.features_on_device),
        eval_source=eval_source,
        optimizer=config.optimizer,
        gradient_check=config.gradient_check,
        callbacks=list(callbacks),
    )
    return trainer, rows


def samplers(bank: Bank, config: TrainConfig, frame: Frame, processor: MEMProcessor) -> dict[int, TaskSampler]:
    """A sampler for each number of pieces to a memory token that the stages name."""
    assert config.objectives is not None
    if any(stage.exact for stage in config.objectives.stages):
        load_bm25s()  # rather than fail in a loader's process
    whole = config.projection.pieces
    result = {}
    for pieces in {whole, *(stage.pieces or whole for stage in config.objectives.stages)}:
        if not 1 <= pieces <= whole or bank.tokens_per_unit % pieces:
            raise ConfigError(
                f"a stage has pieces={pieces}: expected 1 to projection.pieces={whole}, and a divisor of the "
                f"{bank.tokens_per_unit} pieces of one of the encoder's units."
            )
        result[pieces] = TaskSampler(bank.joined(pieces), frame, memory_token_id=processor.memory_token_id)
    return result


def finest(config: TrainConfig, encoder: OCREncoder) -> OCREncoder:
    """The encoder with one piece of the projection to a memory token: the same features, cut finer."""
    pieces = config.projection.pieces
    if pieces == 1:
        return encoder
    steps = encoder.steps_per_token if isinstance(encoder, PPOCREncoder) else 0
    if not steps or steps % pieces:
        raise ConfigError(
            f"projection.pieces={pieces} needs encoder pp-ocr with a multiple of {pieces} as steps_per_token; the "
            f"encoder is {encoder.name!r} with {steps or 'none'}."
        )
    settings = {**config.encoder.settings, "steps_per_token": steps // pieces}
    finer = build_encoder(dataclasses.replace(config.encoder, settings=settings), page=encoder.page)
    return finer.to(next(encoder.parameters()).device)


def corpus_bank(
    config: TrainConfig,
    paths: Sequence[str],
    *,
    encoder: OCREncoder,
    tokenizer: PreTrainedTokenizerBase,
    max_chars: int | None = None,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> Bank:
    """Corpora drawn, encoded and tokenised as a run of this config needs them; those of training with their
    copies and the lexicon.

    Args:
        paths: `objectives.corpora`, or files for evaluation.
        encoder: with its page, on its device; `finest` is taken of it.
        max_chars: of each file.
    """
    settings = config.objectives
    assert settings is not None
    documents: list[BankDocument] = read_corpora([find_data(path) for path in paths], max_chars=max_chars)
    if paths == settings.corpora:
        documents += shifted_documents(documents, settings.shifts)
        documents += lexicon_documents(documents, tokenizer, settings.lexicon) if settings.lexicon else []
    log.info("%d documents, %d characters", len(documents), sum(len(document.text) for document in documents))
    folder = feature_folder(config)
    return build_bank(
        documents,
        encoder=finest(config, encoder),
        tokenizer=tokenizer,
        folder=folder / "banks",
        device=device,
        num_workers=num_workers,
        encode=settings.features == "ocr",
    )


def evaluation_rows(by_pieces: dict[int, TaskSampler], rows: PackedRows) -> dict[str, list[dict[str, Any]]]:
    """Packed rows of held-out text, always the same: reconstruction at `EVAL_UNITS` units and every number of pieces,
    and each other task of the curriculum at the lengths of the last stage that has it, without exact text. A task or a
    length that the held-out files have no text for, or that does not fit into a row, is left out."""
    whole, stages = max(by_pieces), rows.settings.stages
    wanted: dict[str, tuple[str, int, Stage]] = {}
    for pieces in sorted(by_pieces):
        for units in EVAL_UNITS:
            name = f"reconstruction-{units}" + ("" if pieces == whole else f"-pieces-{pieces}")
            wanted[name] = ("reconstruction", pieces, Stage(steps=1, min_units=units, max_units=units))
    for stage in stages:
        for task in share_of(stage.tasks)[0]:
            if task != "reconstruction":
                wanted[task] = (task, stage.pieces or whole, stage)
    packed = PackedRows(
        by_pieces,
        rows.settings,
        seed=0,
        rows_per_step=1,
        pad_token_id=rows.pad_token_id,
        position_stride=rows.position_stride,
    )
    result: dict[str, list[dict[str, Any]]] = {}
    for name, (task, pieces, stage) in wanted.items():
        found = _held_out_rows(by_pieces[pieces], packed, task, pieces, stage)
        if found:
            result[name] = found
    return result


def _held_out_rows(
    sampler: TaskSampler, packed: PackedRows, task: str, pieces: int, stage: Stage
) -> list[dict[str, Any]]:
    rng = np.random.default_rng([1, stage.min_units])
    length = packed.settings.packed_length

    def draw() -> Sample:
        if task == "reconstruction":
            run = None
            while run is None:
                run = sampler.run(rng, stage)
            return sampler.reconstruction(*run, question=REPEAT[0])
        return dataclasses.replace(sampler.sample(rng, alone), teacher_ids_T=None, teacher_labelled_T=None)

    alone = dataclasses.replace(stage, tasks={task: 1.0}, exact=0.0)
    if not (sampler.bank.num_units_K >= stage.min_units).any():
        return []
    try:
        if len(draw().input_ids_T) > length / 1.2:
            return []
        return [packed.pack(fill(draw, length), pieces) for _ in range(EVAL_ROWS)]
    except DataError as error:
        log.warning("no held-out rows of task %s: %s", task, error)
        return []
