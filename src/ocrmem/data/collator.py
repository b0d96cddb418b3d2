"""Samples to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ocrmem.errors import ConfigError
from ocrmem.model.label_loss import IGNORE_INDEX


@dataclass(frozen=True)
class MEMCollator:
    """Pads samples of a `MEMDataset` into a batch for `MEMModel`.

    The batch has int64 `input_ids`, `attention_mask` and `labels` [B, S]; and where any sample has a memory,
    uint8 `pages` [P, H, W] in sample order, `page_keys` (P strings), and int64 `page_num_tokens` [P] and
    `num_pages` [B]. `MEMTrainer` turns pages and keys into features.

    Raises:
        ConfigError: an unknown padding side, or a multiple below 1.
    """

    pad_token_id: int
    """Id in the padded places; they are masked."""
    padding_side: Literal["left", "right"] = "right"
    """Train with right padding: under left padding the padded queries see no key at all, and attention kernels of
    CUDA then give gradients that are not numbers (seen with torch 2.11's SDPA on an H100)."""
    pad_to_multiple_of: int | None = None
    """Round S up to a multiple of this; None: S is the longest sample."""

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ConfigError(f"padding_side={self.padding_side!r}: expected 'left' or 'right'.")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of={self.pad_to_multiple_of}: expected 1 or more, or None.")

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Samples to a batch; see the class."""
        multiple = self.pad_to_multiple_of or 1
        longest = -(-max(len(sample["input_ids"]) for sample in samples) // multiple) * multiple
        batch: dict[str, Any] = {
            "input_ids": self._pad([sample["input_ids"] for sample in samples], longest, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(sample["input_ids"]) for sample in samples], longest, 0),
            "labels": self._pad([sample["labels"] for sample in samples], longest, IGNORE_INDEX),
        }
        keys = [key for sample in samples for key in sample["page_keys"]]
        if keys:
            batch["pages"] = torch.cat([sample["pages"] for sample in samples])
            batch["page_keys"] = keys
            batch["page_num_tokens"] = torch.cat([sample["page_num_tokens"] for sample in samples])
            batch["num_pages"] = torch.tensor([len(sample["page_keys"]) for sample in samples])
        return batch

    def _pad(self, rows: Sequence[torch.Tensor], length: int, fill: int) -> torch.Tensor:
        padded_BS = torch.full((len(rows), length), fill, dtype=torch.int64)
        for padded_S, row_S in zip(padded_BS, rows, strict=True):
            if self.padding_side == "left":
                padded_S[length - len(row_S) :] = row_S
            else:
                padded_S[: len(row_S)] = row_S
        return padded_BS
