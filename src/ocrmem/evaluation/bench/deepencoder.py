"""DeepEncoder from transformers' own parts: what a user without ocrmem would run.

transformers has DeepSeek-OCR's encoder as a class of its own only in its newest versions (`unlimited_ocr`); it is made
of the same SAM and CLIP code as `SamVisionEncoder` and `CLIPEncoder`, which are joined here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, SamVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.sam.modeling_sam import SamVisionEncoder

from ocrmem.encoders.deepencoder_clip import CLIPSizes
from ocrmem.encoders.deepencoder_sam import SAMSizes
from ocrmem.encoders.deepseek_ocr import DeepSeekOCREncoder


class SAMWithConvolutions(nn.Module):
    """[P, 3, H, W] to [P, 1024, H/64, W/64]."""

    def __init__(self, sizes: SAMSizes, attention: str) -> None:
        super().__init__()
        config = SamVisionConfig(
            hidden_size=sizes.width,
            output_channels=sizes.neck_width,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            image_size=sizes.grid * sizes.patch,
            patch_size=sizes.patch,
            window_size=sizes.window,
            global_attn_indexes=list(sizes.global_layers),
            mlp_dim=sizes.mlp_width,
        )
        self.sam: Any = SamVisionEncoder._from_config(config, attn_implementation=attention)
        self.net_2 = nn.Conv2d(sizes.neck_width, sizes.mid_width, 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(sizes.mid_width, sizes.out_width, 3, stride=2, padding=1, bias=False)

    def forward(self, pixels_P3HW: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.net_3(self.net_2(self.sam(pixels_P3HW).last_hidden_state))


class CLIPLayers(nn.Module):
    """CLIP's layers, called as DeepSeek-OCR's own are."""

    def __init__(self, sizes: CLIPSizes, attention: str) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=sizes.width,
            intermediate_size=sizes.mlp_width,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            hidden_act="quick_gelu",
        )
        config._attn_implementation = attention
        self.encoder = CLIPEncoder(config)  # pyright: ignore[reportArgumentType] - reads the vision config alone

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[P, n, width] in and out."""
        return self.encoder(inputs_embeds=hidden).last_hidden_state


class TransformersDeepEncoder(nn.Module):
    """transformers' SAM and CLIP with the weights of one of ours, at the page size for which positions were trained.

    Args:
        ours: gives sizes and weights.
        attention: `sdpa` or `eager`.
    """

    def __init__(self, ours: DeepSeekOCREncoder, sam: SAMSizes, clip: CLIPSizes, *, attention: str = "sdpa") -> None:
        super().__init__()
        self.vision_model = nn.Module()
        self.vision_model.embeddings = ours.vision_model.embeddings
        self.vision_model.pre_layrnorm = ours.vision_model.pre_layrnorm
        with torch.device("meta"):  # the weights are shared, so that neither side pays for the other's
            self.sam_model = SAMWithConvolutions(sam, attention)
            layers = CLIPLayers(clip, attention)
        self.sam_model.load_state_dict(sam_weights(ours.sam_model.state_dict()), assign=True)
        layers.encoder.load_state_dict(clip_weights(ours.vision_model.transformer.state_dict()), assign=True)
        self.vision_model.transformer = layers
        self.eval().requires_grad_(False)

    def forward(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        """uint8 pages to features_PVE `concat`."""
        dtype = self.sam_model.net_2.weight.dtype
        pixels = (pages_PHW.to(dtype) / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
        sam_map = self.sam_model(pixels)
        vision: Any = self.vision_model
        clip_PVE = vision.transformer(vision.pre_layrnorm(vision.embeddings(sam_map)))[:, 1:]
        return torch.cat([clip_PVE, sam_map.flatten(2).transpose(1, 2)], dim=-1)


SAM_NAMES = (
    ("neck.0", "neck.conv1"), ("neck.1", "neck.layer_norm1"), ("neck.2", "neck.conv2"), ("neck.3", "neck.layer_norm2"),
    ("blocks.", "layers."), (".norm", ".layer_norm"), ("patch_embed.proj", "patch_embed.projection"),
)  # fmt: skip
"""Ours, which are the original checkpoint's, and transformers'."""


def sam_weights(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our SAM's tensors under the names of `SAMWithConvolutions`."""
    state = {}
    for name, tensor in ours.items():
        if not name.startswith("net_"):
            for original, theirs in SAM_NAMES:
                name = name.replace(original, theirs)
            name = f"sam.{name}"
        state[name] = tensor
    return state


def clip_weights(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our CLIP layers' tensors under the names of `CLIPEncoder`, which has queries, keys and values apart."""
    state = {}
    for name, tensor in ours.items():
        if ".qkv_proj." not in name:
            state[name] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            state[name.replace(".qkv_proj.", f".{letter}_proj.")] = part
    return state


def random_encoder(
    settings: Any, page: Any, sam: SAMSizes, clip: CLIPSizes, *, device: torch.device, dtype: torch.dtype
) -> DeepSeekOCREncoder:
    """Our encoder with random weights everywhere, position tables too."""
    torch.manual_seed(0)
    with torch.device(device):
        encoder = DeepSeekOCREncoder(settings, page=page, sam_sizes=sam, clip_sizes=clip)
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if "pos" in name or "class_embedding" in name:
                tensor.normal_(std=0.1)
    return encoder.to(dtype).eval().requires_grad_(False)
