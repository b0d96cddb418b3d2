"""Every error that a user of ocrmem can meet.

Each message says what was given, what was expected and what to do. All are `ValueError`s, so that code which does
not know ocrmem can still catch them; `assert` is kept for our own bugs.
"""

from __future__ import annotations


class OcrmemError(ValueError):
    """Base of all errors below. The command line prints it as one line, without a traceback."""


def message_of(error: OcrmemError) -> str:
    """What an error says, without the traceback that torch's `DataLoader` puts around the message of a worker's."""
    head, _, message = str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return message.rstrip("\n") if "DataLoader worker process" in head else str(error)


class ConfigError(OcrmemError):
    """A setting, a config file or a combination of settings is wrong."""


class MemoryNeverAppearsError(ConfigError):
    """With these settings, or this data set, no sample could ever have a memory, so nothing would be learnt."""


class AssetError(OcrmemError):
    """A weight, font or data set could not be resolved, downloaded or verified."""


class DataError(OcrmemError):
    """A conversation file or a message in it is broken."""


class RenderError(OcrmemError):
    """Text could not be drawn with the given page settings."""


class PageSizeError(OcrmemError):
    """A page does not fit the encoder that should read it."""


class CheckpointError(OcrmemError):
    """A weights file is missing, truncated, or does not match the architecture it is loaded into."""


class AdapterMismatchError(OcrmemError):
    """An adapter was made for another LLM, another encoder or another feature width."""


class SpliceError(OcrmemError):
    """The placeholders in `input_ids` and the memory tokens of a sample do not agree in number."""


class FrozenPartError(OcrmemError):
    """A part that must stay as it was is not: a trainable parameter, active dropout, or drifting statistics."""


class ProbeError(OcrmemError):
    """The gradient check could not be run on what it was given."""


class GradientFlowError(OcrmemError):
    """A training run cannot learn; the message names the cause, the place and the mend."""


class TrainingError(OcrmemError):
    """A training run cannot go on."""


class StoreError(OcrmemError):
    """A store of conversations cannot be opened, read or written. What was acknowledged is still there."""


class StoreBusyError(StoreError):
    """Another process is writing the conversation."""


class StoreMismatchError(StoreError):
    """A stored conversation's pages were made with another encoder, LLM or page settings."""
