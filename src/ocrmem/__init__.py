"""ocrmem: a compressed visual memory for frozen Hugging Face language models.

The names below load lazily, so that `import ocrmem` stays fast and free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "GrowingSettings": "ocrmem.config.growing",
    "MEMConfig": "ocrmem.config.mem",
    "MEMModel": "ocrmem.model.mem_model",
    "MEMProcessor": "ocrmem.data.processor",
    "MEMTrainer": "ocrmem.training.trainer",
    "Memory": "ocrmem.session.memory",
    "MemorySettings": "ocrmem.config.memory",
    "MemoryStore": "ocrmem.memory.store",
    "OCREncoder": "ocrmem.encoders.base",
    "RenderSettings": "ocrmem.config.render",
}
__all__ = [
    "GrowingSettings",
    "MEMConfig",
    "MEMModel",
    "MEMProcessor",
    "MEMTrainer",
    "Memory",
    "MemorySettings",
    "MemoryStore",
    "OCREncoder",
    "RenderSettings",
]

if TYPE_CHECKING:
    from ocrmem.config.growing import GrowingSettings
    from ocrmem.config.mem import MEMConfig
    from ocrmem.config.memory import MemorySettings
    from ocrmem.config.render import RenderSettings
    from ocrmem.data.processor import MEMProcessor
    from ocrmem.encoders.base import OCREncoder
    from ocrmem.memory.store import MemoryStore
    from ocrmem.model.mem_model import MEMModel
    from ocrmem.session.memory import Memory
    from ocrmem.training.trainer import MEMTrainer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ocrmem' has no attribute {name!r}; it offers {', '.join(__all__)}")
