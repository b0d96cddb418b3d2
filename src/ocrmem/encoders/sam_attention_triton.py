"""The kernel behind `sam_attention.kernel_attention`.

FlashAttention (Dao 2023) over one window of a page, read in place. A tile of keys is `ROWS` whole rows of the window,
each padded to `COLUMNS`, a power of two; so the column part of the bias is the same for every tile and stays in
registers, and of the row part a tile needs one value a query for each of its rows. A global layer is one window of the
whole page.

Padding: DeepSeek-OCR pads the last windows with zeros before the linear layer that makes queries, keys and values, so
padded positions have that layer's bias as key and value, and are attended to like all others. They are not put into
the tiles, which the hardware copies past the registers: of a score their key is one value a query, and of the result
their value counts as often as their weights add up to.

The bias comes from a kernel of its own, which reads queries where they lie too. Its column part is padded to `COLUMNS`
with zeros, so that a query's values are whole sectors of memory.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports] - comes with torch for GPUs, on Linux
import triton.language as tl  # pyright: ignore[reportMissingImports]

LOG2_E = 1.4426950408889634
LOG2 = tl.constexpr(LOG2_E)
"""Scores are in base 2, whose exponential is the fast one."""
MIN_TILE = 64
"""Keys of a tile: rows are joined until there are as many."""
MIN_PRODUCT = 16
"""Side of the smallest product that tensor cores do."""
CONFIGS = [
    triton.Config({"BLOCK_Q": block, "SPLIT": split}, num_warps=warps, num_stages=stages, maxnreg=registers)
    for block, split, warps, stages, registers in (
        (64, 1, 4, 2, None), (64, 1, 4, 3, None), (64, 1, 4, 2, 128), (64, 2, 4, 2, 128), (64, 2, 4, 3, 128),
        (64, 4, 4, 2, None), (64, 4, 4, 3, None), (128, 1, 8, 3, None), (128, 1, 8, 2, 128), (128, 2, 8, 2, 128),
        (128, 1, 4, 2, None), (64, 1, 4, 4, None),
    )
]  # fmt: skip
"""Queries of a tile, parts of a tile of keys, warps, pipeline stages and registers that are tried at the first use; the
fastest stays."""
BLOCK_LINE = 64
"""Queries of a row or column whose bias is made at once."""
BIAS_CONFIGS = [
    triton.Config({"LINES": lines}, num_warps=4, num_stages=stages) for lines, stages in ((4, 2), (4, 3), (1, 2))
]
"""Rows or columns whose bias a program makes one after the other, loading the next meanwhile, and how many of them it
keeps at a time: tried like the others."""
FEW_POSITIONS = 256
"""A page of fewer positions is a trial whether the kernel runs: nothing is tried out for it."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs kernels on the CPU, one config of each."""
LAUNCHING = threading.Lock()
"""Triton's autotuner keeps a call's arguments in itself: of threads, as one for each GPU, one launches at a time."""


