"""From a training config to its parts: model, processor, data sets, arguments."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import TrainingArguments

from ocrmem.assets.cache import cache_dir
from ocrmem.assets.fetch import asset_names, resolve
from ocrmem.config.loader import from_mapping, nearest
from ocrmem.config.mem import MEMConfig, RivalRecord
from ocrmem.config.objectives import Features
from ocrmem.config.render import RenderSettings
from ocrmem.config.train import TRAINING_DEFAULTS, DataSettings, TrainConfig
from ocrmem.data.conversations import read_conversations
from ocrmem.data.processor import MEMProcessor
from ocrmem.data.samples import MEMDataset
from ocrmem.encoders.base import OCREncoder
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import ConfigError
from ocrmem.memory.features import FeatureStore
from ocrmem.memory.placeholder import choose_memory_token
from ocrmem.model.adapter import load_projection
from ocrmem.model.identity import embedding_weight
from ocrmem.model.llm import load_llm, load_tokenizer, vocabulary_size
from ocrmem.model.mem_model import MEMModel
from ocrmem.training.rivals import RivalEncoder, rival_projection
from ocrmem.types import Conversation

log = logging.getLogger(__name__)


def build_model(config: TrainConfig, *, rival: Features | None = None) -> tuple[MEMModel, MEMProcessor]:
    """Load the frozen parts, make the projection (fresh, or that of `config.adapter`, which may have fewer merged
    pieces, fewer layers after reading, or read no tokens), and the processor.

    Seed torch before the call where a fresh projection must be reproducible.

    Args:
        rival: a projection for a rival of the memory that reads text tokens, with as many memory tokens.
    """
    llm, revision = load_llm(config.llm)
    tokenizer = load_tokenizer(config.llm.name)
    encoder = build_encoder(config.encoder, page=page_settings(config))
    projection, record = config.projection, None
    if rival is not None:
        record = RivalRecord(kind=rival, pieces=projection.pieces, tokens_per_page=encoder.tokens_per_page)
        projection = rival_projection(projection, record)
        encoder = RivalEncoder(encoder, record, embedding_weight(llm).shape[1])
    token, token_id = choose_memory_token(
        tokenizer, memory_token=config.memory_token, vocab_size=embedding_weight(llm).shape[0]
    )
    mem_config = MEMConfig.from_settings(
        encoder=config.encoder,
        page=encoder.page,
        memory=config.memory,
        projection=projection,
        memory_token=token,
        memory_token_id=token_id,
        rival=record,
    )
    model = MEMModel(
        mem_config,
        base_llm_model=llm,
        ocr_embed=encoder,
        llm_name=config.llm.name,
        llm_revision=revision,
        tokenizer=tokenizer,
    )
    if config.adapter is not None:
        load_projection(model, Path(config.adapter), start=True)
    return model, MEMProcessor.from_model(model, tokenizer=tokenizer)


def page_settings(config: TrainConfig) -> RenderSettings | None:
    """The encoder's preset with the config's `page` section on top; None where there is no such section."""
    if not config.page:
        return None
    preset = preset_page(config)
    return from_mapping(RenderSettings, {**dataclasses.asdict(preset), **config.page}, where="page")


def preset_page(config: TrainConfig) -> RenderSettings:
    """The page settings that the config's encoder reads best."""
    encoder: OCREncoder = build_encoder(config.encoder, load_weights=False, device="meta")
    return encoder.page


def build_dataset(path: str, data: DataSettings, processor: MEMProcessor) -> MEMDataset:
    """Read a JSONL file of conversations and make its samples.

    Raises:
        DataError: the file is missing or a line is broken.
        MemoryNeverAppearsError: no prompt in it is long enough for a memory.
    """
    return MEMDataset(read_data(path, data), processor, samples=data.samples, max_reply_tokens=data.max_reply_tokens)


def read_data(path: str, data: DataSettings) -> list[Conversation]:
    """The conversations of a JSONL file that the settings ask for, with a warning where lines are skipped."""
    file = read_conversations(find_data(path), skip_bad_lines=data.skip_bad_lines)
    if file.bad_lines:
        shown = "; ".join(f"line {number}: {reason}" for number, reason in file.bad_lines[:3])
        log.warning("%s: %d broken lines skipped (%s)", path, len(file.bad_lines), shown)
    return file.conversations[: data.max_conversations]


def build_eval_dataset(config: TrainConfig, processor: MEMProcessor) -> Dataset | None:
    """The evaluation samples, `max_eval_samples` of them evenly spread over the file; None where none are wanted."""
    if config.data.eval is None:
        return None
    dataset = build_dataset(config.data.eval, config.data, processor)
    wanted = config.data.max_eval_samples
    if wanted is None or wanted >= len(dataset):
        return dataset
    return Subset(dataset, [index * len(dataset) // wanted for index in range(wanted)])


def find_data(path: str) -> Path:
    """A file path, or `asset/file` where the first part names an asset."""
    first, _, rest = path.partition("/")
    if rest and first in asset_names() and not Path(path).exists():
        return resolve(first) / rest
    return Path(path)


def feature_store(config: TrainConfig) -> FeatureStore:
    """The feature cache that the config names, or the one in the ocrmem cache."""
    return FeatureStore(feature_folder(config))


def feature_folder(config: TrainConfig) -> Path:
    """Where the feature cache of a config is."""
    return Path(config.feature_cache) if config.feature_cache else cache_dir() / "features"


def build_processor(config: TrainConfig) -> MEMProcessor:
    """The processor of a config, with its encoder, and without the LLM's weights: pages do not depend on them."""
    encoder = build_encoder(config.encoder, page=page_settings(config))
    tokenizer = load_tokenizer(config.llm.name)
    memory_token = choose_memory_token(
        tokenizer, memory_token=config.memory_token, vocab_size=vocabulary_size(config.llm.name)
    )
    return MEMProcessor(tokenizer, encoder=encoder, memory=config.memory, memory_token=memory_token)


def training_arguments(config: TrainConfig, **defaults: Any) -> TrainingArguments:
    """The run's `TrainingArguments`.

    Args:
        defaults: values for what the config's `training` section does not set.

    Raises:
        ConfigError: an unknown name (the nearest is given), or a value that transformers refuses.
    """
    known = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    for key, value in config.training.items():
        if key not in known:
            raise ConfigError(f"unknown setting 'training.{key}'. {nearest(key, known)}")
        if isinstance(value, str) and isinstance(known[key].default, (int, float)):  # transformers takes any text
            raise ConfigError(f"training.{key}={value!r}: expected a value like {known[key].default!r}, got text.")
    if "output_dir" in config.training:
        raise ConfigError("set `output_dir` at the top of the config, not in `training`.")
    values = {**TRAINING_DEFAULTS, **defaults, **config.training}
    for key, value in values.items():
        if key.endswith("_strategy") and value is False:  # YAML 1.1 reads a bare `no` as False
            values[key] = "no"
    values.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    if config.objectives.eval_corpora if config.objectives else config.data.eval is not None:
        values.setdefault("eval_strategy", "steps")
    try:
        return TrainingArguments(
            output_dir=config.output_dir, remove_unused_columns=False, prediction_loss_only=True, **values
        )
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"the `training` section was refused by transformers: {error}") from error
