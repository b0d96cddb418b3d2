"""`MEMConfig`: everything needed to rebuild a `MEMModel` around its frozen parts."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.loader import from_mapping
from ocrmem.config.memory import MemorySettings
from ocrmem.config.projection import ProjectionSettings
from ocrmem.config.render import RenderSettings


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
    ) -> MEMConfig:
        """Build from the checked dataclasses; identities are filled in when the model is built."""
        return cls(
            encoder=dataclasses.asdict(encoder),
            page=dataclasses.asdict(page),
            memory=dataclasses.asdict(memory),
            projection=dataclasses.asdict(projection),
            memory_token=memory_token,
            memory_token_id=memory_token_id,
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