def unless_few(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """The configs to time for a page of so many positions."""
    return configs[:1] if arguments["height"] * arguments["width"] < FEW_POSITIONS else configs


def worth_trying(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """The configs to time for these arguments of the kernel."""
    rows, columns = constants["JOINED"], constants["COLUMNS"]
    configs = unless_few(configs, arguments)
    return [c for c in configs if c.kwargs["SPLIT"] == 1 or rows // c.kwargs["SPLIT"] * columns >= MIN_PRODUCT]


@triton.autotune(
    CONFIGS[:1] if INTERPRETED else CONFIGS,
    key=["height", "width", "WINDOW_W", "HEAD"],
    prune_configs_by={"early_config_prune": worth_trying},
)
@triton.jit
def _kernel(
    qkv, qkv_bias, bias_h, bias_w, out, height, width, windows_across, num_windows, scale,
    HEADS: tl.constexpr, HEAD: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    COLUMNS: tl.constexpr, JOINED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_Q: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """WHOLE: tiles and windows fill the page exactly, so that no key needs a mask."""
    ROWS: tl.constexpr = JOINED // SPLIT
    NUM_BLOCKS: tl.constexpr = (WINDOW_H * WINDOW_W + BLOCK_Q - 1) // BLOCK_Q
    block, group = tl.program_id(0) % NUM_BLOCKS, tl.program_id(0) // NUM_BLOCKS
    head, window = group % HEADS, (group // HEADS) % num_windows
    page = (group // HEADS // num_windows).to(tl.int64)
    top, left = (window // windows_across) * WINDOW_H, (window % windows_across) * WINDOW_W
    row_stride = 3 * HEADS * HEAD
    channel = tl.arange(0, HEAD)

    rows, columns = WINDOW_H, WINDOW_W
    if not WHOLE:  # of a cut window the queries inside the page are counted alone: fewer tiles have any
        rows, columns = tl.minimum(rows, height - top), tl.minimum(columns, width - left)
        if block * BLOCK_Q >= rows * columns:
            return
    place_q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    valid = place_q < rows * columns
    position = (top + place_q // columns) * width + left + place_q % columns
    page_qkv = qkv + page * height * width * row_stride + head * HEAD
    query = tl.load(page_qkv + position[:, None] * row_stride + channel[None, :], mask=valid[:, None], other=0.0)

    BLOCK_K: tl.constexpr = ROWS * COLUMNS
    place_k = tl.arange(0, BLOCK_K)
    row, column = place_k // COLUMNS, place_k % COLUMNS
    page_head = page * HEADS + head
    across = tl.load(
        bias_w + (page_head * height * width + position[:, None]) * COLUMNS + column[None, :],
        mask=valid[:, None],
        other=0.0,
    ).to(tl.float32) * LOG2  # fmt: skip
    down = bias_h + page_head * WINDOW_H * height * width + position
    padded_weight = tl.zeros([BLOCK_Q], tl.float32)
    padded_score = tl.zeros([BLOCK_Q], tl.float32)
    if not WHOLE:
        padded_key = tl.load(qkv_bias + (HEADS + head) * HEAD + channel).to(tl.float32)
        padded_score = tl.sum(query.to(tl.float32) * padded_key[None, :], 1) * scale

    top_score = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    for first in range(0, WINDOW_H, ROWS):
        key_y, key_x = top + first + row, left + column
        keys = page_qkv + (key_y * width + key_x)[:, None] * row_stride + channel[None, :]
        inside = (first + row < WINDOW_H) & (column < WINDOW_W)
        real = inside & (key_y < height) & (key_x < width)
        if WHOLE:
            key = tl.load(keys + HEADS * HEAD)
            value = tl.load(keys + 2 * HEADS * HEAD)
        else:
            key = tl.load(keys + HEADS * HEAD, mask=real[:, None], other=0.0)
            value = tl.load(keys + 2 * HEADS * HEAD, mask=real[:, None], other=0.0)
        # `down` is one value a query where the tile is one row: it shifts the maximum, not each score.
        shift = tl.zeros([BLOCK_Q], tl.float32)
        bias = across
        if ROWS == 1:
            shift = tl.load(down + first * height * width, mask=valid, other=0.0).to(tl.float32) * LOG2
        else:
            tile = tl.load(
                down[:, None] + (first + row)[None, :] * height * width,
                mask=valid[:, None] & (first + row < WINDOW_H)[None, :],
                other=0.0,
            )
            bias = across + tile.to(tl.float32) * LOG2
        score = tl.dot(query, tl.trans(key)) * scale + bias
        if not WHOLE:
            score = tl.where(real[None, :], score, score + padded_score[:, None])
            score = tl.where(inside[None, :], score, float("-inf"))
        new_top = tl.maximum(top_score, tl.max(score, 1) + shift)
        weight = tl.exp2(score - (new_top - shift)[:, None])
        shrink = tl.exp2(top_score - new_top)
        total = total * shrink + tl.sum(weight, 1)
        if not WHOLE:
            padded = tl.where((inside & ((key_y >= height) | (key_x >= width)))[None, :], weight, 0.0)
            padded_weight = padded_weight * shrink + tl.sum(padded, 1)
        result = result * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
        top_score = new_top
    if not WHOLE:
        padded_value = tl.load(qkv_bias + (2 * HEADS + head) * HEAD + channel).to(tl.float32)
        result += padded_weight[:, None] * padded_value[None, :]
    result = result / total[:, None]
    target = out + ((page * height * width + position[:, None]) * HEADS + head) * HEAD + channel[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=valid[:, None])


@triton.autotune(
    BIAS_CONFIGS[:1] if INTERPRETED else BIAS_CONFIGS,
    key=["height", "width", "WINDOW_W", "HEAD"],
    prune_configs_by={"early_config_prune": unless_few},
)
@triton.jit
def _bias_kernel(
    qkv, table_h, table_w, bias_h, bias_w, height, width,
    HEADS: tl.constexpr, HEAD: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED_H: tl.constexpr, PADDED_W: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Both parts of the bias: a product of each query with the vectors of its row, and one with those of its column.

    The programs of a page come one after another, so that its queries are in the cache when they are read again, and
    those of a place's heads, which lie side by side.
    """
    in_rows = tl.cdiv(height, LINES) * tl.cdiv(width, BLOCK)
    in_columns = tl.cdiv(width, LINES) * tl.cdiv(height, BLOCK)
    head, group = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    part = group % (in_rows + in_columns)
    page = (group // (in_rows + in_columns)).to(tl.int64)
    page_qkv = qkv + page * height * width * (3 * HEADS * HEAD) + head * HEAD
    places = (page * HEADS + head) * height * width
    if part < in_rows:
        _bias_of_lines(
            page_qkv, table_h, bias_h + places * WINDOW_H, height, width, part,
            3 * HEADS * HEAD, HEAD, WINDOW_H, WINDOW_H, PADDED_H, True, BLOCK, LINES,
        )  # fmt: skip
    else:
        _bias_of_lines(
            page_qkv, table_w, bias_w + places * COLUMNS, height, width, part - in_rows,
            3 * HEADS * HEAD, HEAD, WINDOW_W, COLUMNS, PADDED_W, False, BLOCK, LINES,
        )  # fmt: skip


@triton.jit
def _bias_of_lines(
    qkv, table, out, height, width, part,
    STRIDE: tl.constexpr, HEAD: tl.constexpr, KEYS: tl.constexpr, STORED: tl.constexpr, PADDED: tl.constexpr,
    DOWN: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Products of the queries of LINES rows (DOWN) or columns with `table` [rows or columns of the page, KEYS, HEAD].

    `out` is [KEYS, h, w] with DOWN, else [h, w, STORED], with zeros from KEYS on.
    """
    lines = height if DOWN else width
    length = width if DOWN else height
    num_blocks = tl.cdiv(length, BLOCK)
    along = part % num_blocks * BLOCK + tl.arange(0, BLOCK)
    channel, key = tl.arange(0, HEAD), tl.arange(0, PADDED)
    for number in range(LINES):
        line = part // num_blocks * LINES + number
        position = line * width + along if DOWN else along * width + line
        valid = (along < length)[:, None] & (line < lines)
        query = tl.load(qkv + position[:, None] * STRIDE + channel[None, :], mask=valid, other=0.0)
        vectors = tl.load(
            table + (line * KEYS + key)[:, None] * HEAD + channel[None, :],
            mask=(key < KEYS)[:, None] & (line < lines),
            other=0.0,
        )
        bias = tl.dot(query, tl.trans(vectors)).to(out.dtype.element_ty)
        place = key[None, :] * height * width + position[:, None] if DOWN else position[:, None] * STORED + key[None, :]
        tl.store(out + place, bias, mask=valid & (key < STORED)[None, :])


@torch.library.custom_op("ocrmem::windowed_attention", mutates_args=())
def windowed_attention(
    qkv_PHW3: torch.Tensor,
    qkv_bias: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    num_heads: int,
    window_h: int,
    window_w: int,
) -> torch.Tensor:
    """Attention within windows that lie in place; see `sam_attention.kernel_attention`.

    Returns:
        [P, h, w, heads · c].
    """
    qkv_PHW3, table_h, table_w = qkv_PHW3.contiguous(), table_h.contiguous(), table_w.contiguous()
    pages, height, width, channels = qkv_PHW3.shape
    head = channels // (3 * num_heads)
    out = qkv_PHW3.new_empty(pages, height, width, num_heads * head)
    bias_h = qkv_PHW3.new_empty(pages, num_heads, window_h, height, width)
    sizes = tiles(height, width, (window_h, window_w))
    bias_w = qkv_PHW3.new_empty(pages, num_heads, height, width, sizes["COLUMNS"])
    across, down = -(-width // window_w), -(-height // window_h)
    groups = pages * across * down * num_heads
    with torch.cuda.device_of(qkv_PHW3), LAUNCHING:
        _bias_kernel[lambda meta: (bias_parts(height, width, meta["LINES"]) * num_heads * pages,)](  # pyright: ignore
            qkv_PHW3, table_h, table_w, bias_h, bias_w, height, width, HEADS=num_heads, HEAD=head, WINDOW_H=window_h,
            WINDOW_W=window_w, COLUMNS=sizes["COLUMNS"], PADDED_H=max(MIN_PRODUCT, triton.next_power_of_2(window_h)),
            PADDED_W=max(MIN_PRODUCT, sizes["COLUMNS"]), BLOCK=BLOCK_LINE,
        )  # fmt: skip
        _kernel[lambda meta: (triton.cdiv(window_h * window_w, meta["BLOCK_Q"]) * groups,)](  # pyright: ignore
            qkv_PHW3, qkv_bias, bias_h, bias_w, out, height, width, across, across * down, head**-0.5 * LOG2_E,
            HEADS=num_heads, HEAD=head, **sizes,
        )  # fmt: skip
    return out


@windowed_attention.register_fake
def _(
    qkv_PHW3: torch.Tensor,
    qkv_bias: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    num_heads: int,
    window_h: int,
    window_w: int,
) -> torch.Tensor:
    return qkv_PHW3.new_empty(*qkv_PHW3.shape[:3], qkv_PHW3.shape[3] // 3)


def bias_parts(height: int, width: int, lines: int) -> int:
    """Programs of a page and head: of its rows first, then of its columns."""
    in_rows = triton.cdiv(height, lines) * triton.cdiv(width, BLOCK_LINE)
    return in_rows + triton.cdiv(width, lines) * triton.cdiv(height, BLOCK_LINE)


def tiles(height: int, width: int, window: tuple[int, int]) -> dict[str, int | bool]:
    """The kernel's sizes for a page of `height` × `width` positions that do not depend on the GPU."""
    rows, columns = window
    padded = triton.next_power_of_2(columns)
    joined = max(1, min(MIN_TILE // padded, triton.next_power_of_2(rows)), MIN_PRODUCT // padded)
    whole = padded == columns and rows % joined == 0 and height % rows == 0 and width % columns == 0
    return {"WINDOW_H": rows, "WINDOW_W": columns, "COLUMNS": padded, "JOINED": joined, "WHOLE": whole}
