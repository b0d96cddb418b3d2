"""Samples to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ocrmem.errors import ConfigError, SpliceError
from ocrmem.model.label_loss import IGNORE_INDEX
from ocrmem.model.splice import positions_after


@dataclass(frozen=True)
class MEMCollator:
    """Pads samples of a `MEMDataset` into a batch for `MEMModel`, or packs them into one row.

    A padded batch has int64 `input_ids`, `attention_mask` and `labels` [B, S]; and where any sample has a memory,
    uint8 `pages` [P, H, W] in sample order, `page_keys` (P strings), and int64 `page_num_tokens` [P] and
    `num_pages` [B]. `MEMTrainer` turns pages and keys into features.

    A packed row has the samples one after the other, B = 1, and nothing is padded; none sees another: `position_ids`
    [1, S] start anew with each, `cu_seq_lens_q`, `max_length_q` and the list `sample_lengths` say so to kernels. It
    has no mask, and says `target_index`, and with a memory `placeholder_index` and `memory_index`, as
    `MEMModel.forward` takes them.

    Raises:
        ConfigError: an unknown padding side, a multiple below 1, or packing without what it needs.
    """

    pad_token_id: int
    """Id in the padded places; they are masked."""
    padding_side: Literal["left", "right"] = "right"
    """Train with right padding: under left padding the padded queries see no key at all, and attention kernels of
    CUDA then give gradients that are not numbers (seen with torch 2.11's SDPA on an H100)."""
    pad_to_multiple_of: int | None = None
    """Round S up to a multiple of this; None: S is the longest sample, or in a packed row all of them."""
    packing: bool = False
    """Pack; with the two below."""
    memory_token_id: int | None = None
    """Id of the placeholder."""
    tokens_per_page: int | None = None
    """V of the encoder."""
    position_stride: int = 1
    """Positions that a memory token takes in a packed row."""

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ConfigError(f"padding_side={self.padding_side!r}: expected 'left' or 'right'.")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of={self.pad_to_multiple_of}: expected 1 or more, or None.")
        if self.packing and (self.memory_token_id is None or self.tokens_per_page is None):
            raise ConfigError(
                "packing=True needs memory_token_id (the placeholder's) and tokens_per_page of the encoder."
            )

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Samples to a batch; see the class."""
        if self.packing:
            return self._packed(samples)
        multiple = self.pad_to_multiple_of or 1
        longest = -(-max(len(sample["input_ids"]) for sample in samples) // multiple) * multiple
        batch: dict[str, Any] = {
            "input_ids": self._pad([sample["input_ids"] for sample in samples], longest, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(sample["input_ids"]) for sample in samples], longest, 0),
            "labels": self._pad([sample["labels"] for sample in samples], longest, IGNORE_INDEX),
        }
        return {**batch, **_memory(samples)}

    def _packed(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        token_id, tokens_per_page = self.memory_token_id, self.tokens_per_page
        assert token_id is not None, "checked when the collator was made"
        assert tokens_per_page is not None, "checked when the collator was made"
        multiple = self.pad_to_multiple_of or 1
        lengths = [len(sample["input_ids"]) for sample in samples]
        used = sum(lengths)
        if used % multiple:
            lengths.append(-used % multiple)  # what is left over is a sample of its own, without labels
        input_ids = torch.full((1, sum(lengths)), self.pad_token_id, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        input_ids[0, :used] = torch.cat([sample["input_ids"] for sample in samples])
        labels[0, :used] = torch.cat([sample["labels"] for sample in samples])
        edges = torch.tensor([0, *lengths]).cumsum(0)
        labels[0, edges[:-1]] = IGNORE_INDEX  # nothing in its own sample predicts a sample's first token
        positions = [positions_after(part == token_id, self.position_stride) for part in input_ids[0].split(lengths)]
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": torch.cat(positions)[None],
            "cu_seq_lens_q": edges.to(torch.int32),
            "max_length_q": max(lengths),
            "sample_lengths": lengths,
            "target_index": (labels[0, 1:] != IGNORE_INDEX).nonzero()[:, 0],
        }
        for number, sample in enumerate(samples):
            found = int((sample["input_ids"] == token_id).sum())
            wanted = int(sample["page_num_tokens"].sum())
            if found != wanted:
                raise SpliceError(
                    f"sample {number} of a packed row has {found} placeholders in input_ids but its pages give "
                    f"{wanted} memory tokens; the two must be equal. Take samples as MEMDataset gives them."
                )
        memory = _memory(samples)
        if memory:
            memory["num_pages"] = memory["num_pages"].sum(dim=0, keepdim=True)
            counts = memory["page_num_tokens"].tolist()
            memory.update(splice_index(input_ids, token_id, counts, tokens_per_page))
        return {**batch, **memory}

    def _pad(self, rows: Sequence[torch.Tensor], length: int, fill: int) -> torch.Tensor:
        padded_BS = torch.full((len(rows), length), fill, dtype=torch.int64)
        for padded_S, row_S in zip(padded_BS, rows, strict=True):
            if self.padding_side == "left":
                padded_S[length - len(row_S) :] = row_S
            else:
                padded_S[: len(row_S)] = row_S
        return padded_BS


def _memory(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = [key for sample in samples for key in sample["page_keys"]]
    if not keys:
        return {}
    return {
        "pages": torch.cat([sample["pages"] for sample in samples]),
        "page_keys": keys,
        "page_num_tokens": torch.cat([sample["page_num_tokens"] for sample in samples]),
        "num_pages": torch.tensor([len(sample["page_keys"]) for sample in samples]),
    }


def splice_index(
    input_ids: torch.Tensor, memory_token_id: int, page_num_tokens: Sequence[int], tokens_per_page: int
) -> dict[str, torch.Tensor]:
    """Where the placeholders of a row stand, and the memory token of each, counted here and not on the GPU.

    Args:
        tokens_per_page: V of the row's features.
    """
    placeholders_M = (input_ids[0] == memory_token_id).nonzero()[:, 0]
    memory_M = torch.cat([torch.arange(number) + page * tokens_per_page for page, number in enumerate(page_num_tokens)])
    if len(placeholders_M) != len(memory_M):
        raise SpliceError(
            f"a packed row has {len(placeholders_M)} placeholders (id {memory_token_id}) and {len(memory_M)} memory "
            "tokens; the two must be equal. Is the placeholder's id also in the text of a sample?"
        )
    return {"placeholder_index": placeholders_M, "memory_index": memory_M}
