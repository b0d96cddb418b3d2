"""The splice: memory tokens take the places of the placeholder ids.

Placeholders in `input_ids`, as Hugging Face vision-language models have them, mean that masks, labels, positions,
padding on either side and `generate` need no special case.
"""

from __future__ import annotations

import torch

from ocrmem.errors import SpliceError


def check_counts(placeholders_BS: torch.Tensor, page_num_tokens_P: torch.Tensor, num_pages_B: torch.Tensor) -> None:
    """Raise unless every sample has as many placeholders as its pages have memory tokens.

    A check of the total alone would let one sample's surplus fill another's gap and pair memories with the wrong
    conversations.
    """
    if int(num_pages_B.sum()) != page_num_tokens_P.shape[0] or num_pages_B.shape[0] != placeholders_BS.shape[0]:
        raise SpliceError(
            f"num_pages={num_pages_B.tolist()} must hold one count for each of the {placeholders_BS.shape[0]} samples "
            f"and add up to the {page_num_tokens_P.shape[0]} pages given."
        )
    sample_of_page_P = torch.repeat_interleave(
        torch.arange(num_pages_B.shape[0], device=num_pages_B.device), num_pages_B
    )
    tokens_B = torch.zeros_like(num_pages_B).index_add_(0, sample_of_page_P, page_num_tokens_P)
    placeholders_B = placeholders_BS.sum(dim=1)
    if not torch.equal(tokens_B, placeholders_B):
        sample = int((tokens_B != placeholders_B).nonzero()[0])
        raise SpliceError(
            f"sample {sample} has {int(placeholders_B[sample])} placeholders in input_ids but its pages give "
            f"{int(tokens_B[sample])} memory tokens; the two must be equal. Build the batch with MEMProcessor, and do "
            "not truncate input_ids afterwards."
        )


def positions_after(
    placeholders_BS: torch.Tensor, stride: int, *, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """position_ids int64 [B, S] where a memory token takes `stride` positions, a text token one and padding none.

    Each stands at the first of its positions.

    Args:
        placeholders_BS: bool.
        attention_mask: [B, S], 1 for memory and text, 0 for padding on either side; None: no padding.
    """
    taken_BS = torch.where(placeholders_BS, stride, 1)
    if attention_mask is not None:
        taken_BS = taken_BS * (attention_mask != 0)
    return taken_BS.cumsum(dim=-1) - taken_BS


def one_sample_each(input_ids: torch.Tensor) -> torch.Tensor:
    """attention_mask [B, S] of ones, for position_ids with jumps: without a mask and a cache, transformers takes a jump
    for the beginning of another sample."""
    return torch.ones_like(input_ids)


def pads_only_after(attention_mask_BS: torch.Tensor) -> bool:
    """Whether padding, if any, stands after the text in every row.

    No causal position sees what comes after it, so such a mask changes nothing but the padded positions themselves;
    and there it does harm: under a sliding window a padded query has no key left, for which CUDA's attention kernels
    give gradients that are not numbers (seen with torch 2.11 on an H100). Without a mask they also run faster.
    """
    return bool((attention_mask_BS[:, :-1] >= attention_mask_BS[:, 1:]).all())


def splice(
    embeds_BSD: torch.Tensor,
    placeholders_BS: torch.Tensor,
    memory_PVD: torch.Tensor,
    page_num_tokens_P: torch.Tensor,
) -> torch.Tensor:
    """Put the used memory tokens of all pages, in order, in the places of the placeholders; out of place.

    Args:
        placeholders_BS: True where `input_ids` holds the placeholder; counts as `check_counts` demands.
    """
    positions_V = torch.arange(memory_PVD.shape[1], device=memory_PVD.device)
    used_PV = positions_V < page_num_tokens_P[:, None]
    return embeds_BSD.masked_scatter(placeholders_BS[..., None], memory_PVD[used_PV].to(embeds_BSD.dtype))


def splice_at(
    embeds_BSD: torch.Tensor, placeholder_index_M: torch.Tensor, memory_PVD: torch.Tensor, memory_index_M: torch.Tensor
) -> torch.Tensor:
    """`splice`, where a collator has counted already: nothing makes the host wait for the GPU.

    Args:
        placeholder_index_M: int64, the places of the placeholders, sample × S + position.
        memory_index_M: int64, the memory token of each, page × V + its number on the page.
    """
    memory_MD = memory_PVD.flatten(0, 1).index_select(0, memory_index_M).to(embeds_BSD.dtype)
    return embeds_BSD.flatten(0, 1).index_copy(0, placeholder_index_M, memory_MD).view_as(embeds_BSD)
