"""Reading pieces of a page as tokens of the LLM, by their spelling.

A projection without it has to learn what embedding stands for each word that it recognises: for SmolLM2-135M a table
of 28 M numbers, which the LLM has, from texts in which most words are rare. With it, it has to learn the letters: what
is seen in a piece is compared with the spelling of every token of the vocabulary, so that one that was never seen in
training can be read, and what is read is given as its embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

FIRST, LAST = 7, 2
"""Bytes of a token that are compared: from its first on, and where it is longer its last ones. Of the text tokens of
2 M characters of English 0.06% are spelled like a more frequent one, so far; with the first 10 alone 1.0%."""
BYTES = 256
READING_SCALE = 40.0
"""By what a `TokenReading` multiplies cosines before its softmax, at the start; learnt for each dimension."""
SPELLING_WIDTH = 144
"""Width in which spellings are compared."""
CANDIDATES = 16_384
"""Tokens of the vocabulary that a step reads among where it learns to read: those on its pages, and others drawn anew
each time (sampled softmax, Jean et al. 2015). Otherwise all."""
LIKELIEST = 32
"""Tokens whose embeddings are mixed where no gradient is needed, those of the largest shares."""
PRESENT = 0.5
"""How sure a token must be for a piece to have it."""
CHUNK = 1024
"""Pieces that are read at once where no gradient is needed: the shares of 49,152 tokens take 200 MB then."""
LEAST_PIECES = 8
"""Each reading is of so many pieces in every step, if only to count nothing: distributed training expects a gradient of
every parameter from every process, and a compiled graph of any number of pieces begins with two."""


def spellings(vocabulary: Mapping[str, int], size: int) -> torch.Tensor:
    """How each token is spelled, uint8 [size, `FIRST` + `LAST`]: its bytes, 0 where it has none.

    Args:
        vocabulary: ids by token, as `tokenizer.get_vocab()` gives them: of a byte-level tokenizer, whose characters
            stand for bytes, or of one of characters with ▁ for a space.
        size: rows of the LLM's embedding; tokens beyond are left out, and rows without a token have no bytes.
    """
    byte_of = {ord(char): byte for byte, char in bytes_to_unicode().items()} | {ord("▁"): ord(" ")}
    spelled = [bytes(FIRST + LAST)] * size
    for token, row in vocabulary.items():
        found = b"".join(bytes([byte_of[ord(c)]]) if ord(c) in byte_of else c.encode("utf-8", "replace") for c in token)
        if row < size:
            spelled[row] = found[:FIRST].ljust(FIRST, b"\0") + found[FIRST:][-LAST:].ljust(LAST, b"\0")
    return torch.frombuffer(bytearray(b"".join(spelled)), dtype=torch.uint8).view(size, FIRST + LAST)


class VocabularyReader(nn.Module):
    """Gives the embeddings of the text tokens that each piece is read as.

    Args:
        embeddings_CD: the LLM's input embeddings, frozen; kept in float32, and no part of an adapter. What is read of
            them is scaled to a root mean square of 1.
        read_tokens: how many tokens are read of a piece, in the order of the text.
        vocabulary: ids by token, for `spellings`, which are part of an adapter; None: those of the adapter that is
            loaded, and until then all tokens are spelled alike.
    """

    embeddings_CD: torch.Tensor
    spellings_CL: torch.Tensor

    def __init__(
        self, embeddings_CD: torch.Tensor, *, read_tokens: int, vocabulary: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        size, width = embeddings_CD.shape
        self.readings = nn.ModuleList(TokenReading(width) for _ in range(read_tokens))
        # For each place of a token and each byte; a token's key is the sum over its places.
        # Only the directions of their sums count; the smaller they are, the faster these turn.
        letters = torch.randn((FIRST + LAST) * BYTES, SPELLING_WIDTH, dtype=torch.float32)
        self.letters = nn.Parameter(0.05 * letters)
        self.value = nn.Linear(width, width, bias=False, dtype=torch.float32)
        nn.init.eye_(self.value.weight)
        table = embeddings_CD.detach().to(torch.float32, copy=True)
        self.scale = 1.0 if table.is_meta else float(table.square().mean().rsqrt())
        self.register_buffer("embeddings_CD", table, persistent=False)
        self.register_buffer("spellings_CL", spellings(vocabulary or {}, size).to(table.device))

    def keys_CW(self, chosen_C: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors with which pieces are compared: of all tokens' spellings, or of those chosen."""
        if chosen_C is None:
            places_L = BYTES * torch.arange(FIRST + LAST, device=self.spellings_CL.device)
            return F.normalize(F.embedding_bag(self.spellings_CL + places_L, self.letters, mode="sum"), dim=-1)
        # The same as a product, whose gradient is one too: on a GPU that of a table whose rows are each looked up
        # thousands of times takes longer.
        values_N = torch.arange(BYTES, device=chosen_C.device, dtype=torch.uint8)
        spelled_CLN = self.spellings_CL[chosen_C][:, :, None] == values_N
        return F.normalize((spelled_CLN.flatten(1).to(self.letters.dtype) @ self.letters).float(), dim=-1)

    def forward(
        self,
        pieces_PVD: torch.Tensor | None,
        used_P: torch.Tensor | None = None,
        token_ids_PVT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Read.

        Args:
            pieces_PVD: what the layers before made of the pieces; None: nothing is read, and `token_ids_PVT` are given
                as if they had been.
            used_P: pieces in use on each page; None: all.
            token_ids_PVT: the text tokens that begin within each piece, in order, then -1.

        Returns:
            What was read [P, V, readings, D]; how surely there is a token [P, V, readings], from 0 to 1; and where
            `token_ids_PVT` is given, the cross entropy of reading them: nats a piece in use, all its readings together
            to the first that finds no token. Then no gradient of what was read goes beyond `value`, since an LLM's
            undoes reading (docs/log.md).
        """
        if pieces_PVD is None:
            assert token_ids_PVT is not None
            return self._taken(token_ids_PVT, used_P)
        pieces_ND = pieces_PVD.flatten(0, 1)
        loss = None
        if token_ids_PVT is not None:
            used_PV = _used(pieces_PVD, used_P)
            read_NRD, present_NR, loss = self._learn(pieces_ND, used_PV.flatten(), self._targets(token_ids_PVT))
        else:
            keys_CW = self.keys_CW()
            parts = (pieces_ND,) if torch.is_grad_enabled() else pieces_ND.split(CHUNK)
            found = [self._read(part_ND, keys_CW) for part_ND in parts]
            read_NRD, present_NR = (torch.cat(of_parts) for of_parts in zip(*found, strict=True))
        shape = pieces_PVD.shape[:2]
        return read_NRD.unflatten(0, shape), present_NR.unflatten(0, shape), loss

    def _taken(
        self, token_ids_PVT: torch.Tensor, used_P: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """The tokens themselves in the place of what is read."""
        ids_PVR = self._targets(token_ids_PVT).unflatten(0, token_ids_PVT.shape[:2])
        present_PVR = (ids_PVR >= 0) & _used(token_ids_PVT, used_P)[..., None]
        read_PVRD = self.value(self.embeddings_CD[ids_PVR.clamp(min=0)] * self.scale) * present_PVR[..., None]
        return read_PVRD, present_PVR.to(read_PVRD.dtype), None

    def _targets(self, token_ids_PVT: torch.Tensor) -> torch.Tensor:
        """int64 [N, readings]: the token of each reading, -1 where the piece has no such token."""
        wanted = len(self.readings)
        ids_NT = token_ids_PVT.flatten(0, 1)[:, :wanted].long()
        return F.pad(ids_NT, (0, wanted - ids_NT.shape[1]), value=-1)

    def _read(self, pieces_ND: torch.Tensor, keys_CW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each reading of each piece [N, readings, D], and how surely there is a token. What a piece is read as ends
        with its first none, and nothing is compared beyond that."""
        seen_ND = F.rms_norm(pieces_ND, pieces_ND.shape[-1:])
        goes_on_N = torch.ones(len(pieces_ND), dtype=torch.bool, device=pieces_ND.device)
        read, present = [], []
        for reading in self.readings:
            mixed_AD, none_A, _ = reading(seen_ND[goes_on_N], keys_CW, self.embeddings_CD)
            read_AD = self.value(mixed_AD * self.scale)
            read_ND = read_AD.new_zeros(len(pieces_ND), read_AD.shape[1])
            none_N = none_A.new_ones(len(pieces_ND))
            read_ND[goes_on_N], none_N[goes_on_N] = read_AD, none_A
            read.append(read_ND)
            present.append(1 - none_N)
            goes_on_N = none_N < 1 - PRESENT
        return torch.stack(read, dim=1), torch.stack(present, dim=1)

    def _learn(
        self, pieces_ND: torch.Tensor, used_N: torch.Tensor, targets_NR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same where the text is known, and the cross entropy of reading it: a second token is read of the pieces
        in use that have a first one, and so on."""
        table_CD, chosen_C, offset_C = self.embeddings_CD, None, None
        has_NR = targets_NR >= 0
        if torch.is_grad_enabled() and len(table_CD) > CANDIDATES:
            chosen_C, offset_C, targets_NR = _chosen(targets_NR, len(table_CD))
            table_CD = table_CD[chosen_C]
        keys_CW = self.keys_CW(chosen_C)
        seen_ND = F.rms_norm(pieces_ND, pieces_ND.shape[-1:])
        tokens_N = torch.where(used_N, has_NR.sum(dim=1), -1)
        most_first_N = tokens_N.argsort(descending=True)
        wanted = torch.stack([(tokens_N >= number).sum() for number in range(len(self.readings))]).tolist()
        goes_on_N = used_N
        read, present, total = [], [], pieces_ND.new_zeros((), dtype=torch.float32)
        for number, (reading, pieces) in enumerate(zip(self.readings, wanted, strict=True)):
            rows_A = most_first_N[: max(pieces, LEAST_PIECES)]
            seen_AD = seen_ND.index_select(0, rows_A)
            mixed_AD, none_A, losses_A = reading(seen_AD, keys_CW, table_CD, targets_NR[rows_A, number], offset_C)
            counts_A = tokens_N[rows_A] >= number
            total = total + (losses_A * counts_A).sum()
            goes_on_A = goes_on_N[rows_A] & counts_A
            read_AD = self.value(mixed_AD * self.scale) * goes_on_A[:, None]
            none_N = none_A.new_ones(len(pieces_ND))
            none_N[rows_A] = torch.where(goes_on_A, none_A.detach(), 1.0)
            read.append(read_AD.new_zeros(len(pieces_ND), read_AD.shape[1]).index_copy(0, rows_A, read_AD))
            present.append(1 - none_N)
            goes_on_N = none_N < 1 - PRESENT
        return torch.stack(read, dim=1), torch.stack(present, dim=1), total / used_N.sum().clamp(min=1)


def _used(pieces_PV: torch.Tensor, used_P: torch.Tensor | None) -> torch.Tensor:
    """bool [P, V]: which pieces of each page are in use."""
    pages, pieces = pieces_PV.shape[:2]
    if used_P is None:
        return torch.ones(pages, pieces, dtype=torch.bool, device=pieces_PV.device)
    return torch.arange(pieces, device=pieces_PV.device) < used_P[:, None]


def _chosen(targets_NR: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`CANDIDATES` tokens for a training step: the targets, and others at random.

    Returns:
        Their ids; what is added to their logits, so that each that was drawn stands for as many as it was drawn from;
        and the targets as places among them, -1 for none, -2 for one left out, where there are more targets than
        `CANDIDATES`.
    """
    priority_C = torch.rand(vocabulary, device=targets_NR.device)
    priority_C[targets_NR.clamp(min=0).flatten()] = 2.0
    priorities_K, chosen_K = priority_C.topk(CANDIDATES)
    targets = (priority_C == 2).sum()
    stands_for = (vocabulary - targets) / (CANDIDATES - targets).clamp(min=1)
    offset_K = torch.where(priorities_K == 2, 0.0, stands_for.log())
    place_C = torch.full((vocabulary,), -2, device=chosen_K.device)
    place_C[chosen_K] = torch.arange(CANDIDATES, device=chosen_K.device)
    return chosen_K, offset_K, torch.where(targets_NR < 0, -1, place_C[targets_NR.clamp(min=0)])


def _mixed(shares_NC: torch.Tensor, table_CD: torch.Tensor) -> torch.Tensor:
    """The embeddings [N, D] at their shares; without a gradient, of the likeliest alone."""
    if torch.is_grad_enabled():
        return shares_NC @ table_CD
    shares_NK, tokens_NK = shares_NC.topk(min(LIKELIEST, shares_NC.shape[1]), dim=-1)
    return torch.einsum("nk,nkd->nd", shares_NK, table_CD[tokens_NK])


def dealt_evenly(
    states_PMD: torch.Tensor, present_PM: torch.Tensor, slots_P: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Text tokens of a page, found among its readings, dealt out evenly and in order over its memory tokens.

    Token c of T goes to memory token ⌊c × slots / T⌋, as `training.packing.token_slots` deals those of a rival.

    Args:
        states_PMD: a state for each of the M readings of each page.
        present_PM: which of them are tokens.
        slots_P: memory tokens in use of each page.
        size: memory tokens of a page V, and K tokens of one that are kept.

    Returns:
        [P, V, K, D]: the states of each memory token's last K tokens, the last one first; zeros where it has fewer.
    """
    slots, kept = size
    order_PM = present_PM.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    total_P1 = present_PM.sum(dim=1, keepdim=True)
    used_P1 = slots_P[:, None].clamp(min=1)
    edges = torch.arange(slots + 1, device=states_PMD.device)
    begins_PV = torch.minimum((edges * total_P1 + used_P1 - 1) // used_P1, total_P1)  # and past the last one
    back_K = torch.arange(kept, device=states_PMD.device)
    number_PVK = begins_PV[:, 1:, None] - 1 - back_K
    found_PVK = number_PVK >= begins_PV[:, :-1, None]
    place_PN = order_PM.gather(1, number_PVK.clamp(min=0).flatten(1))
    states_PND = states_PMD.gather(1, place_PN[..., None].expand(-1, -1, states_PMD.shape[2]))
    return states_PND.unflatten(1, (slots, kept)) * found_PVK[..., None]


class TokenReading(nn.Module):
    """One token of each piece, or none: how it is spelled, and what stands for none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, SPELLING_WIDTH, dtype=torch.float32)
        # For each dimension, since neither FSDP2 nor ZeRO-3 shares out a single number.
        self.log_scale = nn.Parameter(torch.full((SPELLING_WIDTH,), math.log(READING_SCALE), dtype=torch.float32))
        self.none_W = nn.Parameter(torch.zeros(SPELLING_WIDTH, dtype=torch.float32))

    def forward(
        self,
        seen_ND: torch.Tensor,
        keys_CW: torch.Tensor,
        table_CD: torch.Tensor,
        targets_N: torch.Tensor | None = None,
        offset_C: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Read.

        Args:
            keys_CW: of the tokens, and
            table_CD: their embeddings.
            targets_N: the token of each piece, as a place among them; -1 for none, -2 for one left out.
            offset_C: added to the logits.

        Returns:
            The embeddings mixed at the tokens' shares [N, D]; the share of none [N]; and where targets are given,
            minus the logarithm of each target's share [N], 0 for one left out. Then the mixture has no gradient.
        """
        queries_NW = F.normalize(self.query(seen_ND).float(), dim=-1) * self.log_scale.exp()
        logits_NC = (queries_NW @ keys_CW.T).float()
        if offset_C is not None:
            logits_NC = logits_NC + offset_C
        none_N = (queries_NW * self.none_W).sum(dim=-1)
        total_N = torch.logaddexp(logits_NC.logsumexp(dim=-1), none_N)
        shares_NC = (logits_NC - total_N[:, None]).exp()
        none_share_N = (none_N - total_N).exp()
        if targets_N is None:
            return _mixed(shares_NC, table_CD), none_share_N, None
        # From the same logits as the total: computed apart, it is rounded otherwise under autocast, and a run learnt to
        # gain 2 nats a piece by that alone (docs/log.md).
        found_N = logits_NC.gather(-1, targets_N.clamp(min=0)[:, None])[:, 0]
        losses_N = total_N - torch.where(targets_N < 0, none_N, found_N)
        return _mixed(shares_NC.detach(), table_CD), none_share_N, losses_N * (targets_N != -2)
