"""`MEMConfig`: everything needed to rebuild a `MEMModel` around its frozen parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.loader import from_mapping
from ocrmem.config.memory import MemorySettings
from ocrmem.config.objectives import Features
from ocrmem.config.projection import ProjectionSettings
from ocrmem.config.render import RenderSettings


@dataclass(frozen=True, kw_only=True)
class RivalRecord:
    """What a trained rival of the memory is: `training.rivals` reads it, and an adapter folder records it."""

    kind: Features
    """`mean-pooling` or `convolution`."""
    pieces: int
    """`projection.pieces` of the memory that it rivals: memory tokens of the finest stage to one of the last."""
    tokens_per_page: int
    """Memory tokens of a full page at the last stage, as many as the encoder makes."""


class MEMConfig(PreTrainedConfig):
    """Configuration of a `MEMModel`, written to an adapter folder's `config.json`.

    The sections are plain mappings, as JSON wants them; the properties below give them as checked dataclasses.
    """

    model_type = "ocrmem"

    llm: dict[str, Any] | None = None
    """Identity of the frozen LLM: `model.identity.LLMIdentity`."""
    encoder: dict[str, Any] | None = None
    """`EncoderSettings`, as a mapping."""
    encoder_identity: dict[str, Any] | None = None
    """Identity of the frozen encoder: `model.identity.EncoderIdentity`."""
    page: dict[str, Any] | None = None
    """`RenderSettings` in force, as a mapping."""
    memory: dict[str, Any] | None = None
    """`MemorySettings`, as a mapping."""
    projection: dict[str, Any] | None = None
    """`ProjectionSettings`, as a mapping."""
    memory_token: str | None = None
    """The placeholder's text in the LLM's vocabulary."""
    memory_token_id: int | None = None
    """The placeholder's id; memory tokens take its places in `input_ids`."""
    rival: dict[str, Any] | None = None
    """`RivalRecord` of a trained rival, which reads text tokens in place of pages; None: a memory."""
    ocrmem_version: str | None = None
    """Version of the package that wrote the adapter."""

    @classmethod
    def from_settings(
        cls,
        *,
        encoder: EncoderSettings,
        page: RenderSettings,
        memory: MemorySettings,
        projection: ProjectionSettings,
        memory_token: str,
        memory_token_id: int,
        rival: RivalRecord | None = None,
    ) -> MEMConfig:
        """Build from the checked dataclasses; identities are filled in when the model is built."""
        return cls(
            encoder=dataclasses.asdict(encoder),
            page=dataclasses.asdict(page),
            memory=dataclasses.asdict(memory),
            projection=dataclasses.asdict(projection),
            memory_token=memory_token,
            memory_token_id=memory_token_id,
            rival=None if rival is None else dataclasses.asdict(rival),
        )

    @property
    def encoder_settings(self) -> EncoderSettings:
        """The encoder section."""
        return from_mapping(EncoderSettings, self.encoder or {}, where="encoder")

    @property
    def page_settings(self) -> RenderSettings | None:
        """The page section; None: the encoder's own preset."""
        return None if self.page is None else from_mapping(RenderSettings, self.page, where="page")

    @property
    def memory_settings(self) -> MemorySettings:
        """The memory section."""
        return from_mapping(MemorySettings, self.memory or {}, where="memory")

    @property
    def projection_settings(self) -> ProjectionSettings:
        """The projection section."""
        return from_mapping(ProjectionSettings, self.projection or {}, where="projection")

    @property
    def rival_record(self) -> RivalRecord | None:
        """The rival section; None: a memory."""
        return None if self.rival is None else from_mapping(RivalRecord, self.rival, where="rival")
