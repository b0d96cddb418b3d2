"""Raster: the lines of a page to pixels and to its character map.

```
lines ─▶ glyphs of the page, one array ─▶ edges on the line ─▶ a column of the atlas for each pixel column ─▶ gather
```

Besides the letters of `types`: L lines of the page, W pixels between its margins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
import regex

from ocrmem.config.render import RenderSettings
from ocrmem.render.atlas import BLANK, Atlas
from ocrmem.render.bidi import visual_order
from ocrmem.render.breaking import BREAK, SPACE
from ocrmem.render.layout import Line
from ocrmem.types import ROLES, Page

_ROLE = regex.compile(rf"(?:\A|(?<=\n))(?:{'|'.join(ROLES)}):(?= )")
"""A role at the start of a turn, as `memory.history` writes it; looked for in a page's own text alone."""
RULE_HEIGHT = 2
"""Pixels of the thin line above a role."""


def page_lines(lines: Iterable[Line], settings: RenderSettings) -> Iterator[list[Line]]:
    """Lines, page by page."""
    room = settings.lines_per_page * settings.line_height
    page: list[Line] = []
    used = 0
    for line in lines:
        if page and used + settings.line_height > room:
            yield page
            page, used = [], 0
        page.append(line)
        used += settings.line_height + settings.space_after * line.ends_paragraph
    if page:
        yield page


def draw_page(lines: list[Line], *, text: str, start: int, atlas: Atlas, settings: RenderSettings) -> Page:
    """The page of these lines; `text` is the whole text, of which the page holds what begins at `start`."""
    height, width = settings.line_height, settings.text_width
    ids_N, offsets_N, widths_N = _glyphs(lines)
    atlas.count_missing(ids_N)
    counts_L = np.array([line.stop - line.first for line in lines], dtype=np.int64)
    ends_L = np.cumsum(counts_L)
    order_N = None
    if any(line.block.right_to_left_N is not None for line in lines):
        order_N, ids_N = _visual(lines, ids_N, offsets_N, text, atlas)
        widths_N = widths_N[order_N]
    columns_N = atlas.starts.take(ids_N)
    indents_L = np.array([settings.first_indent * line.starts_paragraph for line in lines], dtype=np.int64)
    if settings.alignment != "left":
        _align(lines, ends_L, indents_L, widths_N, columns_N, settings, len(text), int(atlas.starts[BLANK]))
    # Edges on the line. Spaces that hang over the margin are cut there.
    right_N = np.cumsum(widths_N)
    begins_L = np.append(0, right_N)[ends_L - counts_L] - indents_L
    right_N -= np.repeat(begins_L, counts_L)
    left_N = right_N - widths_N
    np.minimum(right_N, width, out=right_N)
    np.minimum(left_N, width, out=left_N)

    image_HW = np.full((settings.page_height, settings.page_width), settings.background, dtype=np.uint8)
    columns_LW = _columns(columns_N, left_N, right_N, ends_L, indents_L, width, int(atlas.starts[BLANK]))
    area_HW = image_HW[settings.margin_top :, settings.margin_left : settings.margin_left + width]
    pitch_L = np.array([height + settings.space_after * line.ends_paragraph for line in lines], dtype=np.int64)
    tops_L = np.cumsum(pitch_L) - pitch_L
    if settings.space_after:
        for number, top in enumerate(tops_L.tolist()):
            atlas.draw(columns_LW[number : number + 1], area_HW[None, top : top + height])
    else:
        atlas.draw(columns_LW, area_HW[: len(lines) * height].reshape(len(lines), height, width))

    boxes_N4 = np.empty((len(ids_N), 4), dtype=np.int32)
    places = slice(None) if order_N is None else order_N
    boxes_N4[places, 0], boxes_N4[places, 2] = left_N + settings.margin_left, right_N + settings.margin_left
    boxes_N4[:, 1] = np.repeat(tops_L + settings.margin_top, counts_L)
    boxes_N4[:, 3] = boxes_N4[:, 1] + height
    end = lines[-1].end
    if settings.roles != "text":
        _mark_roles(image_HW, text[start:end], offsets_N - start, boxes_N4, settings)
    return Page(
        image_HW=image_HW,
        text_start=start,
        text_end=end,
        num_lines=len(lines),
        glyph_offsets_N=offsets_N,
        glyph_boxes_N4=boxes_N4,
    )


