"""Right-to-left text: the visual order of a line's glyphs (Unicode Standard Annex 9, by python-bidi)."""

from __future__ import annotations

import unicodedata

import numpy as np
from bidi.algorithm import (
    MIRRORED,
    explicit_embed_and_overrides,
    get_base_level,
    get_embedding_levels,
    get_empty_storage,
    reorder_resolved_levels,
    resolve_implicit_levels,
    resolve_neutral_types,
    resolve_weak_types,
)

_DRAWN = frozenset(("L", "R", "AL", "EN", "ES", "ET", "AN", "CS", "NSM", "WS", "ON"))
"""Types of characters that are drawn; others would be taken out of the line or end it."""


def runs_right_to_left(character: str) -> bool:
    """Whether a character makes the line that holds it need an order of its own."""
    return unicodedata.bidirectional(character) in ("R", "AL", "AN")


def mirrored(character: str) -> str | None:
    """The character that looks like this one in a mirror; None where there is none."""
    return MIRRORED.get(character)


def visual_order(bases: str) -> tuple[np.ndarray, np.ndarray]:
    """The order in which the glyphs of a line stand, from left to right.

    Args:
        bases: the first character of each of N glyphs, in logical order. The line's direction is that of its first
            letter; controls of direction are not drawn, so they are not here and change nothing.

    Returns:
        int64 [N], the logical number of each glyph from left to right, and bool [N] in that order, whether it is in a
        right-to-left run, where brackets are mirrored.
    """
    storage = get_empty_storage()
    storage["base_level"] = get_base_level(bases)
    storage["base_dir"] = "LR"[storage["base_level"]]
    get_embedding_levels(bases, storage)
    for number, character in enumerate(storage["chars"]):
        character["number"] = number
        if character["orig"] not in _DRAWN:  # a break that is drawn as a mark is a space like others
            character["type"] = character["orig"] = "WS" if character["orig"] in ("B", "S") else "ON"
    explicit_embed_and_overrides(storage)
    resolve_weak_types(storage)
    resolve_neutral_types(storage, False)
    resolve_implicit_levels(storage, False)
    reorder_resolved_levels(storage, False)
    characters = storage["chars"]
    order = np.array([character["number"] for character in characters], dtype=np.int64)
    return order, np.array([character["level"] % 2 == 1 for character in characters], dtype=bool)
