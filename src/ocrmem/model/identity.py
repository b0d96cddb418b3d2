"""Who the frozen parts are: recorded in an adapter, compared when it is loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from transformers import PreTrainedModel

from ocrmem.config.loader import from_mapping
from ocrmem.encoders.base import OCREncoder
from ocrmem.errors import AdapterMismatchError

PROBE_SIZE = 64
"""Embedding values that an adapter records to recognise its LLM."""
PROBE_TOLERANCE = 0.02
"""Relative distance allowed between recorded and found values: bfloat16 rounds at 2^-8 = 0.004."""


def embedding_weight(llm: PreTrainedModel) -> torch.Tensor:
    """The matrix [vocabulary, D] of the LLM's input embeddings."""
    weight = llm.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMIdentity:
    """The frozen LLM, as far as an adapter depends on it."""

    name: str
    """Asset name, hub id or folder from which it was loaded."""
    revision: str
    """Hash or commit of what was loaded, as far as it is known."""
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    embedding_probe: tuple[float, ...]
    """Values of the embedding matrix at fixed, evenly spread places. They survive a change of dtype, and differ
    between models of the same shape."""

    @classmethod
    def of(cls, llm: PreTrainedModel, *, name: str, revision: str) -> LLMIdentity:
        """Read the identity off a loaded LLM."""
        text_config = llm.config.get_text_config()
        weight = embedding_weight(llm)
        probe: tuple[float, ...] = ()
        if not weight.is_meta:
            index = torch.linspace(0, weight.numel() - 1, PROBE_SIZE, dtype=torch.float64).long()
            probe = tuple(weight.detach().reshape(-1)[index.to(weight.device)].float().tolist())
        return cls(
            name=name,
            revision=revision,
            model_type=text_config.model_type,
            hidden_size=text_config.hidden_size,
            num_hidden_layers=text_config.num_hidden_layers,
            vocab_size=text_config.vocab_size,
            embedding_probe=probe,
        )

    def check(self, found: LLMIdentity, *, adapter: str) -> None:
        """Raise unless `found` is the LLM that this identity records."""
        for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            _check_equal("LLM", key, getattr(self, key), getattr(found, key), self.name, found.name, adapter)
        distance = math.dist(self.embedding_probe, found.embedding_probe) if found.embedding_probe else 0.0
        if distance > PROBE_TOLERANCE * math.hypot(*self.embedding_probe):
            raise AdapterMismatchError(
                f"adapter {adapter!r} was made for the LLM {self.name!r} (revision {self.revision}), but the LLM "
                f"given, {found.name!r}, has other weights of the same shape. Load the LLM that the adapter names, "
                "or train an adapter for this one."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderIdentity:
    """The frozen encoder, as far as an adapter depends on it."""

    name: str
    feature_width: int
    tokens_per_page: int
    digest: str
    """`OCREncoder.identity()`: settings, weights and dtype."""

    @classmethod
    def of(cls, encoder: OCREncoder) -> EncoderIdentity:
        """Read the identity off a built encoder."""
        return cls(
            name=encoder.name,
            feature_width=encoder.feature_width,
            tokens_per_page=encoder.tokens_per_page,
            digest=encoder.identity(),
        )

    def check(self, found: EncoderIdentity, *, adapter: str) -> None:
        """Raise unless `found` is the encoder that this identity records, dtype apart."""
        for key in ("name", "feature_width", "tokens_per_page", "digest"):
            _check_equal("encoder", key, getattr(self, key), getattr(found, key), self.name, found.name, adapter)


def _check_equal(
    part: str, key: str, wanted: object, given: object, wanted_name: str, given_name: str, adapter: str
) -> None:
    if wanted != given:
        raise AdapterMismatchError(
            f"adapter {adapter!r} was made for the {part} {wanted_name!r} with {key}={wanted!r}, but the {part} given, "
            f"{given_name!r}, has {key}={given!r}. Load the {part} that the adapter names, or train an adapter for "
            "this one."
        )


def from_config(cls: Any, values: dict[str, Any] | None, *, where: str) -> Any:
    """An identity from an adapter's `config.json`."""
    return from_mapping(cls, values or {}, where=where)


def embedding_rms(llm: PreTrainedModel, *, chunk: int = 8192) -> float:
    """Root mean square of what the embedding layer gives over its vocabulary; 1.0 on the meta device.

    The layer is run, not its weight read, because some (Gemma's) scale their output.
    """
    embedding, weight = llm.get_input_embeddings(), embedding_weight(llm)
    if weight.is_meta:
        return 1.0
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in torch.arange(weight.shape[0], device=weight.device).split(chunk):
            embeds = embedding(ids).float()
            total += float(embeds.square().sum(dtype=torch.float64))
            count += embeds.numel()
    return (total / count) ** 0.5
