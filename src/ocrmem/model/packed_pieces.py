"""Attention over a packed row in pieces: cuDNN's kernel for long samples, FlashAttention 2 for runs of short ones.

On a Hopper GPU cuDNN's attention is the faster one, but its kernel for samples of several lengths is set up anew, for
tens of milliseconds, each time that torch calls it (up to 2.13 at least). So a long sample is a call of the plain one,
which is set up once for each length. There are few lengths: a sample is read to a multiple of `GRANULE`, past its end.
What lies there comes after it, so that it does not see it, and those queries' results are cut off and get no gradient.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

LONG = 512
"""Positions from which a sample is a call of its own."""
GRANULE = 128
"""Positions to which such a sample is rounded up."""
aten: Any = torch.ops.aten


@dataclass
class Piece:
    """Samples that are one call of a kernel."""

    first: int
    end: int
    """Numbers of the first sample, and of the one after the last."""
    start: int
    stop: int
    """Positions of the row where they begin and end."""
    size: int
    """Positions of each that the kernel reads; 0: it reads their edges."""
    lse_start: int
    """Position, with each sample before rounded up, from which log-sum-exps are kept."""

    @property
    def exact(self) -> bool:
        """Whether the kernel reads the samples, and nothing after them."""
        return self.size * (self.end - self.first) == self.stop - self.start


def pieces(edges: Sequence[int], *, dense: bool = True) -> list[Piece]:
    """The calls for a row whose samples lie between `edges`; only the kernel for short samples unless `dense`."""
    found: list[Piece] = []
    lse_start = 0
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        length = stop - start
        rounded = -(-length // GRANULE) * GRANULE
        size = rounded if dense and length >= LONG else 0
        before = found[-1] if found else None
        if before is not None and before.size == size and (size == 0 or (before.exact and length == size)):
            before.end, before.stop = number + 1, stop
        else:
            found.append(Piece(number, number + 1, start, stop, size, lse_start))
        lse_start += rounded
    return found


@torch.library.custom_op("ocrmem::packed_attention", mutates_args=())
def attention_by_pieces(
    query_SHW: torch.Tensor,
    key_SKW: torch.Tensor,
    value_SKW: torch.Tensor,
    edges: torch.Tensor,
    host_edges: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each sample.

    Args:
        query_SHW: [S, heads, width] on a CUDA device; key and value may have fewer heads, a divisor of the query's.
        edges: int32 [samples + 1], where each sample begins, and S at the end, on the device.
        host_edges: the same on the host, which need not wait for the device then.

    Returns:
        [S, heads, width], and what the backward pass needs.
    """
    states = [tensor.contiguous() for tensor in (query_SHW, key_SKW, value_SKW)]
    num_heads = query_SHW.shape[1]
    lse = query_SHW.new_zeros(_lse_size(query_SHW, host_edges), dtype=torch.float32)  # some stays unused
    outs: list[torch.Tensor] = []
    for piece in _pieces(states, host_edges):
        if piece.size:
            windows = [_windows(tensor, piece) for tensor in states]
            done = aten._scaled_dot_product_cudnn_attention(*windows, None, True, 0.0, True, False, scale=scale)
            out, part = _positions(done[0], piece), done[1]
        else:
            inside = [tensor[piece.start : piece.stop] for tensor in states]
            bounds = _edges(edges, host_edges, piece)
            out, part = aten._flash_attention_forward(*inside, *bounds, 0.0, True, False, scale=scale)[:2]
        outs.append(out)
        lse[num_heads * piece.lse_start :][: part.numel()] = part.flatten()
    return _joined(outs), lse


