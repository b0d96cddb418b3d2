"""The projection: the only part that learns.

```
features_PVE ─▶ pieces ─▶ Linear ─▶ GELU ─▶ Linear →D [─▶ attention over pieces] ─┐
┌─────────────────────────────────────────────────────────────────────────────────┘
├─▶ letters ─▶ tokens ─▶ embeddings [─▶ attention over tokens] ─┐
└───────────────────────────────────────────────────────────────┴─▶ merge [─▶ attention] ─▶ RMS of text ─▶ memory_PVD
```

With `merge`, a memory token is the sum of its pieces, each through a matrix of its own: the last starts as it is and
the others at zero, so that a projection of more pieces begins as one of fewer. Without it, the last stands for all.
With `read_tokens`, the pieces' letters are read, and the embeddings of the LLM's tokens for that text stand in the
place of the pieces, and nothing else of these goes on; with `deal_tokens` they are dealt out evenly over a page, and
merged by matrices that all start as they are, for their sum.

Its weights are always float32, whatever type the LLM has: in bfloat16 AdamW at a learning rate of 1e-5 would move
2% of the weights a step and learn almost nothing. Its output has the RMS of the LLM's embeddings, so that memory
tokens enter the frozen LLM at the scale of text.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ocrmem.config.projection import ProjectionSettings
from ocrmem.errors import ConfigError, SpliceError
from ocrmem.model.reader import PageReader, dealt_evenly, in_use

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROTARY_BASE = 100.0
"""Base of the rotary angles (Su et al. 2021, who have 10,000): what is read together is a few tokens apart."""

SPARE_TOKENS = 1
"""With `deal_tokens`, a memory token keeps as many text tokens as it has pieces and so many more; prose has 0.8 in a
piece of 4 characters, figures and codes up to 4."""
KERNELS = [
    SDPBackend.OVERRIDEABLE,  # of devices that bring their own
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Attention without cuDNN's kernel, which the host sets up anew for every number of pages, 7 ms each."""


