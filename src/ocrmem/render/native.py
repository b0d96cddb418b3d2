"""The compiled extension, or None where it was not built; see setup.py. Pages are the same without it."""

from __future__ import annotations

from typing import Any

INTERFACE = 3
"""What `layout` and `raster` call, as _blit.c counts it: a file built from older source is left alone."""

blit: Any
try:
    from ocrmem.render import _blit as blit  # type: ignore[attr-defined, no-redef]

    if blit.INTERFACE != INTERFACE:
        blit = None
except (ImportError, AttributeError):
    blit = None
