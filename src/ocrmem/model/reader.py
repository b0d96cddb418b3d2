"""Reading pieces of a page: their letters, which the LLM's own tokenizer cuts into tokens.

```
pieces_PVD ─▶ letters of each piece ─▶ text of the page ─▶ tokenizer ─▶ token ids ─▶ the LLM's embeddings
```

How an LLM cuts a word into tokens is a table of tens of thousands of merges. A projection that had to learn it read
rare words wrongly, letter by letter rightly seen (docs/log.md); the tokenizer has the table. So the letters are
what is learnt, from the cross entropy of reading them, and no gradient of the memory goes beyond the embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from ocrmem.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPHABET = (
    "\n" + "".join(map(chr, range(0x20, 0x7F))) + "".join(map(chr, range(0xA1, 0x180))) + "‐‑–—―‘’‚“”„†‡•…′″‹›€™−ʻʼ"
)
"""Letters that are read: those of Western and Central Europe, with their marks. More come in at the end, since an
adapter has a row for each."""
NONE, OTHER = 0, 1
"""What a piece is read as beyond its last letter, and for a letter that is not in the alphabet."""
UNKNOWN = "?"
"""Stands in the text for `OTHER`."""
BLANKS = "\t\u00a0\u2007\u2009\u200a\u202f\u3000"
"""Drawn as a space is, and read as one."""
LETTERS = 5
"""Most letters of a piece: of four cells, and a space where a line ends."""
_LETTER_OF = ["", UNKNOWN, *dict.fromkeys(ALPHABET)]
_CODES = np.full(0x10000, OTHER, dtype=np.int16)
_CODES[[ord(letter) for letter in _LETTER_OF[2:]]] = np.arange(2, len(_LETTER_OF))
_CODES[[ord(blank) for blank in BLANKS]] = _CODES[ord(" ")]


def letter_codes(text: str) -> np.ndarray:
    """int16 [characters]: what each is read as."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return _CODES[np.where(points < len(_CODES), points, 0xFFFF)]


def unread(text: str) -> str:
    """The characters of a text that are not in the alphabet, in order."""
    return "".join(text[place] for place in np.flatnonzero(letter_codes(text) == OTHER))


def page_cutter(tokenizer: PreTrainedTokenizerBase | None) -> Tokenizer:
    """A tokenizer's own copy for `cut_pages`, which neither pads nor shortens, and which no other thread changes.

    Raises:
        ConfigError: there is none, or it does not say where its tokens are in the text.
    """
    if tokenizer is None or not tokenizer.is_fast:
        given = "no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__}, which is no fast tokenizer"
        raise ConfigError(
            f"the projection reads letters (projection.read_tokens) and was given {given}. Give the LLM's: "
            "MEMModel(…, tokenizer=AutoTokenizer.from_pretrained(…)), or from_pretrained(…, tokenizer=…)."
        )
    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    own.no_padding()
    own.no_truncation()
    return own


def cut_pages(letters_PVL: np.ndarray, cutter: Tokenizer) -> np.ndarray:
    """Text tokens that begin within each piece, int64 [P, V, `LETTERS`], in order, then -1.

    A page's letters are one text, without the space that it may end with, since the next page is cut apart from it. A
    piece has no more tokens than letters.

    Args:
        letters_PVL: as `letter_codes` has them; what is beyond a piece's first `NONE` is left out.
        cutter: of `page_cutter`.
    """
    letters_PVL = np.where(np.cumprod(letters_PVL != NONE, axis=2), letters_PVL, NONE)
    texts = ["".join(_LETTER_OF[code] for code in letters_VL.flat) for letters_VL in letters_PVL]
    texts = [text[:-1] if text.endswith(" ") else text for text in texts]
    ids_PVT = np.full(letters_PVL.shape, -1, dtype=np.int64)
    for page, encoding in enumerate(cutter.encode_batch(texts, add_special_tokens=False)):
        firsts_V = np.cumsum((letters_PVL[page] != NONE).sum(axis=1))[:-1]
        starts_T = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        piece_T = np.searchsorted(firsts_V, starts_T, side="right")
        place_T = np.arange(len(piece_T)) - np.searchsorted(piece_T, piece_T)
        kept_T = place_T < LETTERS  # of a letter of several bytes there may be several
        ids_PVT[page, piece_T[kept_T], place_T[kept_T]] = np.array(encoding.ids, dtype=np.int64)[kept_T]
    return ids_PVT