class Projection(nn.Module):
    """Features of a page to memory tokens of the LLM's width.

    Args:
        settings: kind and sizes.
        feature_width: E.
        embedding_width: D.
        embedding_rms: root mean square of the LLM's input embeddings, to which every output token is scaled.
        embeddings_CD: the LLM's input embeddings, for `settings.read_tokens` alone.
        tokenizer: the LLM's, likewise; None: nothing can be read until `reader.tokenizer` is set.
    """

    embedding_rms: torch.Tensor
    compute_dtype: torch.dtype | None = None
    """Type of the arithmetic under autocast, set while training on a GPU; None: float32, or the caller's autocast."""

    def __init__(
        self,
        settings: ProjectionSettings,
        *,
        feature_width: int,
        embedding_width: int,
        embedding_rms: float,
        embeddings_CD: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.feature_width = feature_width
        self.read_tokens, self.deal_tokens, self.pieces = settings.read_tokens, settings.deal_tokens, settings.pieces
        hidden_size = settings.hidden_size or embedding_width
        if feature_width % settings.pieces:
            raise ConfigError(
                f"projection.pieces={settings.pieces} does not divide the encoder's feature width {feature_width}; "
                "choose a divisor."
            )
        self.piece_width = feature_width // settings.pieces
        self.linear1 = nn.Linear(self.piece_width, hidden_size, dtype=torch.float32)
        self.linear2 = nn.Linear(hidden_size, embedding_width, dtype=torch.float32)

        def attention(num_layers: int) -> PageAttention | None:
            if settings.kind != "attention" or not num_layers:
                return None
            ratio = settings.mlp_ratio
            return PageAttention(embedding_width, num_layers=num_layers, num_heads=settings.num_heads, mlp_ratio=ratio)

        self.attention = attention(settings.num_layers)
        self.reader: PageReader | None = None
        if settings.read_tokens:
            if embeddings_CD is None or not embeddings_CD.numel():
                raise ConfigError(
                    f"projection.read_tokens={settings.read_tokens} needs the LLM's input embeddings in one piece, and "
                    "got none. Where DeepSpeed's ZeRO-3 shares out weights while they are loaded, load the LLM "
                    "without it."
                )
            self.reader = PageReader(embeddings_CD, tokenizer=tokenizer)
        self.text = attention(settings.text_layers)
        matrices = [
            nn.Linear(embedding_width, embedding_width, bias=False, dtype=torch.float32)
            for _ in range(settings.merge * (settings.pieces + SPARE_TOKENS * settings.deal_tokens))
        ]
        for number, matrix in enumerate(matrices):
            (nn.init.zeros_ if number and not settings.deal_tokens else nn.init.eye_)(matrix.weight)
        self.merge = nn.ModuleList(matrices)
        self.merged = attention(settings.merged_layers)
        self.gain_D = nn.Parameter(torch.ones(embedding_width, dtype=torch.float32)) if settings.gain else None
        self.register_buffer("embedding_rms", torch.tensor(embedding_rms, dtype=torch.float32))

    def forward(
        self,
        features_PVE: torch.Tensor | None,
        page_num_tokens_P: torch.Tensor | None = None,
        *,
        token_ids_PVT: torch.Tensor | None = None,
        letters_PVL: torch.Tensor | None = None,
        reading_alone: bool = False,
    ) -> Any:
        """Project.

        Args:
            features_PVE: the encoder's features, any floating type. E may be any number of pieces: `pieces` as the
                settings say, or fewer for less compression. None: the memory is made of `token_ids_PVT` alone, with
                all the settings' pieces to a memory token.
            page_num_tokens_P: tokens in use on each page; attention does not look beyond them. None: all V.
            token_ids_PVT: [P, V × pieces, T], the text tokens that begin within each piece, in order, then -1; for
                `settings.read_tokens` alone. The memory is made of them, as if the pages were read rightly.
            letters_PVL: [P, V × pieces, `reader.LETTERS`], what there is to read of each piece, likewise.
            reading_alone: make no memory, but read `letters_PVL` for the loss alone.

        Returns:
            memory_PVD in float32 (or the autocast type), every token of RMS `embedding_rms` times its gain; with
            `letters_PVL` the pair of it, or of None with `reading_alone`, and the cross entropy of reading the
            letters, in nats a piece.

        Raises:
            SpliceError: more pieces to a memory token than the projection has; `token_ids_PVT` or `letters_PVL` where
                nothing is read, or of another number of pieces.
        """
        pieces = self.pieces if features_PVE is None else features_PVE.shape[2] // self.piece_width
        self._check_text(features_PVE, pieces, token_ids_PVT, letters_PVL)
        used_P = None if page_num_tokens_P is None else page_num_tokens_P * pieces
        device, lower = self.linear1.weight.device, self.compute_dtype is not None
        with torch.autocast(device.type, self.compute_dtype, enabled=True) if lower else nullcontext():
            pieces_PVD, reading_loss = None, None
            if features_PVE is not None and (token_ids_PVT is None or letters_PVL is not None):
                pieces_PVD = self._seen(features_PVE, pieces, used_P)
            if self.reader is None:
                assert pieces_PVD is not None  # by the check above
                memory_PVD = self._merged(pieces_PVD, pieces)
            else:
                if letters_PVL is not None:
                    assert pieces_PVD is not None
                    reading_loss = self.reader.loss(pieces_PVD, used_P, letters_PVL)
                    if reading_alone:
                        return None, reading_loss
                if token_ids_PVT is None:
                    assert pieces_PVD is not None
                    token_ids_PVT = self.reader.read(pieces_PVD, used_P)
                memory_PVD = self._of_text(token_ids_PVT, pieces, page_num_tokens_P)
            if self.merged is not None:
                memory_PVD = self.merged(memory_PVD, in_use(memory_PVD, page_num_tokens_P))
        normed_PVD = F.rms_norm(memory_PVD.float(), memory_PVD.shape[-1:], eps=1e-6) * self.embedding_rms
        memory_PVD = normed_PVD if self.gain_D is None else normed_PVD * self.gain_D
        return memory_PVD if letters_PVL is None else (memory_PVD, reading_loss)

    def _seen(self, features_PVE: torch.Tensor, pieces: int, used_P: torch.Tensor | None) -> torch.Tensor:
        """What the layers over pieces make of them, [P, V × pieces, D]."""
        cut = features_PVE.to(self.compute_dtype or torch.float32)
        cut = cut.reshape(cut.shape[0], cut.shape[1] * pieces, self.piece_width)
        pieces_PVD = self.linear2(F.gelu(self.linear1(cut)))
        return pieces_PVD if self.attention is None else self.attention(pieces_PVD, in_use(pieces_PVD, used_P))

    def reading_parameters(self) -> list[nn.Parameter]:
        """Those that learn from the letters of pages alone: the memory's gradient does not reach them."""
        if self.reader is None:
            return []
        parts = (self.linear1, self.linear2, self.attention, self.reader.letters)
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def _check_text(
        self,
        features_PVE: torch.Tensor | None,
        pieces: int,
        token_ids_PVT: torch.Tensor | None,
        letters_PVL: torch.Tensor | None,
    ) -> None:
        if features_PVE is None and (token_ids_PVT is None or letters_PVL is not None):
            raise SpliceError(
                "no features came to the projection, which needs them where letters are to be read and where no text "
                "tokens are given; give them."
            )
        for what, given in (("text tokens", token_ids_PVT), ("letters", letters_PVL)):
            if given is None:
                continue
            if self.reader is None:
                raise SpliceError(
                    f"{what} came to a projection with projection.read_tokens=0, which reads none; leave them out, or "
                    "make one that reads."
                )
            if features_PVE is None:
                expected = (given.shape[0], given.shape[1] // pieces * pieces)
            else:
                expected = (features_PVE.shape[0], features_PVE.shape[1] * pieces)
            if given.shape[:2] != expected:
                raise SpliceError(
                    f"{what} to read have the shape {list(given.shape)}, expected [{expected[0]}, {expected[1]}, …]: "
                    "those of every piece of every memory token."
                )

    def _check_pieces(self, matrices: int, pieces: int) -> None:
        if matrices > len(self.merge):
            most = len(self.merge) - (matrices - pieces)
            raise SpliceError(
                f"features of {pieces} pieces to a memory token, expected projection.pieces={most} at most."
            )

    def _merged(self, pieces_PVD: torch.Tensor, pieces: int) -> torch.Tensor:
        """Every `pieces` neighbours as one, by `ProjectionSettings.merge`; the first matrix is the last piece's."""
        if not self.merge:
            return pieces_PVD[:, pieces - 1 :: pieces]
        self._check_pieces(pieces, pieces)
        last_first = [pieces_PVD[:, pieces - 1 - number :: pieces] for number in range(pieces)]
        return torch.stack([matrix(x) for matrix, x in zip(self.merge, last_first, strict=False)]).sum(dim=0)

    def _of_text(
        self, token_ids_PVT: torch.Tensor, pieces: int, page_num_tokens_P: torch.Tensor | None
    ) -> torch.Tensor:
        """Memory tokens of text tokens, before `merged`: each piece's, or dealt out by
        `ProjectionSettings.deal_tokens`. Of dealt ones the first matrix is that of the last of a memory token."""
        assert self.reader is not None
        slots = token_ids_PVT.shape[1] // pieces
        used_P = page_num_tokens_P
        if used_P is None:
            used_P = token_ids_PVT.new_full((len(token_ids_PVT),), slots)
        ids_PVK = token_ids_PVT[..., : self.read_tokens].long()
        ids_PVK = ids_PVK.where(in_use(ids_PVK, used_P * pieces)[..., None], -1)
        if self.deal_tokens:
            self._check_pieces(pieces + SPARE_TOKENS, pieces)
            ids_PVK = dealt_evenly(ids_PVK.flatten(1), used_P, (slots, pieces + SPARE_TOKENS))
        read_PVKD, present_PVK = self.reader(ids_PVK)
        if self.text is not None:
            present_PN = present_PVK.flatten(1)
            numbers_PN = present_PN.cumsum(dim=1)  # of each token on its page
            text_PND = self.text(read_PVKD.flatten(1, 2), present_PN, numbers_PN)
            read_PVKD = text_PND.unflatten(1, present_PVK.shape[1:]) * present_PVK[..., None]
        if not self.deal_tokens:
            return self._merged(read_PVKD.sum(dim=2), pieces)
        last_first = zip(self.merge, reversed(read_PVKD.unbind(dim=2)), strict=False)
        return torch.stack([matrix(read_PVD) for matrix, read_PVD in last_first]).sum(dim=0)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Let `.to()`, `.half()`, `.cuda()`… move the projection, but never out of float32."""

        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point() or moved.dtype == torch.float32:
                return moved
            return tensor.to(device=moved.device, dtype=torch.float32)

        return super()._apply(keep_float32, recurse)


class PageAttention(nn.Module):
    """Pre-norm transformer layers over the tokens of one page, with rotary positions."""

    def __init__(self, width: int, *, num_layers: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        if width % (2 * num_heads):
            raise ConfigError(
                f"projection.num_heads={num_heads} does not divide the LLM's embedding width {width} into heads of an "
                "even width; choose another divisor."
            )
        self.head_width = width // num_heads
        self.layers = nn.ModuleList(PageAttentionLayer(width, num_heads, mlp_ratio) for _ in range(num_layers))

    def forward(
        self, hidden_PVD: torch.Tensor, used_PV: torch.Tensor, positions_PV: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden_PVD in, hidden_PVD out.

        Args:
            used_PV: bool, the tokens that there are; the others are masked as keys.
            positions_PV: for the rotary angles; None: their places on the page.
        """
        place_V = torch.arange(hidden_PVD.shape[1], device=hidden_PVD.device)
        # A page without any token in use would have no key at all and give NaN: let it see its first.
        mask_PV = used_PV | ((place_V == 0) & ~used_PV.any(dim=1, keepdim=True))
        rotary_2PVH = rotary(place_V[None] if positions_PV is None else positions_PV, self.head_width)
        rotary_2P1VH = rotary_2PVH[:, :, None].to(hidden_PVD.dtype)
        for layer in self.layers:
            hidden_PVD = layer(hidden_PVD, mask_PV[:, None, None, :], rotary_2P1VH)
        return hidden_PVD


class PageAttentionLayer(nn.Module):
    """One pre-norm layer: bidirectional attention, then a GELU MLP `mlp_ratio` times as wide."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp1 = nn.Linear(width, mlp_ratio * width)
        self.mlp2 = nn.Linear(mlp_ratio * width, width)

    def forward(self, hidden_PVD: torch.Tensor, mask_P11V: torch.Tensor, rotary_2P1VH: torch.Tensor) -> torch.Tensor:
        """hidden_PVD in, hidden_PVD out."""
        pages, tokens, width = hidden_PVD.shape
        qkv = self.qkv(self.norm1(hidden_PVD)).view(pages, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = turned(query, rotary_2P1VH), turned(key, rotary_2P1VH)
        with sdpa_kernel(KERNELS):
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_P11V)
        hidden_PVD = hidden_PVD + self.out(attended.transpose(1, 2).reshape(pages, tokens, width))
        return hidden_PVD + self.mlp2(F.gelu(self.mlp1(self.norm2(hidden_PVD))))


def compile_projection(proj: Projection, **options: Any) -> None:
    """Compile the forward of each attention layer with a gradient, which is run for every number of pages and of
    tokens; as one graph for all of them. Without a gradient they run as they are: that is rare while training.

    Args:
        options: of `torch.compile`.
    """
    plain = PageAttentionLayer.forward
    compiled = torch.compile(plain, dynamic=True, **options)

    def forward(layer: PageAttentionLayer, *arguments: Any) -> torch.Tensor:
        return (compiled if torch.is_grad_enabled() else plain)(layer, *arguments)

    for module in proj.modules():
        if isinstance(module, PageAttentionLayer):
            module.forward = types.MethodType(forward, module)  # a method, so that a copy's is the copy's own


def rotary(positions_PV: torch.Tensor, width: int) -> torch.Tensor:
    """Cosine and sine of the rotary angles, float32 [2, P, V, width]."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, width, 2, device=positions_PV.device) / width)
    angles = (positions_PV[..., None] * frequencies).repeat(1, 1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def turned(heads: torch.Tensor, rotary_2P1VH: torch.Tensor) -> torch.Tensor:
    """Queries or keys [P, heads, V, H] turned by their positions."""
    cosine, sine = rotary_2P1VH.to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine
