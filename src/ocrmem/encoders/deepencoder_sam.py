"""DeepEncoder's first half: SAM-ViT-B with a sixteenfold convolutional compressor.

```
pixels [P, 3, H, W] ─▶ patches of 16 ─▶ 12 blocks ─▶ neck 768→256 ─▶ net_2 256→512 ─▶ net_3 512→1024
                                        windows of 14; all of the page in blocks 2, 5, 8, 11
```

Attribute names are those of the original checkpoint's tensors. `sam_attention` has the ways to attend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ocrmem.encoders.sam_attention import (
    Implementation,
    choose,
    flex_attention,
    folded_attention,
    kernel_attention,
    reference_attention,
)


@dataclass(frozen=True, kw_only=True)
class SAMSizes:
    """Sizes of the architecture; the defaults are DeepSeek-OCR's."""

    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    window: int = 14
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    neck_width: int = 256
    mid_width: int = 512
    out_width: int = 1024
    patch: int = 16
    grid: int = 64
    """Patches on a side of the page for which positions were trained (1,024 pixels)."""


class SAMEncoder(nn.Module):
    """Pixels to a feature map; of h × w patches [P, 512, h/2, w/2] after `net_2`, [P, 1024, h/4, w/4] after `net_3`."""

    def __init__(self, sizes: SAMSizes, *, attention: Implementation = "auto") -> None:
        super().__init__()
        self.attention: Implementation = attention
        self.head_width = sizes.width // sizes.num_heads
        self.patch_embed = PatchEmbed(sizes)
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.grid, sizes.grid, sizes.width))
        self.blocks = nn.ModuleList(
            Block(sizes, window=0 if layer in sizes.global_layers else sizes.window)
            for layer in range(sizes.num_layers)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(sizes.width, sizes.neck_width, 1, bias=False),
            ChannelNorm(sizes.neck_width),
            nn.Conv2d(sizes.neck_width, sizes.neck_width, 3, padding=1, bias=False),
            ChannelNorm(sizes.neck_width),
        )
        self.net_2 = nn.Conv2d(sizes.neck_width, sizes.mid_width, 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(sizes.mid_width, sizes.out_width, 3, stride=2, padding=1, bias=False)

    def forward(self, pixels_P3HW: torch.Tensor, *, until_mid: bool = False) -> torch.Tensor:
        """The final feature map, or that after `net_2` with `until_mid`."""
        hidden = self.patch_embed(pixels_P3HW)
        hidden = hidden + resize_positions(self.pos_embed, hidden.shape[1], hidden.shape[2])
        attention = choose(self.attention, device=hidden.device, dtype=hidden.dtype, head_width=self.head_width)
        for block in self.blocks:
            hidden = block(hidden, attention)
        mid = self.net_2(self.neck(hidden.permute(0, 3, 1, 2)))
        return mid if until_mid else self.net_3(mid)


class PatchEmbed(nn.Module):
    """Patches of 16 × 16 pixels to vectors; channels last.

    A convolution whose patches do not overlap is a linear layer over them. As such its output is contiguous, and with
    it the residual stream of all layers: a convolution's would be a transposed view, and so would every sum after it.
    """

    def __init__(self, sizes: SAMSizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, sizes.width, sizes.patch, stride=sizes.patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[P, 3, H, W] to [P, h, w, width]."""
        side = self.proj.stride[0]
        pixels = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over axis 1."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[P, width, h, w] in and out."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """One pre-norm transformer layer, over windows or over the whole page."""

    def __init__(self, sizes: SAMSizes, *, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.attn = Attention(sizes, side=window or sizes.grid)
        self.norm2 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.mlp = MLP(sizes)

    def forward(self, hidden: torch.Tensor, attention: Implementation = "reference") -> torch.Tensor:
        """[P, h, w, width] in and out."""
        normed = self.norm1(hidden)
        if attention == "triton":
            hidden = hidden + self.attn.in_place(normed, self.window)
        elif self.window == 0:
            hidden = hidden + self.attn(normed, attention)
        else:
            windows = to_windows(normed, self.window)
            hidden = hidden + from_windows(self.attn(windows, attention), self.window, *hidden.shape[1:3])
        return hidden + self.mlp(self.norm2(hidden))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, sizes: SAMSizes) -> None:
        super().__init__()
        self.lin1 = nn.Linear(sizes.width, sizes.mlp_width)
        self.lin2 = nn.Linear(sizes.mlp_width, sizes.width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Any shape of that width."""
        return self.lin2(F.gelu(self.lin1(hidden)))


class Attention(nn.Module):
    """Attention with decomposed relative positions: the score of query q and key k gains q·R_h[dy] + q·R_w[dx]."""

    def __init__(self, sizes: SAMSizes, *, side: int) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.proj = nn.Linear(sizes.width, sizes.width)
        head_width = sizes.width // sizes.num_heads
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, head_width))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, head_width))

    def forward(self, hidden: torch.Tensor, attention: Implementation) -> torch.Tensor:
        """[P, h, w, width] in and out, or windows in place of pages."""
        pages, height, width, _ = hidden.shape
        qkv = self.qkv(hidden).reshape(pages, height * width, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        square = query.unflatten(2, (height, width))
        bias_h = torch.einsum("pnhwc,hkc->pnhwk", square, relative_positions(self.rel_pos_h, height)).flatten(2, 3)
        bias_w = torch.einsum("pnhwc,wkc->pnhwk", square, relative_positions(self.rel_pos_w, width)).flatten(2, 3)
        attend = {"folded": folded_attention, "flex": flex_attention}.get(attention, reference_attention)
        attended = attend(query, key, value, bias_h, bias_w)
        return self.proj(attended.transpose(1, 2).reshape(hidden.shape))

    def in_place(self, hidden: torch.Tensor, window: int) -> torch.Tensor:
        """`forward` by the Triton kernel, over windows that lie in place; `window` 0: over the whole page."""
        height, width = hidden.shape[1:3]
        rows, columns = (window, window) if window else (height, width)
        down = torch.arange(height, device=hidden.device) % rows
        across = torch.arange(width, device=hidden.device) % columns
        attended = kernel_attention(
            self.qkv(hidden),
            self.qkv.bias,
            relative_positions(self.rel_pos_h, rows)[down],
            relative_positions(self.rel_pos_w, columns)[across],
            num_heads=self.num_heads,
            window=(rows, columns),
        )
        return self.proj(attended)


def relative_positions(table: torch.Tensor, size: int) -> torch.Tensor:
    """[size, size, c]: for each query and key coordinate the row of their distance, the table resized to `size`."""
    wanted = 2 * size - 1
    if table.shape[0] != wanted:
        table = F.interpolate(table.T[None], size=wanted, mode="linear")[0].T
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place[None, :] + size - 1]


def resize_positions(positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[1, g, g, c] to [1, height, width, c], bicubic with antialiasing in float32, as the original does it."""
    if positions.shape[1:3] == (height, width):
        return positions
    resized = F.interpolate(
        positions.permute(0, 3, 1, 2).float(),
        size=(height, width),
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )
    return resized.permute(0, 2, 3, 1).to(positions.dtype)


def to_windows(hidden: torch.Tensor, window: int) -> torch.Tensor:
    """[P, h, w, c] to [P · windows, window, window, c], padded with zeros at the right and the bottom."""
    _, height, width, channels = hidden.shape
    hidden = F.pad(hidden, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = hidden.shape[1] // window, hidden.shape[2] // window
    hidden = hidden.unflatten(1, (rows, window)).unflatten(3, (columns, window))
    return hidden.transpose(2, 3).reshape(-1, window, window, channels)


def from_windows(windows: torch.Tensor, window: int, height: int, width: int) -> torch.Tensor:
    """`to_windows` undone, the padding cut off."""
    rows, columns = -(-height // window), -(-width // window)
    hidden = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)
    hidden = hidden.flatten(3, 4).flatten(1, 2)
    return hidden[:, :height, :width]
