"""Trained rivals of the memory in an evaluation: their projections, and the text tokens that each reads."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ocrmem.config.mem import RivalRecord
from ocrmem.config.objectives import FEATURES, Features
from ocrmem.config.render import RenderSettings
from ocrmem.data.bank import BankDocument, build_bank
from ocrmem.data.processor import MEMProcessor
from ocrmem.errors import AdapterMismatchError, ConfigError
from ocrmem.model.adapter import read_config, read_manifest
from ocrmem.model.mem_model import MEMModel
from ocrmem.model.projection import Projection
from ocrmem.training.objectives import text_features
from ocrmem.training.packing import rival_slots
from ocrmem.training.rivals import RivalEncoder

RIVALS: tuple[Features, ...] = tuple(kind for kind in FEATURES if kind != "ocr")
"""Kinds of trained rivals, which are also the names of their arms."""
KINDS: dict[str, Features] = {kind: kind for kind in RIVALS}
"""The same by what a user writes."""


@dataclass(frozen=True, eq=False)
class Rival:
    """A trained rival."""

    record: RivalRecord
    proj: Projection
    embedding: torch.nn.Module
    """The LLM's input embedding."""
    manifest: dict[str, Any]
    """What it was trained on: `model.adapter.read_manifest`."""

    @property
    def kind(self) -> Features:
        """Its kind, and the name of its arm."""
        return self.record.kind

    def features(self, slots_PVT: torch.Tensor) -> torch.Tensor:
        """features_PVE that its projection reads, of the token ids that `history_slots` gives."""
        return text_features(slots_PVT, self.embedding, self.kind)


def parse_rivals(values: Sequence[str]) -> dict[Features, Path]:
    """Folders by kind, of values `KIND=FOLDER`.

    Raises:
        ConfigError: a value has another form, names no kind of rival, or names one again.
    """
    found: dict[Features, Path] = {}
    for value in values:
        name, _, folder = value.partition("=")
        kind = KINDS.get(name)
        if kind is None or not folder:
            raise ConfigError(f"--rival {value}: expected KIND=FOLDER, with a kind of {', '.join(RIVALS)}.")
        if kind in found:
            raise ConfigError(f"--rival {value}: {kind} was given already, as {str(found[kind])!r}; give it once.")
        found[kind] = Path(folder)
    return found


def load_rival(kind: Features, folder: Path, *, model: MEMModel) -> Rival:
    """The rival in an adapter folder, to be compared with a memory.

    Args:
        model: the memory's, whose LLM and embeddings the rival shares.

    Raises:
        CheckpointError: the folder or a file in it is missing, truncated, or does not fit.
        ConfigError: it is no rival of this kind, or one of another LLM, another page or another number of memory
            tokens than the memory's.
    """
    given = f"--rival {kind}={folder}"
    config = read_config(folder)
    record = config.rival_record
    if record is None or record.kind != kind:
        raise ConfigError(
            f"{given}: that folder holds {'an adapter that reads pages' if record is None else record.kind}, expected "
            f"a trained rival of kind {kind}; train one with objectives.features={kind}."
        )
    page, wanted = config.page_settings, model.ocr_embed.page
    if page != wanted:
        raise ConfigError(
            f"{given}: it was trained on another page than the adapter ({_differences(page, wanted)}), so the two have "
            "other memory tokens. Train it with the adapter's `page` and `encoder`."
        )
    if record.tokens_per_page != model.ocr_embed.tokens_per_page:
        raise ConfigError(
            f"{given}: it has {record.tokens_per_page} memory tokens a page, and the adapter "
            f"{model.ocr_embed.tokens_per_page}; a comparison needs as many. Train it with the adapter's "
            "encoder.settings.steps_per_token."
        )
    stride = config.memory_settings.position_stride
    if stride != model.position_stride:
        raise ConfigError(
            f"{given}: it was trained with memory.position_stride={stride}, and the adapter with "
            f"{model.position_stride}; the prompts of a comparison have one. Train it with the adapter's `memory`."
        )
    llm = model.base_llm_model
    encoder = RivalEncoder(model.ocr_embed, record, llm.config.get_text_config().hidden_size)
    device = next(model.proj.parameters()).device
    try:
        loaded = MEMModel.from_pretrained(folder, base_llm_model=llm, ocr_embed=encoder, device=device)
    except AdapterMismatchError as error:
        raise ConfigError(f"{given}: it does not fit the adapter: {error}") from error
    return Rival(record, loaded.proj, model.get_input_embeddings(), read_manifest(folder))


def _differences(found: RenderSettings | None, wanted: RenderSettings) -> str:
    values = {} if found is None else vars(found)
    names = [name for name, value in vars(wanted).items() if values.get(name) != value]
    return ", ".join(f"{name}={values.get(name)!r} and not {getattr(wanted, name)!r}" for name in names)


def history_slots(
    histories: Sequence[str], rivals: Sequence[Rival], processor: MEMProcessor
) -> dict[str, list[torch.Tensor]]:
    """What each rival reads of each history, by kind: token ids int32 [P, V, tokens], -1 where there is none.

    Pages and memory tokens are those of the memory, and the text tokens are dealt to them as in training.
    """
    if not rivals:
        return {}
    documents = [BankDocument(str(number), history) for number, history in enumerate(histories)]
    with tempfile.TemporaryDirectory() as folder:
        bank = build_bank(
            documents, encoder=processor.encoder, tokenizer=processor.tokenizer, folder=Path(folder), encode=False
        )
    slots: dict[str, list[torch.Tensor]] = {rival.kind: [] for rival in rivals}
    for first, count in zip(bank.first_unit_K, bank.num_units_K, strict=True):
        units_PU = np.full((-(-count // bank.units_per_page), bank.units_per_page), -1, dtype=np.int64)
        units_PU.flat[:count] = np.arange(first, first + count)
        for rival in rivals:
            pieces = rival.record.pieces if rival.record.pieces > 1 else None
            found = rival_slots(bank, units_PU, rival.kind, pieces=pieces)
            slots[rival.kind].append(torch.from_numpy(found))
    return slots
