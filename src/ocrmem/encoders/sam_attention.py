"""Attention with decomposed relative positions, four ways with the same result.

The score of query q and key k gains q·R_h[dy] + q·R_w[dx] (Li et al. 2022, MViTv2), a bias of N × N for each head: of
the 4,096 positions of a global layer 805 MB a page in float32. It is the sum of tables of N × rows and N × columns:

- `reference` gives SDPA their sum, N × N, as a mask;
- `folded` puts them into the operands: q' = [q·s, q·R_h, q·R_w] and k' = [k, one-hot row, one-hot column] have the
  score as their product;
- `flex` lets FlexAttention read both tables for each score;
- `triton` is a kernel whose tiles of keys are whole rows: one table stays in registers, of the other it reads a column.

All are exact; in half precision they round a little less than `reference`, which rounds the sum of both tables.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

Implementation = Literal["auto", "reference", "folded", "flex", "triton"]

HEAD_MULTIPLE = 8
"""Head widths that fused attention kernels take without padding of their own."""


@functools.cache
def choose(wanted: Implementation, *, device: torch.device, dtype: torch.dtype, head_width: int) -> Implementation:
    """The implementation to run: what was asked for where it can run, else the best that can.

    Args:
        wanted: `auto`: `triton` on GPUs from Ampere on in half precision, `folded` on others, `reference` on the CPU.
    """
    if wanted in ("reference", "folded") or (wanted == "flex" and device.type == "cuda"):
        return wanted
    if wanted in ("auto", "triton") and _kernel_runs(device, dtype, head_width):
        return "triton"
    return "reference" if device.type == "cpu" else "folded"


def _kernel_runs(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether the Triton kernel takes such tensors: half precision, head width a power of two, Ampere or newer. It is
    tried on a small page first: a Triton that cannot compile here costs speed, and no run."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if head_width < 16 or head_width & (head_width - 1) or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        qkv = torch.zeros(1, 4, 4, 3 * head_width, device=device, dtype=dtype)
        table = qkv.new_zeros(4, 4, head_width)
        kernel_attention(qkv, qkv[0, 0, 0], table, table, num_heads=1, window=(4, 4))
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever Triton, its compiler or the driver raises
        log.warning("SAM's attention kernel does not run here, so the folded one is used: %s", error)
        return False
    return True


def reference_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor
) -> torch.Tensor:
    """With the whole bias as SDPA's mask.

    Args:
        query: [P, heads, N, c], as key and value; position n is row n // columns, column n % columns.
        bias_h: [P, heads, N, rows], q·R_h for each row of keys.
        bias_w: [P, heads, N, columns].

    Returns:
        [P, heads, N, c].
    """
    bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(3, 4)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def folded_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor
) -> torch.Tensor:
    """With the bias in the operands; arguments as in `reference_attention`.

    Values are padded with zeros to the operands' width, since flash kernels take one width only.
    """
    width, rows, columns = query.shape[-1], bias_h.shape[-1], bias_w.shape[-1]
    spare = -(width + rows + columns) % HEAD_MULTIPLE
    place = torch.arange(rows * columns, device=query.device)
    one_hot = torch.cat(
        [
            (place[:, None] // columns == torch.arange(rows, device=query.device)),
            (place[:, None] % columns == torch.arange(columns, device=query.device)),
        ],
        dim=1,
    ).to(query.dtype)
    query = F.pad(torch.cat([query * width**-0.5, bias_h, bias_w], dim=-1), (0, spare))
    key = F.pad(torch.cat([key, one_hot.expand(*key.shape[:2], -1, -1)], dim=-1), (0, spare))
    value = F.pad(value, (0, rows + columns + spare))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :width]


def flex_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor
) -> torch.Tensor:
    """With FlexAttention; arguments as in `reference_attention`."""
    columns = bias_w.shape[-1]

    def with_bias(score: Any, page: Any, head: Any, q: Any, k: Any) -> Any:
        return score + bias_h[page, head, q, k // columns] + bias_w[page, head, q, k % columns]

    return _flex(query.is_cuda and not torch.compiler.is_compiling())(query, key, value, score_mod=with_bias)


@functools.cache
def _flex(compiled: bool) -> Any:
    """FlexAttention, compiled where nothing around it is: uncompiled it materialises the scores."""
    from torch.nn.attention.flex_attention import flex_attention as function

    return torch.compile(function, dynamic=False) if compiled else function


def kernel_attention(
    qkv_PHW3: torch.Tensor,
    qkv_bias: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    *,
    num_heads: int,
    window: tuple[int, int],
) -> torch.Tensor:
    """With the Triton kernel, over windows that stay in place: nothing is padded, cut into windows or put back.

    Args:
        qkv_PHW3: [P, h, w, 3 · heads · c], queries, keys and values of the page's positions.
        qkv_bias: [3 · heads · c]; keys and values of the positions with which the last windows are padded.
        table_h: [h, window rows, c], for each row of the page the vectors of its distances to the rows of its window.
        table_w: [w, window columns, c].
        window: rows and columns of a window; (h, w) for attention over the whole page.

    Returns:
        [P, h, w, heads · c].
    """
    from ocrmem.encoders.sam_attention_triton import windowed_attention

    return windowed_attention(qkv_PHW3, qkv_bias, table_h, table_w, num_heads, *window)