def _glyphs(lines: list[Line]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Glyph ids, offsets and widths of lines, each as one new array."""
    groups = [list(group) for _, group in groupby(lines, key=lambda line: id(line.block))]
    parts = [(group[0].block, slice(group[0].first, group[-1].stop)) for group in groups]
    return (
        np.concatenate([block.glyph_ids_N[part] for block, part in parts]),
        np.concatenate([block.offsets_N[part] for block, part in parts]),
        np.concatenate([block.widths_N[part] for block, part in parts]),
    )


def _visual(
    lines: list[Line], ids_N: np.ndarray, offsets_N: np.ndarray, text: str, atlas: Atlas
) -> tuple[np.ndarray, np.ndarray]:
    """The glyphs' logical numbers from left to right, line after line, and their ids in that order, brackets
    mirrored. Spaces at the end of a line stay at its right, where they hang over the margin."""
    order_N, ids_N = np.arange(len(ids_N)), ids_N.copy()
    end = 0
    for line in lines:
        begin, end = end, end + line.stop - line.first
        marks = line.block.right_to_left_N
        if marks is None or not marks[line.first : line.stop].any():
            continue
        last = begin + _inked(line)
        bases = "".join(text[offset] for offset in offsets_N[begin:last].tolist())
        order, mirrored = visual_order(bases)
        order_N[begin:last] = begin + order
        ids_N[begin:last] = ids_N[begin + order]
        for place in np.flatnonzero(mirrored).tolist():
            ids_N[begin + place] = atlas.mirror(int(ids_N[begin + place]), bases[order[place]])
    return order_N, ids_N


def _inked(line: Line) -> int:
    """Glyphs of a line without the spaces and the break at its end."""
    classes = line.block.classes_N[line.first : line.stop]
    inked = np.flatnonzero((classes != SPACE) & (classes != BREAK))
    return int(inked[-1]) + 1 if len(inked) else 0


def _align(
    lines: list[Line],
    ends_L: np.ndarray,
    indents_L: np.ndarray,
    widths_N: np.ndarray,
    columns_N: np.ndarray,
    settings: RenderSettings,
    text_length: int,
    blank: int,
) -> None:
    """Move lines to the right by their indents, or widen their spaces, in place."""
    for number, line in enumerate(lines):
        end = int(ends_L[number]) - (line.stop - line.first)
        inked = slice(end, end + _inked(line))
        spare = settings.text_width - int(indents_L[number]) - int(widths_N[inked].sum())
        if settings.alignment != "justify":
            indents_L[number] += max(0, spare) // (2 if settings.alignment == "center" else 1)
        elif not line.ends_paragraph and line.end < text_length:
            classes = line.block.classes_N[line.first : line.first + inked.stop - inked.start]
            if line.block.right_to_left_N is not None:
                continue  # its glyphs stand in another order than its classes
            spaces = inked.start + np.flatnonzero(classes == SPACE)
            if spare > 0 and len(spaces):
                widths_N[spaces] += spare // len(spaces)
                widths_N[spaces[: spare % len(spaces)]] += 1
                columns_N[spaces] = blank


def _columns(
    columns_N: np.ndarray,
    left_N: np.ndarray,
    right_N: np.ndarray,
    ends_L: np.ndarray,
    indents_L: np.ndarray,
    width: int,
    blank: int,
) -> np.ndarray:
    """int64 [L, W]: the column of the atlas under each pixel column; blank before and after a line's glyphs."""
    num_lines = len(ends_L)
    widths_N = right_N - left_N
    used_L = np.append(0, np.cumsum(widths_N))[ends_L]
    used_L = np.diff(used_L, prepend=0) + indents_L
    # A line is its indent, its glyphs and the rest: two more items a line, at these places among all items.
    items = np.full(len(columns_N) + 2 * num_lines, blank, dtype=np.int64)
    lengths = np.empty(len(items), dtype=np.int64)
    rests = ends_L + 2 * np.arange(num_lines) + 1
    indents = np.append(0, rests[:-1] + 1)
    is_glyph = np.ones(len(items), dtype=bool)
    is_glyph[rests] = is_glyph[indents] = False
    items[is_glyph], lengths[is_glyph] = columns_N - left_N, widths_N
    lengths[rests], lengths[indents] = width - used_L, indents_L
    columns = np.repeat(items, lengths).reshape(num_lines, width)
    columns += np.arange(width)
    return columns


def _mark_roles(
    image_HW: np.ndarray, text: str, offsets_N: np.ndarray, boxes_N4: np.ndarray, settings: RenderSettings
) -> None:
    """Set the roles at the starts of turns apart, in place."""
    for match in _ROLE.finditer(text):
        first, stop = np.searchsorted(offsets_N, [match.start(), match.end()])
        for top in np.unique(boxes_N4[first:stop, 1]).tolist():
            boxes = boxes_N4[first:stop][boxes_N4[first:stop, 1] == top]
            left, right, bottom = int(boxes[:, 0].min()), int(boxes[:, 2].max()), int(boxes[0, 3])
            if settings.roles == "rule":
                image_HW[top : top + RULE_HEIGHT, left:right] = settings.foreground
            else:
                area = image_HW[top:bottom, left:right]
                area[...] = np.uint8(settings.foreground) + np.uint8(settings.background) - area
