"""The projection: the only part that learns.

```
features_PVE ─▶ pieces ─▶ Linear ─▶ GELU ─▶ Linear →D ─┬──────────────────────┬─┬──────────────────────────┬─▶
                                                       └─▶ attention over them ┘ └─▶ read, cut into tokens ─┘
             ─▶ merge ─┬──────────────────────┬─▶ RMS of text ─▶ memory_PVD
                       └─▶ attention over them ┘
```

With `merge`, a memory token is the sum of its pieces, each through a matrix of its own: the last starts as it is and
the others at zero, so that a projection of more pieces begins as one of fewer. Without it, the last stands for all.
With `read_tokens`, the pieces' letters are read, and the embeddings of the LLM's tokens for that text stand in the
place of the pieces, and nothing else of these goes on; with `deal_tokens` they are dealt out evenly over a page.

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
from ocrmem.model.reader import PageReader, dealt_evenly

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
        self.deal_tokens, self.pieces = settings.deal_tokens, settings.pieces
        hidden_size = settings.hidden_size or embedding_width
        if feature_width % settings.pieces:
            raise ConfigError(
                f"projection.pieces={settings.pieces} does not divide the encoder's feature width {feature_width}; "
                "choose a divisor."
            )
        self.piece_width = feature_width // settings.pieces
        self.linear1 = nn.Linear(self.piece_width, hidden_size, dtype=torch.float32)
        self.linear2 = nn.Linear(hidden_size, embedding_width, dtype=torch.float32)
        self.attention: PageAttention | None = None
        if settings.kind == "attention":
            self.attention = PageAttention(
                embedding_width,
                num_layers=settings.num_layers,
                num_heads=settings.num_heads,
                mlp_ratio=settings.mlp_ratio,
            )
        self.reader: PageReader | None = None
        if settings.read_tokens:
            if embeddings_CD is None or not embeddings_CD.numel():
                raise ConfigError(
                    f"projection.read_tokens={settings.read_tokens} needs the LLM's input embeddings in one piece, and "
                    "got none. Where DeepSpeed's ZeRO-3 shares out weights while they are loaded, load the LLM "
                    "without it."
                )
            self.reader = PageReader(embeddings_CD, read_tokens=settings.read_tokens, tokenizer=tokenizer)
        matrices = [
            nn.Linear(embedding_width, embedding_width, bias=False, dtype=torch.float32)
            for _ in range(settings.merge * (settings.pieces + SPARE_TOKENS * settings.deal_tokens))
        ]
        for number, matrix in enumerate(matrices):
            (nn.init.zeros_ if number else nn.init.eye_)(matrix.weight)
        self.merge = nn.ModuleList(matrices)
        self.merged: PageAttention | None = None
        if settings.merged_layers:
            self.merged = PageAttention(
                embedding_width,
                num_layers=settings.merged_layers,
                num_heads=settings.num_heads,
                mlp_ratio=settings.mlp_ratio,
            )
        self.gain_D = nn.Parameter(torch.ones(embedding_width, dtype=torch.float32)) if settings.gain else None
        self.register_buffer("embedding_rms", torch.tensor(embedding_rms, dtype=torch.float32))

    def forward(
        self,
        features_PVE: torch.Tensor | None,
        page_num_tokens_P: torch.Tensor | None = None,
        *,
        token_ids_PVT: torch.Tensor | None = None,
        letters_PVL: torch.Tensor | None = None,
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

        Returns:
            memory_PVD in float32 (or the autocast type), every token of RMS `embedding_rms` times its gain; with
            `letters_PVL` the pair of it and the cross entropy of reading them, in nats a piece.

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
                if token_ids_PVT is None:
                    assert pieces_PVD is not None
                    token_ids_PVT = self.reader.read(pieces_PVD, used_P)
                read_PVRD, present_PVR = self.reader(token_ids_PVT, used_P)
                if self.deal_tokens:
                    memory_PVD = self._dealt(read_PVRD, present_PVR, pieces, page_num_tokens_P)
                else:
                    memory_PVD = self._merged(read_PVRD.sum(dim=2), pieces)
            if self.merged is not None:
                memory_PVD = self.merged(memory_PVD, page_num_tokens_P)
        normed_PVD = F.rms_norm(memory_PVD.float(), memory_PVD.shape[-1:], eps=1e-6) * self.embedding_rms
        memory_PVD = normed_PVD if self.gain_D is None else normed_PVD * self.gain_D
        return memory_PVD if letters_PVL is None else (memory_PVD, reading_loss)

    def _seen(self, features_PVE: torch.Tensor, pieces: int, used_P: torch.Tensor | None) -> torch.Tensor:
        """What the layers over pieces make of them, [P, V × pieces, D]."""
        cut = features_PVE.to(self.compute_dtype or torch.float32)
        cut = cut.reshape(cut.shape[0], cut.shape[1] * pieces, self.piece_width)
        pieces_PVD = self.linear2(F.gelu(self.linear1(cut)))
        return pieces_PVD if self.attention is None else self.attention(pieces_PVD, used_P)

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

    def _dealt(
        self,
        read_PVRD: torch.Tensor,
        present_PVR: torch.Tensor,
        pieces: int,
        page_num_tokens_P: torch.Tensor | None,
    ) -> torch.Tensor:
        """Memory tokens of text tokens, by `ProjectionSettings.deal_tokens`; the first matrix is that of the last text
        token of a memory token."""
        pages, count, readings, _ = read_PVRD.shape
        self._check_pieces(pieces + SPARE_TOKENS, pieces)
        slots = count // pieces
        used_P = page_num_tokens_P
        if used_P is None:
            used_P = present_PVR.new_full((pages,), slots, dtype=torch.int64)
        piece_M = torch.arange(count * readings, device=present_PVR.device) // readings
        present_PM = present_PVR.flatten(1) & (piece_M < used_P[:, None] * pieces)
        dealt_PVKD = dealt_evenly(read_PVRD.flatten(1, 2), present_PM, used_P, (slots, pieces + SPARE_TOKENS))
        tokens = zip(self.merge, dealt_PVKD.unbind(dim=2), strict=False)
        return torch.stack([matrix(read_PVD) for matrix, read_PVD in tokens]).sum(dim=0)

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

    def forward(self, memory_PVD: torch.Tensor, page_num_tokens_P: torch.Tensor | None) -> torch.Tensor:
        """memory_PVD in, memory_PVD out; unused tokens are masked as keys."""
        positions_V = torch.arange(memory_PVD.shape[1], device=memory_PVD.device)
        mask_P11V = None
        if page_num_tokens_P is not None:
            # A page without any token in use would have no key at all and give NaN: let it see its first.
            mask_P11V = (positions_V < page_num_tokens_P.clamp(min=1)[:, None])[:, None, None, :]
        rotary_2VH = rotary(positions_V, self.head_width).to(memory_PVD.dtype)
        for layer in self.layers:
            memory_PVD = layer(memory_PVD, mask_P11V, rotary_2VH)
        return memory_PVD


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

    def forward(
        self, hidden_PVD: torch.Tensor, mask_P11V: torch.Tensor | None, rotary_2VH: torch.Tensor
    ) -> torch.Tensor:
        """hidden_PVD in, hidden_PVD out."""
        pages, tokens, width = hidden_PVD.shape
        qkv = self.qkv(self.norm1(hidden_PVD)).view(pages, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = turned(query, rotary_2VH), turned(key, rotary_2VH)
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


def rotary(positions_V: torch.Tensor, width: int) -> torch.Tensor:
    """Cosine and sine of the rotary angles, float32 [2, V, width]."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, width, 2, device=positions_V.device) / width)
    angles = (positions_V[:, None] * frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def turned(heads: torch.Tensor, rotary_2VH: torch.Tensor) -> torch.Tensor:
    """Queries or keys [P, heads, V, H] turned by their positions."""
    first, second = heads.chunk(2, dim=-1)
    return heads * rotary_2VH[0].to(heads.dtype) + torch.cat([-second, first], dim=-1) * rotary_2VH[1].to(heads.dtype)