@torch.library.custom_op("ocrmem::packed_attention_backward", mutates_args=())
def attention_by_pieces_backward(
    grad_SHW: torch.Tensor,
    query_SHW: torch.Tensor,
    key_SKW: torch.Tensor,
    value_SKW: torch.Tensor,
    out_SHW: torch.Tensor,
    lse: torch.Tensor,
    edges: torch.Tensor,
    host_edges: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value."""
    states = [tensor.contiguous() for tensor in (query_SHW, key_SKW, value_SKW)]
    grad_SHW, out_SHW, num_heads = grad_SHW.contiguous(), out_SHW.contiguous(), query_SHW.shape[1]
    random_state = torch.zeros(2, dtype=torch.uint64, device=query_SHW.device)  # of a dropout of 0
    none, seed = query_SHW.new_empty(0), torch.zeros((), dtype=torch.int64, device=query_SHW.device)
    grads: list[list[torch.Tensor]] = [[], [], []]
    for piece in _pieces(states, host_edges):
        kept = lse[num_heads * piece.lse_start :]
        if piece.size:
            windows = [_windows(tensor, piece) for tensor in (*states, out_SHW)]
            # Queries after the sample's end get no gradient, so that they give none.
            grad = _windows(grad_SHW if piece.exact else grad_SHW[: piece.stop], piece)
            stats = kept[: grad.shape[:3].numel()].view(*grad.shape[:3], 1)
            parts = aten._scaled_dot_product_cudnn_attention_backward(
                grad, *windows, stats, seed, seed, None, None, None, piece.size, piece.size, 0.0, True, scale=scale
            )
            parts = [_positions(part, piece) for part in parts]
        else:
            inside = [tensor[piece.start : piece.stop] for tensor in (grad_SHW, *states, out_SHW)]
            stats = kept[: num_heads * len(inside[0])].view(num_heads, -1)
            parts = aten._flash_attention_backward(
                *inside, stats, *_edges(edges, host_edges, piece), 0.0, True, random_state, none, scale=scale
            )
        for found, part in zip(grads, parts, strict=True):
            found.append(part)
    query, key, value = map(_joined, grads)
    return query, key, value


@attention_by_pieces.register_fake
def _(query_SHW, key_SKW, value_SKW, edges, host_edges, scale):
    lse = query_SHW.new_empty(_lse_size(query_SHW, host_edges), dtype=torch.float32)
    return query_SHW.new_empty(query_SHW.shape), lse


@attention_by_pieces_backward.register_fake
def _(grad_SHW, query_SHW, key_SKW, value_SKW, out_SHW, lse, edges, host_edges, scale):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query_SHW, key_SKW, value_SKW))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_SHW: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, edges, host_edges, out, lse = ctx.saved_tensors
    grads = attention_by_pieces_backward(grad_SHW, query, key, value, out, lse, edges, host_edges, ctx.scale)
    return *grads, None, None, None


attention_by_pieces.register_autograd(_backward, setup_context=_setup)


def _pieces(states: Sequence[torch.Tensor], host_edges: torch.Tensor) -> list[Piece]:
    query, key, _ = states
    dense = cudnn_runs(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2])
    return pieces(host_edges.tolist(), dense=dense)


def _lse_size(query_SHW: torch.Tensor, host_edges: torch.Tensor) -> int:
    return query_SHW.shape[1] * (query_SHW.shape[0] + GRANULE * host_edges.shape[0])


def _windows(states_SHW: torch.Tensor, piece: Piece) -> torch.Tensor:
    """What cuDNN reads of a row, [samples, heads, size, width], with zeros after the row's end."""
    count = piece.end - piece.first
    inside = states_SHW[piece.start : piece.start + count * piece.size]
    if missing := count * piece.size - len(inside):
        inside = F.pad(inside, (0, 0, 0, 0, 0, missing))
    return inside.unflatten(0, (count, piece.size)).transpose(1, 2)


def _positions(windows: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The samples' own positions, [positions, heads, width]."""
    return windows.transpose(1, 2).flatten(0, 1)[: piece.stop - piece.start]


def _edges(edges: torch.Tensor, host_edges: torch.Tensor, piece: Piece) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Of the piece's samples, and the length of the longest, as FlashAttention takes them: for queries and for keys."""
    own = edges[piece.first : piece.end + 1] - piece.start
    longest = int(host_edges[piece.first : piece.end + 1].diff().max())
    return own, own, longest, longest


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


@functools.cache
def cudnn_runs(device: torch.device, dtype: torch.dtype, num_heads: int, num_key_heads: int, width: int) -> bool:
    """Whether cuDNN's attention runs here; tried once."""
    if torch.cuda.get_device_capability(device) < (9, 0) or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    heads = (num_heads, num_key_heads, num_key_heads)
    try:
        query, key, value = (
            torch.zeros(1, GRANULE, n, width, device=device, dtype=dtype).transpose(1, 2) for n in heads
        )
        out, lse = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, True, False)[:2]
        seed = torch.zeros((), dtype=torch.int64, device=device)
        aten._scaled_dot_product_cudnn_attention_backward(
            out, query, key, value, out, lse, seed, seed, None, None, None, GRANULE, GRANULE, 0.0, True
        )
    except torch.cuda.OutOfMemoryError:  # says nothing about the kernel
        raise
    except (RuntimeError, TypeError) as error:
        log.info("cuDNN's attention does not run here: %s", error)
        return False
    return True
