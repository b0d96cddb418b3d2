"""Raster: the lines of a page to pixels and to its character map.

```
lines ─▶ glyphs of the page, one array ─┬─▶ _blit.c: a copy for each glyph
                                        └─▶ edges on the line ─▶ a column of the atlas for each pixel column ─▶ gather
```

The second way is numpy alone, for machines without a compiler, and gives the same bytes.

Besides the letters of `types`: L lines of the page, W pixels between its margins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import regex

from ocrmem.config.render import RenderSettings
from ocrmem.render import native
from ocrmem.render.atlas import BLANK, Atlas
from ocrmem.render.breaking import SPACE
from ocrmem.render.directions import arrange, each_line, inked
from ocrmem.render.layout import Lines
from ocrmem.types import ROLES, Page

_ROLE = regex.compile(rf"(?:\A|(?<=\n))(?:{'|'.join(ROLES)}):(?= )")
"""A role at the start of a turn, as `memory.history` writes it; looked for in a page's own text alone."""
RULE_SHARE = 24
"""The thin line above a role is this fraction of the line's height, and a pixel at least."""

WORKING_SET = 16 << 20
"""Bytes; a page of 1,280 × 1,280 pixels needs five million."""


def page_lines(lines: Iterable[Lines], settings: RenderSettings) -> Iterator[list[Lines]]:
    """Lines, page by page."""
    room = settings.lines_per_page * settings.line_height
    page: list[Lines] = []
    used = 0
    for block, rows_L4 in lines:
        while len(rows_L4):
            number = (room - used) // settings.line_height
            closes_L = rows_L4[: max(1, number), 3]
            if settings.space_after:
                begins_L = used + np.cumsum(settings.line_height + settings.space_after * closes_L)[:-1]
                number = int(np.searchsorted(begins_L, room - settings.line_height, side="right")) + (number > 0)
            if page and number < 1:
                yield page
                page, used = [], 0
                continue
            part = rows_L4[: max(1, number)]
            page.append(Lines(block, part))
            used += len(part) * settings.line_height
            if settings.space_after:
                used += settings.space_after * int(part[:, 3].sum())
            rows_L4 = rows_L4[len(part) :]
    if page:
        yield page


class Raster:
    """Draws pages of fixed settings with the glyphs of one atlas."""

    def __init__(self, atlas: Atlas, settings: RenderSettings) -> None:
        self._atlas = atlas
        self._settings = settings
        # Half of a page's time would go into page faults of its temporary arrays. glibc keeps freed memory of blocks
        # as large as the largest that it has seen freed (32 MiB at most), and this one is never touched.
        np.empty(WORKING_SET, dtype=np.uint8)

    def page(self, lines: list[Lines], *, text: str, start: int) -> Page:
        """The page of these lines; `text` is the whole text, of which the page holds what begins at `start`."""
        settings, atlas = self._settings, self._atlas
        ids_N, offsets_N, widths_N = _glyphs(lines)
        atlas.count_missing(ids_N)
        rows_L4 = lines[0].rows_L4 if len(lines) == 1 else np.concatenate([part.rows_L4 for part in lines])
        ends_L = np.cumsum(rows_L4[:, 1] - rows_L4[:, 0])
        order_N = right_L = None
        if any(part.block.directed for part in lines):
            order_N, ids_N, right_L = arrange(lines, ids_N, offsets_N, text, start, atlas)
            widths_N = widths_N[order_N]
            if settings.line_breaks == "mark" or not right_L.any():
                right_L = None
        indents_L = settings.first_indent * rows_L4[:, 2]
        if settings.alignment not in ("start", "left") or right_L is not None:
            ids_N, widths_N = ids_N.copy(), widths_N.copy()
            _align(lines, ends_L, indents_L, right_L, order_N, ids_N, widths_N, settings, len(text))
        tops_L = settings.margin_top + np.arange(len(rows_L4)) * settings.line_height
        if settings.space_after:
            tops_L[1:] += settings.space_after * np.cumsum(rows_L4[:-1, 3])

        image_HW = np.empty((settings.page_height, settings.page_width), dtype=np.uint8)
        boxes_4N = np.empty((4, len(ids_N)), dtype=np.int32)
        self._draw(image_HW, boxes_4N, ends_L, indents_L, tops_L, ids_N, widths_N)
        if order_N is not None:
            visual_4N, boxes_4N = boxes_4N, np.empty_like(boxes_4N)
            boxes_4N[:, order_N] = visual_4N
        end = lines[-1].end
        if settings.roles != "text":
            _mark_roles(image_HW, text[start:end], offsets_N - start, boxes_4N.T, settings)
        return Page(
            image_HW=image_HW,
            text_start=start,
            text_end=end,
            num_lines=len(rows_L4),
            glyph_offsets_N=offsets_N,
            glyph_boxes_N4=boxes_4N.T,
        )

    def _draw(
        self,
        image_HW: np.ndarray,
        boxes_4N: np.ndarray,
        ends_L: np.ndarray,
        indents_L: np.ndarray,
        tops_L: np.ndarray,
        ids_N: np.ndarray,
        widths_N: np.ndarray,
    ) -> None:
        """Write the pixels and the boxes of a page, glyphs from left to right; the same with the extension and
        without."""
        settings, width, height = self._settings, self._settings.text_width, self._settings.line_height
        if native.blit is not None:
            ids_N, widths_N = (array_N.astype(np.int32, copy=False) for array_N in (ids_N, widths_N))
            native.blit.draw(
                image_HW, boxes_4N, ends_L, indents_L, tops_L, ids_N, widths_N, self._atlas.places, self._atlas.pixels,
                settings.page_width, height, settings.margin_left, settings.margin_left + width, settings.background,
            )  # fmt: skip
            return
        counts_L = np.diff(ends_L, prepend=0)
        # Edges on the line. Spaces that hang over the margin are cut there.
        right_N = np.cumsum(widths_N)
        begins_L = np.append(0, right_N)[ends_L - counts_L] - indents_L
        right_N -= np.repeat(begins_L, counts_L)
        left_N = np.minimum(right_N - widths_N, width)
        np.minimum(right_N, width, out=right_N)
        boxes_4N[0], boxes_4N[2] = left_N + settings.margin_left, right_N + settings.margin_left
        boxes_4N[1] = np.repeat(tops_L, counts_L)
        boxes_4N[3] = boxes_4N[1] + height

        columns_LW = self._columns_LW(self._atlas.starts.take(ids_N), left_N, right_N, ends_L, indents_L)
        image_HW.fill(settings.background)
        area_HW = image_HW[:, settings.margin_left : settings.margin_left + width]
        if settings.space_after:
            for number, top in enumerate(tops_L.tolist()):
                self._atlas.draw(columns_LW[number : number + 1], area_HW[None, top : top + height])
        else:
            top = settings.margin_top
            area_LHW = area_HW[top : top + len(tops_L) * height].reshape(len(tops_L), height, width)
            self._atlas.draw(columns_LW, area_LHW)

    def _columns_LW(
        self, columns_N: np.ndarray, left_N: np.ndarray, right_N: np.ndarray, ends_L: np.ndarray, indents_L: np.ndarray
    ) -> np.ndarray:
        """int64: the column of the atlas under each pixel column; blank before and after a line's glyphs."""
        num_lines, width = len(ends_L), self._settings.text_width
        widths_N = right_N - left_N
        used_L = np.diff(np.append(0, np.cumsum(widths_N))[ends_L], prepend=0) + indents_L
        # A line is its indent, its glyphs and the rest: two more items a line, at these places among all items.
        rests = ends_L + 2 * np.arange(num_lines) + 1
        indents = np.append(0, rests[:-1] + 1)
        is_glyph = np.ones(len(columns_N) + 2 * num_lines, dtype=bool)
        is_glyph[rests] = is_glyph[indents] = False
        starts = np.full(len(is_glyph), self._atlas.starts[BLANK], dtype=np.int64)
        lengths = np.empty(len(is_glyph), dtype=np.int64)
        starts[is_glyph], lengths[is_glyph] = columns_N - left_N, widths_N
        lengths[rests], lengths[indents] = width - used_L, indents_L
        columns = np.repeat(starts, lengths).reshape(num_lines, width)
        columns += np.arange(width)
        return columns


