"""Attention over packed rows: many samples one after the other, none seeing another.

Registered with transformers as `packed`, so `llm.attn_implementation: packed` selects it. It runs PyTorch's own
variable-length FlashAttention (`torch.nn.attention.varlen`), which reads where samples begin from `cu_seq_lens_q`, the
argument that transformers' own `flash_attention_2` takes, and needs no package besides torch. Where the samples' edges
are known on the host too, long samples go through a faster kernel, if there is one (`packed_pieces`). A batch without
edges, as in `generate`, goes through SDPA.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ocrmem.errors import ConfigError
from ocrmem.model.packed_pieces import attention_by_pieces

PACKED = "packed"
"""Name of the attention implementation."""

try:
    from torch.nn.attention.varlen import varlen_attn

    _PARAMETERS = inspect.signature(varlen_attn).parameters
except ImportError:  # torch before 2.10
    varlen_attn, _PARAMETERS = None, {}


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    host_edges: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample of a packed row.

    Args:
        query: [1, heads, S, width]; key and value may have fewer heads, a divisor of the query's.
        cu_seq_lens_q: int32 [samples + 1], where each sample begins, and S at the end; None: plain SDPA.
        max_length_q: positions of the longest sample.
        host_edges: `cu_seq_lens_q` on the host, where it is known.

    Returns:
        [1, S, heads, width], and None for the attention weights.

    Raises:
        ConfigError: the LLM does not say here where samples begin, or wants what the kernels do not do.
    """
    if cu_seq_lens_q is None and is_unused(attention_mask) and query.shape[2] > 1:
        raise ConfigError(
            "llm.attn_implementation=packed: the LLM's layers do not pass on where the samples of a packed row begin "
            "(`cu_seq_lens_q`), so they would see each other. Set llm.attn_implementation to sdpa, or data.packing to "
            "false."
        )
    if cu_seq_lens_q is None or max_length_q is None or not has_kernel(PACKED, query.device):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert varlen_attn is not None, "has_kernel says so"
    check_plain(max_length_q, kwargs)
    query_SHW, key_SHW, value_SHW = (states[0].transpose(0, 1) for states in (query, key, value))
    if host_edges is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention_by_pieces(query_SHW, key_SHW, value_SHW, cu_seq_lens_q, host_edges, scale)[0][None], None
    options: dict[str, Any] = {}
    if "enable_gqa" in _PARAMETERS:  # before, fewer heads of keys than of queries are taken without being told
        options["enable_gqa"] = query_SHW.shape[1] != key_SHW.shape[1]
    if "window_size" in _PARAMETERS:
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    if scaling is not None and "scale" in _PARAMETERS:
        options["scale"] = scaling
    out_SHW: Any = varlen_attn(
        query_SHW, key_SHW, value_SHW, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options
    )
    return out_SHW[None], None


def has_kernel(attention: str | None, device: torch.device) -> bool:
    """Whether an attention implementation keeps the samples of a packed row apart by itself, without a mask."""
    return attention == PACKED and device.type == "cuda" and varlen_attn is not None


def check_plain(max_length: int, wanted: Mapping[str, Any]) -> None:
    """Refuse attention that is not plain causal attention over samples of at most `max_length` positions.

    Args:
        wanted: what the LLM's layers give an attention function besides queries, keys and values.

    Raises:
        ConfigError: a sliding window shorter than the samples, capped logits, or attention sinks.
    """
    window = wanted.get("sliding_window")
    asked = {
        f"a sliding window of {window} positions": window is not None and window < max_length,
        "capped logits (softcap)": wanted.get("softcap") is not None,
        "attention sinks": wanted.get("s_aux") is not None,
    }
    found = [name for name, is_asked in asked.items() if is_asked]
    if found:
        raise ConfigError(
            f"llm.attn_implementation=packed: the LLM's layers want {' and '.join(found)}, which the kernels for "
            "packed rows do not do. Set llm.attn_implementation to sdpa, or data.packing to false."
        )


def is_unused(mask: torch.Tensor | None) -> bool:
    """Whether it is `unused_mask`'s."""
    return mask is not None and mask.dtype == torch.bool and tuple(mask.shape) == (1, 1, 1, 1)


def unused_mask(device: torch.device) -> torch.Tensor:
    """A mask that says nothing, in the four dimensions that transformers passes on as they are: where the kernel keeps
    samples apart, a mask of S × S would only cost memory."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def packed_mask(cu_seq_lens: torch.Tensor, embeds_BSD: torch.Tensor) -> torch.Tensor:
    """What keeps the samples of a row apart where no kernel does: added to the attention's logits, [1, 1, S, S].

    Transformers tells samples apart by jumps in position_ids, which fails where a memory token takes several positions.

    Args:
        cu_seq_lens: int32 [samples + 1], where each sample begins, and S at the end.
        embeds_BSD: the row, for its type and device.
    """
    positions_S = torch.arange(embeds_BSD.shape[1], device=embeds_BSD.device)
    sample_S = torch.searchsorted(cu_seq_lens.to(positions_S), positions_S, right=True)
    seen_SS = (sample_S[:, None] == sample_S[None, :]) & (positions_S[:, None] >= positions_S[None, :])
    least = torch.finfo(embeds_BSD.dtype).min
    return torch.where(seen_SS, 0.0, least).to(embeds_BSD.dtype)[None, None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
