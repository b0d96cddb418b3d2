"""The compiled extension, or None where it was not built; see setup.py. Pages are the same without it."""

from __future__ import annotations

from typing import Any

blit: Any
try:
    from ocrmem.render import _blit as blit  # type: ignore[attr-defined, no-redef]
except ImportError:
    blit = None