def _glyphs(lines: list[Lines]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Glyph ids, offsets and widths of lines; the offsets are a copy, which keeps no block alive."""
    parts = [(part.block, slice(int(part.rows_L4[0, 0]), int(part.rows_L4[-1, 1]))) for part in lines]
    if len(parts) == 1:
        block, part = parts[0]
        return block.glyph_ids_N[part], block.offsets_N[part].copy(), block.widths_N[part]
    return (
        np.concatenate([block.glyph_ids_N[part] for block, part in parts]),
        np.concatenate([block.offsets_N[part] for block, part in parts]),
        np.concatenate([block.widths_N[part] for block, part in parts]),
    )


def _align(
    lines: list[Lines],
    ends_L: np.ndarray,
    indents_L: np.ndarray,
    right_L: np.ndarray | None,
    order_N: np.ndarray | None,
    ids_N: np.ndarray,
    widths_N: np.ndarray,
    settings: RenderSettings,
    text_length: int,
) -> None:
    """Move lines to the right by their indents, or widen their spaces, in place. The first line of a right-to-left
    paragraph is indented at its right."""
    for number, (block, first, stop, closes) in enumerate(each_line(lines)):
        is_right = right_L is not None and bool(right_L[number])
        end = int(ends_L[number]) - (stop - first)
        glyphs = slice(end, end + inked(block, first, stop))
        spare = max(0, settings.text_width - int(indents_L[number]) - int(widths_N[glyphs].sum()))
        alignment = settings.alignment
        if alignment == "justify" and not closes and block.end_of(stop) < text_length:
            classes = block.classes_N[first : first + glyphs.stop - end]
            if order_N is not None:
                classes = classes[order_N[glyphs] - end]
            spaces = end + np.flatnonzero(classes == SPACE)
            if spare > 0 and len(spaces):
                widths_N[spaces] += spare // len(spaces)
                widths_N[spaces[: spare % len(spaces)]] += 1
                ids_N[spaces] = BLANK
                spare = 0
        if is_right:
            indents_L[number] = 0
        if alignment == "center":
            indents_L[number] += spare // 2
        elif alignment == "right" or (is_right and alignment in ("start", "justify")):
            indents_L[number] += spare


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
                image_HW[top : top + max(1, settings.line_height // RULE_SHARE), left:right] = settings.foreground
            else:
                area = image_HW[top:bottom, left:right]
                area[...] = np.uint8(settings.foreground) + np.uint8(settings.background) - area
