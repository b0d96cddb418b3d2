"""Right-to-left text on a page: the order of the glyphs of each line, and the side that it begins at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ocrmem.render.atlas import Atlas
from ocrmem.render.bidi import Paragraph, paragraph_before, visual_order
from ocrmem.render.breaking import BREAK, SPACE
from ocrmem.render.layout import Block, Lines


def each_line(lines: list[Lines]) -> Iterator[tuple[Block, int, int, bool]]:
    """Each line's block, its first glyph there, one past its last, and whether it ends a paragraph."""
    for block, rows_L4 in lines:
        for first, stop, _, closes in rows_L4.tolist():
            yield block, first, stop, closes == 1


def inked(block: Block, first: int, stop: int) -> int:
    """Glyphs of a line without the spaces and the break at its end."""
    classes = block.classes_N[first:stop]
    found = np.flatnonzero((classes != SPACE) & (classes != BREAK))
    return int(found[-1]) + 1 if len(found) else 0


def arrange(
    lines: list[Lines], ids_N: np.ndarray, offsets_N: np.ndarray, text: str, start: int, atlas: Atlas
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the glyphs of a page stand, whose text begins at `start`.

    Spaces at the end of a line stay at its right, where they hang over the margin.

    Returns:
        The glyphs' logical numbers from left to right, line after line; their ids in that order, brackets mirrored; and
        bool [L], whether a line is in a right-to-left paragraph. A line with several paragraphs (breaks drawn as a
        mark) is in none.
    """
    order_N, ids_N = np.arange(len(ids_N)), ids_N.copy()
    right_L: list[bool] = []
    paragraph = Paragraph()
    paragraph.skip(paragraph_before(text, start))
    at, end = start, 0
    for block, first, stop, _ in each_line(lines):
        begin, end = end, end + stop - first
        last = begin + inked(block, first, stop)
        breaks = (begin + np.flatnonzero(block.classes_N[first:stop] == BREAK)).tolist()
        for number, edge in enumerate([*breaks, end]):
            here = int(offsets_N[edge]) if edge < end else block.end_of(stop)
            part = slice(begin, max(begin, min(edge, last)))
            _order(text[at:here], offsets_N[part] - at, part, paragraph, order_N, ids_N, atlas)
            if number == 0:
                right_L.append(paragraph.base == 1 and breaks in ([], [end - 1]))
            begin, at = edge + 1, here
            if edge < end:  # what is not drawn after a break belongs to the next paragraph
                at += 2 if text.startswith("\r\n", here) else 1
                paragraph = Paragraph()
    return order_N, ids_N, np.array(right_L, dtype=bool)


def _order(
    text: str,
    places_N: np.ndarray,
    part: slice,
    paragraph: Paragraph,
    order_N: np.ndarray,
    ids_N: np.ndarray,
    atlas: Atlas,
) -> None:
    """Bring the glyphs `part` into their order, in place; `places_N` are their places in `text`."""
    if paragraph.is_plain(text):
        paragraph.skip(text)
        return
    levels = paragraph.read(text)
    places = places_N.tolist()
    order = np.array(visual_order(text, levels, places, paragraph.base), dtype=np.int64)
    order_N[part] = part.start + order
    ids_N[part] = ids_N[part.start + order]
    for place, number in enumerate(order.tolist()):
        if levels[places[number]] % 2:
            glyph = part.start + place
            ids_N[glyph] = atlas.mirror(int(ids_N[glyph]), text[places[number]])
