"""Reading pieces of a page as tokens of the LLM, by a softmax over its input embeddings.

A projection without it has to learn what embedding stands for each word that it recognises: for SmolLM2-135M a table
of 28 M numbers, which the LLM has. With it, it has to learn which of the table's rows stand on the page.
"""

from __future__ import annotations

import math
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import nn

READING_SCALE = 20.0
"""By what a `TokenReading` multiplies cosines before its softmax, at the start; learnt for each dimension."""
CHUNK = 1024
"""Pieces that are read at once where no gradient is needed: the shares of 49,152 tokens take 200 MB then."""


class VocabularyReader(nn.Module):
    """Gives the embeddings of the text tokens that each piece is read as.

    Args:
        embeddings_CD: the LLM's input embeddings, frozen; kept in float32, and no part of an adapter. What is read of
            them is scaled to a root mean square of 1.
        read_tokens: how many tokens are read of a piece, in the order of the text.
    """

    embeddings_CD: torch.Tensor

    def __init__(self, embeddings_CD: torch.Tensor, *, read_tokens: int) -> None:
        super().__init__()
        self.readings = nn.ModuleList(TokenReading(embeddings_CD.shape[1]) for _ in range(read_tokens))
        table = embeddings_CD.detach().to(torch.float32, copy=True)
        self.scale = 1.0 if table.is_meta else float(table.square().mean().rsqrt())
        self.register_buffer("embeddings_CD", table, persistent=False)

    def forward(
        self,
        pieces_PVD: torch.Tensor,
        used_P: torch.Tensor | None = None,
        token_ids_PVT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Read.

        Args:
            pieces_PVD: what the layers before made of the pieces.
            used_P: pieces in use on each page; None: all.
            token_ids_PVT: the text tokens that begin within each piece, in order, then -1.

        Returns:
            What was read [P, V, readings, D]; how surely there is a token [P, V, readings], from 0 to 1; and where
            `token_ids_PVT` is given, the cross entropy of reading them: nats a piece in use, all its readings together.
        """
        pieces_ND = pieces_PVD.flatten(0, 1)
        targets_NR = None if token_ids_PVT is None else self._targets(token_ids_PVT).flatten(0, 1)
        if torch.is_grad_enabled() or len(pieces_ND) <= CHUNK:
            read_NRD, present_NR, losses_N = self._read(pieces_ND, targets_NR)
        else:
            targets = repeat(None) if targets_NR is None else targets_NR.split(CHUNK)
            parts = [self._read(*part) for part in zip(pieces_ND.split(CHUNK), targets, strict=False)]
            read_NRD, present_NR, losses_N = (torch.cat(found) for found in zip(*parts, strict=True))
        shape = pieces_PVD.shape[:2]
        read_PVRD, present_PVR = (found.unflatten(0, shape) for found in (read_NRD, present_NR))
        if token_ids_PVT is None:
            return read_PVRD, present_PVR, None
        losses_PV = losses_N.view(shape)
        if used_P is None:
            return read_PVRD, present_PVR, losses_PV.mean()
        used_PV = torch.arange(shape[1], device=losses_PV.device) < used_P[:, None]
        return read_PVRD, present_PVR, (losses_PV * used_PV).sum() / used_PV.sum().clamp(min=1)

    def _targets(self, token_ids_PVT: torch.Tensor) -> torch.Tensor:
        """int64 [P, V, readings]: the token of each reading, -1 where the piece has no such token."""
        wanted = len(self.readings)
        return F.pad(token_ids_PVT[..., :wanted].long(), (0, max(0, wanted - token_ids_PVT.shape[-1])), value=-1)

    def _read(
        self, pieces_ND: torch.Tensor, targets_NR: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        directions_CD = F.normalize(self.embeddings_CD, dim=-1)
        read, present = [], []
        losses_N = pieces_ND.new_zeros(len(pieces_ND), dtype=torch.float32)
        for number, reading in enumerate(self.readings):
            assert isinstance(reading, TokenReading)
            targets_N = None if targets_NR is None else targets_NR[:, number]
            shares_NC, none_N, loss_N = reading(pieces_ND, directions_CD, targets_N)
            read.append(reading.value((shares_NC @ self.embeddings_CD) * self.scale))
            present.append(1 - none_N)
            losses_N = losses_N if loss_N is None else losses_N + loss_N
        return torch.stack(read, dim=1), torch.stack(present, dim=1), losses_N


def dealt_evenly(
    states_LMD: torch.Tensor, present_LM: torch.Tensor, slots_L: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Text tokens of a line, found among its readings, dealt out evenly and in order over its memory tokens.

    Token c of T goes to memory token ⌊c × slots / T⌋, as `training.packing.token_slots` deals those of a rival.

    Args:
        states_LMD: a state for each reading of each line.
        present_LM: which of them are tokens.
        slots_L: memory tokens in use of each line.
        size: memory tokens of a full line V, and K tokens of one that are kept.

    Returns:
        [L, V, K, D]: the states of each memory token's last K tokens, the last one first; zeros where it has fewer.
    """
    slots, kept = size
    order_LM = present_LM.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    total_L1 = present_LM.sum(dim=1, keepdim=True)
    used_L1 = slots_L[:, None].clamp(min=1)
    edges = torch.arange(slots + 1, device=states_LMD.device)
    begins_LV = torch.minimum((edges * total_L1 + used_L1 - 1) // used_L1, total_L1)  # and past the last one
    back_K = torch.arange(kept, device=states_LMD.device)
    number_LVK = begins_LV[:, 1:, None] - 1 - back_K
    found_LVK = number_LVK >= begins_LV[:, :-1, None]
    place_LN = order_LM.gather(1, number_LVK.clamp(min=0).flatten(1))
    states_LND = states_LMD.gather(1, place_LN[..., None].expand(-1, -1, states_LMD.shape[2]))
    return states_LND.unflatten(1, (slots, kept)) * found_LVK[..., None]


class TokenReading(nn.Module):
    """One token of each piece, or none: a query, what stands for none, and how the token's embedding is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.value = (nn.Linear(width, width, bias=False, dtype=torch.float32) for _ in range(2))
        for matrix in (self.query, self.value):
            nn.init.eye_(matrix.weight)
        # For each dimension, since neither FSDP2 nor ZeRO-3 shares out a single number.
        self.log_scale = nn.Parameter(torch.full((width,), math.log(READING_SCALE), dtype=torch.float32))
        self.none_D = nn.Parameter(torch.zeros(width, dtype=torch.float32))

    def forward(
        self, pieces_ND: torch.Tensor, directions_CD: torch.Tensor, targets_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Shares of the vocabulary's tokens [N, C], and of none [N], which add up to 1; and, where targets are given
        (-1 for none), minus the logarithm of each target's share [N]."""
        queries_ND = F.normalize(self.query(pieces_ND).float(), dim=-1) * self.log_scale.exp()
        logits_NC = (queries_ND @ directions_CD.T).float()
        none_N = (queries_ND * self.none_D).sum(dim=-1)
        total_N = torch.logaddexp(logits_NC.logsumexp(dim=-1), none_N)
        shares_NC = (logits_NC - total_N[:, None]).exp()
        none_share_N = (none_N - total_N).exp()
        if targets_N is None:
            return shares_NC, none_share_N, None
        # From the same logits as the total: computed apart, it is rounded otherwise under autocast, and a run learnt to
        # gain 2 nats a piece by that alone (docs/log.md).
        found_N = logits_NC.gather(-1, targets_N.clamp(min=0)[:, None])[:, 0]
        return shares_NC, none_share_N, total_N - torch.where(targets_N < 0, none_N, found_N)
