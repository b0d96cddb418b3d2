"""Reading pieces of a page as tokens of the LLM, by a softmax over its input embeddings.

A projection without it has to learn what embedding stands for each word that it recognises: for SmolLM2-135M a table
of 28 M numbers, which the LLM has. With it, it has to learn which of the table's rows stand on the page.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

READING_SCALE = 20.0
"""By what a `TokenReading` multiplies cosines before its softmax, at the start; learnt for each dimension."""
CHUNK = 1024
"""Pieces that are read at once where no gradient is needed: the shares of 49,152 tokens take 200 MB then."""


class VocabularyReader(nn.Module):
    """Adds to each piece the embeddings of the text tokens that it is read as.

    Args:
        embeddings_CD: the LLM's input embeddings, frozen; kept in float32, and no part of an adapter.
        embedding_rms: their root mean square.
        read_tokens: how many tokens are read of a piece, in the order of the text.
    """

    embeddings_CD: torch.Tensor

    def __init__(self, embeddings_CD: torch.Tensor, *, embedding_rms: float, read_tokens: int) -> None:
        super().__init__()
        self.readings = nn.ModuleList(TokenReading(embeddings_CD.shape[1]) for _ in range(read_tokens))
        self.scale = 1 / embedding_rms
        table = embeddings_CD.detach().to(torch.float32, copy=True)
        self.register_buffer("embeddings_CD", table, persistent=False)

    def forward(
        self,
        pieces_PVD: torch.Tensor,
        used_P: torch.Tensor | None = None,
        token_ids_PVT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read.

        Args:
            pieces_PVD: what the layers before made of the pieces.
            used_P: pieces in use on each page; None: all.
            token_ids_PVT: the text tokens that begin within each piece, in order, then -1.

        Returns:
            pieces_PVD with what was read, and where `token_ids_PVT` is given the cross entropy of reading them: nats a
            piece in use, all its readings together.
        """
        pieces_ND = pieces_PVD.flatten(0, 1)
        targets_NR = None if token_ids_PVT is None else self._targets(token_ids_PVT).flatten(0, 1)
        if torch.is_grad_enabled() or len(pieces_ND) <= CHUNK:
            read_ND, losses_N = self._read(pieces_ND, targets_NR)
        else:
            targets = [None] * len(pieces_ND) if targets_NR is None else targets_NR.split(CHUNK)
            parts = [self._read(*part) for part in zip(pieces_ND.split(CHUNK), targets, strict=False)]
            read_ND = torch.cat([read for read, _ in parts])
            losses_N = torch.cat([losses for _, losses in parts])
        read_PVD = read_ND.view_as(pieces_PVD)
        if token_ids_PVT is None:
            return read_PVD, None
        losses_PV = losses_N.view(pieces_PVD.shape[:2])
        if used_P is None:
            return read_PVD, losses_PV.mean()
        used_PV = torch.arange(losses_PV.shape[1], device=losses_PV.device) < used_P[:, None]
        return read_PVD, (losses_PV * used_PV).sum() / used_PV.sum().clamp(min=1)

    def _targets(self, token_ids_PVT: torch.Tensor) -> torch.Tensor:
        """int64 [P, V, readings]: the token of each reading, -1 where the piece has no such token."""
        wanted = len(self.readings)
        return F.pad(token_ids_PVT[..., :wanted].long(), (0, max(0, wanted - token_ids_PVT.shape[-1])), value=-1)

    def _read(self, pieces_ND: torch.Tensor, targets_NR: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        directions_CD = F.normalize(self.embeddings_CD, dim=-1)
        read_ND, losses_N = pieces_ND, pieces_ND.new_zeros(len(pieces_ND), dtype=torch.float32)
        for number, reading in enumerate(self.readings):
            targets_N = None if targets_NR is None else targets_NR[:, number]
            shares_NC, loss_N = reading(pieces_ND, directions_CD, targets_N)
            read_ND = read_ND + reading.value((shares_NC @ self.embeddings_CD) * self.scale)
            losses_N = losses_N if loss_N is None else losses_N + loss_N
        return read_ND, losses_N


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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shares of the vocabulary's tokens [N, C], which with that of none add up to 1; and, where targets are given
        (-1 for none), minus the logarithm of each target's share [N]."""
        queries_ND = F.normalize(self.query(pieces_ND).float(), dim=-1) * self.log_scale.exp()
        logits_NC = (queries_ND @ directions_CD.T).float()
        none_N = (queries_ND * self.none_D).sum(dim=-1)
        total_N = torch.logaddexp(logits_NC.logsumexp(dim=-1), none_N)
        shares_NC = (logits_NC - total_N[:, None]).exp()
        if targets_N is None:
            return shares_NC, None
        # Not gathered from the logits, whose gradient would then be a table of zeros of their size.
        found_N = (queries_ND * directions_CD[targets_N.clamp(min=0)]).sum(dim=-1)
        return shares_NC, total_N - torch.where(targets_N < 0, none_N, found_N)
