"""DeepEncoder's second half: CLIP-L's transformer over SAM's feature map in place of patches.

Attribute names are those of the original checkpoint's tensors (`pre_layrnorm` is CLIP's own spelling).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ocrmem.encoders.deepencoder_sam import resize_positions


@dataclass(frozen=True, kw_only=True)
class CLIPSizes:
    """Sizes of the architecture; the defaults are DeepSeek-OCR's."""

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_width: int = 4096
    grid: int = 16
    """Positions on a side for which positions were trained."""


class CLIPEncoder(nn.Module):
    """[P, width, h, w] to [P, 1 + h·w, width]; the first position is the class token."""

    def __init__(self, sizes: CLIPSizes) -> None:
        super().__init__()
        self.embeddings = Embeddings(sizes)
        self.pre_layrnorm = nn.LayerNorm(sizes.width)
        self.transformer = Transformer(sizes)

    def forward(self, patches_PCHW: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.transformer(self.pre_layrnorm(self.embeddings(patches_PCHW)))


class Embeddings(nn.Module):
    """The class token in front, positions added. Both are buffers: they are constants, and no parameters."""

    class_embedding: torch.Tensor

    def __init__(self, sizes: CLIPSizes) -> None:
        super().__init__()
        self.register_buffer("class_embedding", torch.zeros(sizes.width))
        self.position_embedding = PositionTable(sizes)
        self.grid = sizes.grid

    def forward(self, patches_PCHW: torch.Tensor) -> torch.Tensor:
        """[P, c, h, w] to [P, 1 + h·w, c]."""
        pages, channels, height, width = patches_PCHW.shape
        table = self.position_embedding.weight
        square = table[1:].view(1, self.grid, self.grid, channels)
        positions = torch.cat([table[:1], resize_positions(square, height, width).view(-1, channels)])
        token = self.class_embedding.expand(pages, 1, -1)
        return torch.cat([token, patches_PCHW.flatten(2).transpose(1, 2)], dim=1) + positions


class PositionTable(nn.Module):
    """Holds `weight` [1 + grid², width], class token first."""

    weight: torch.Tensor

    def __init__(self, sizes: CLIPSizes) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1 + sizes.grid**2, sizes.width))


class Transformer(nn.Module):
    """The layers."""

    def __init__(self, sizes: CLIPSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[P, n, width] in and out."""
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Layer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, sizes: CLIPSizes) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(sizes.width)
        self.self_attn = SelfAttention(sizes)
        self.layer_norm2 = nn.LayerNorm(sizes.width)
        self.mlp = QuickGELUMLP(sizes)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[P, n, width] in and out."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class SelfAttention(nn.Module):
    """Attention of every position to every other."""

    def __init__(self, sizes: CLIPSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.qkv_proj = nn.Linear(sizes.width, 3 * sizes.width)
        self.out_proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[P, n, width] in and out."""
        qkv = self.qkv_proj(hidden).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class QuickGELUMLP(nn.Module):
    """Linear, x · sigmoid(1.702 x) as in OpenAI's CLIP, Linear."""

    def __init__(self, sizes: CLIPSizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.width, sizes.mlp_width)
        self.fc2 = nn.Linear(sizes.mlp_width, sizes.width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Any shape of that width."""
        inner = self.fc1(hidden)
        return self.fc2(inner * torch.sigmoid(1.702 * inner))
