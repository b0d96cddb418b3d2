"""Encoders by name."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import entry_points

import torch

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.loader import from_mapping, nearest
from ocrmem.config.render import RenderSettings
from ocrmem.encoders.base import OCREncoder
from ocrmem.errors import ConfigError

GROUP = "ocrmem.encoders"
BUILT_IN = {
    "pp-ocr": "ocrmem.encoders.pp_ocr:PPOCREncoder",
    "deepseek-ocr": "ocrmem.encoders.deepseek_ocr:DeepSeekOCREncoder",
}


def encoder_names() -> list[str]:
    """Every registered encoder, sorted."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))})


@functools.cache
def encoder_class(name: str) -> type[OCREncoder]:
    """The class registered under a name.

    Raises:
        ConfigError: nothing is; or what an installed package registered is no encoder.
    """
    target = BUILT_IN.get(name) or next(
        (entry.value for entry in entry_points(group=GROUP) if entry.name == name), None
    )
    if target is None:
        raise ConfigError(
            f"unknown encoder {name!r}. {nearest(name, encoder_names())} A package adds one by an entry point in the "
            f"group {GROUP!r}."
        )
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"encoder {name!r} is registered as {target!r}, which cannot be imported: {error}."
        ) from error
    if not (isinstance(found, type) and issubclass(found, OCREncoder)):
        raise ConfigError(f"encoder {name!r} is registered as {target!r}, which is no subclass of OCREncoder.")
    return found


def build_encoder(
    settings: EncoderSettings,
    *,
    page: RenderSettings | None = None,
    load_weights: bool = True,
    device: torch.device | str = "cpu",
) -> OCREncoder:
    """Build an encoder from its settings.

    Args:
        settings: name, checkpoint, dtype and the encoder's own settings.
        page: page settings; None: the encoder's preset.
        load_weights: False builds the shapes alone, for counting; `device="meta"` then takes no memory.
        device: where its weights go.

    Raises:
        ConfigError: an unknown encoder or setting; the nearest is named.
        PageSizeError: the encoder cannot read such pages.
        CheckpointError: its weights are missing, truncated or not its own.
    """
    cls = encoder_class(settings.name)
    own = from_mapping(cls.settings_type, settings.settings, where="encoder.settings")
    with torch.device(device):
        encoder = cls.build(own, page=page)
    encoder.to(getattr(torch, settings.dtype))
    if load_weights:
        encoder.load_checkpoint(settings.checkpoint)
    return encoder.eval()