class PageReader(nn.Module):
    """Reads the letters of pieces, which text tokens they are, and gives the embeddings of those.

    Args:
        embeddings_CD: the LLM's input embeddings, frozen; kept in float32, and no part of an adapter. What is given of
            them is scaled to a root mean square of 1.
        tokenizer: the LLM's, a fast one; no part of an adapter. None: nothing can be read.
    """

    embeddings_CD: torch.Tensor

    def __init__(self, embeddings_CD: torch.Tensor, *, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__()
        width = embeddings_CD.shape[1]
        self.tokenizer = tokenizer
        self._cutter: Tokenizer | None = None
        self.letters = nn.Linear(width, LETTERS * len(_LETTER_OF), dtype=torch.float32)
        self.value = nn.Linear(width, width, bias=False, dtype=torch.float32)
        nn.init.eye_(self.value.weight)
        table = embeddings_CD.detach().to(torch.float32, copy=True)
        self.scale = 1.0 if table.is_meta else float(table.square().mean().rsqrt())
        self.register_buffer("embeddings_CD", table, persistent=False)

    def forward(self, token_ids_PVK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of text tokens.

        Args:
            token_ids_PVK: int64, -1 where there is no token.

        Returns:
            The embeddings [P, V, K, D], zeros where there is no token, and bool [P, V, K]: where there is.
        """
        present_PVK = token_ids_PVK >= 0
        read_PVKD = self.value(self.embeddings_CD[token_ids_PVK.clamp(min=0)] * self.scale)
        return read_PVKD * present_PVK[..., None], present_PVK

    def logits(self, pieces_PVD: torch.Tensor) -> torch.Tensor:
        """Of each letter of each piece, float32 [P, V, `LETTERS`, letters]; the first are `NONE` and `OTHER`."""
        seen_PVD = F.rms_norm(pieces_PVD, pieces_PVD.shape[-1:])
        return self.letters(seen_PVD).float().unflatten(-1, (LETTERS, len(_LETTER_OF)))

    def loss(self, pieces_PVD: torch.Tensor, used_P: torch.Tensor | None, letters_PVL: torch.Tensor) -> torch.Tensor:
        """Cross entropy of reading the letters of the pieces in use, in nats a piece.

        Args:
            letters_PVL: what there is to read, by `letter_codes`; `NONE` beyond a piece's last letter.
        """
        used_PV = in_use(pieces_PVD, used_P)
        losses = F.cross_entropy(
            self.logits(pieces_PVD).flatten(0, 2), letters_PVL.long().flatten(), reduction="none"
        ).unflatten(0, letters_PVL.shape)
        return (losses.sum(dim=-1) * used_PV).sum() / used_PV.sum().clamp(min=1)

    @torch.no_grad()
    def read(self, pieces_PVD: torch.Tensor, used_P: torch.Tensor | None = None) -> torch.Tensor:
        """Text tokens that begin within each piece, int64 [P, V, `LETTERS`], then -1, by `cut_pages`.

        Raises:
            ConfigError: there is no fast tokenizer.
        """
        if self._cutter is None:
            self._cutter = page_cutter(self.tokenizer)
        letters_PVL = self.logits(pieces_PVD).argmax(dim=-1) * in_use(pieces_PVD, used_P)[..., None]
        return torch.from_numpy(cut_pages(letters_PVL.cpu().numpy(), self._cutter)).to(pieces_PVD.device)


def in_use(pages_PV: torch.Tensor, used_P: torch.Tensor | None) -> torch.Tensor:
    """bool [P, V]: which tokens, or pieces, of each page are in use; `pages_PV` gives the shape and the device."""
    pages, tokens = pages_PV.shape[:2]
    if used_P is None:
        return torch.ones(pages, tokens, dtype=torch.bool, device=pages_PV.device)
    return torch.arange(tokens, device=pages_PV.device) < used_P[:, None]


def dealt_evenly(token_ids_PM: torch.Tensor, slots_P: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Text tokens of a page, found among its pieces' places for them, dealt out evenly and in order over its memory
    tokens.

    Token c of T goes to memory token ⌊c × slots / T⌋, as `training.packing.token_slots` deals those of a rival.

    Args:
        token_ids_PM: int64, a text token for each of the M places of each page, -1 where there is none.
        slots_P: memory tokens in use of each page.
        size: memory tokens of a page V, and K tokens of one that are kept.

    Returns:
        int64 [P, V, K]: each memory token's last K tokens in the order of the text, the last one at the end; -1 before
        them where it has fewer.
    """
    slots, kept = size
    present_PM = token_ids_PM >= 0
    order_PM = present_PM.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    total_P1 = present_PM.sum(dim=1, keepdim=True)
    used_P1 = slots_P[:, None].clamp(min=1)
    edges = torch.arange(slots + 1, device=token_ids_PM.device)
    begins_PV = torch.minimum((edges * total_P1 + used_P1 - 1) // used_P1, total_P1)  # and past the last one
    back_K = torch.arange(kept, 0, -1, device=token_ids_PM.device)
    number_PVK = begins_PV[:, 1:, None] - back_K
    found_PVK = number_PVK >= begins_PV[:, :-1, None]
    place_PN = order_PM.gather(1, number_PVK.clamp(min=0).flatten(1))
    dealt_PVK = token_ids_PM.gather(1, place_PN).unflatten(1, (slots, kept))
    return dealt_PVK.where(found_PVK, -1)
