"""Small but real parts for tests: random LLMs of three families and an encoder that a person can follow."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.mem import MEMConfig
from ocrmem.config.memory import MemorySettings
from ocrmem.config.projection import ProjectionSettings
from ocrmem.config.render import RenderSettings
from ocrmem.encoders.base import OCREncoder
from ocrmem.model.mem_model import MEMModel
from ocrmem.types import Page, TokenSpans

PAGE = RenderSettings(page_width=28, page_height=15, line_height=5, font_size=5)
VOCABULARY, PLACEHOLDER = 101, 97
LETTERS_OF_TOKENS = "?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!\n"
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen3": {"head_dim": 8, "tie_word_embeddings": False},
    "llama": {"head_dim": 6, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, but for `th`, `the` and `ing`; what it has none for is `?`."""
    joined = ["th", "the", "in", "ing"]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *LETTERS_OF_TOKENS, *joined])}
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("in", "g")]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, merges, unk_token="?")))


def tiny_llm(family: str = "qwen3", *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random causal LM of two layers."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})
    return AutoModelForCausalLM.from_config(config)


@dataclass(frozen=True, kw_only=True)
class ConvSettings:
    """Settings of `ConvEncoder`."""

    width: int = 11


class ConvEncoder(OCREncoder):
    """One strided convolution and a batch norm with non-trivial statistics: a page of 15 × 28 gives 3 × 7 tokens."""

    name = "conv"
    settings_type = ConvSettings

    def __init__(self, *, width: int = 11, seed: int = 1, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.page = PAGE
        self.conv = nn.Conv2d(1, width, kernel_size=(5, 4), stride=(5, 4))
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        if norm:
            nn.init.normal_(self.norm.running_mean)
            nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    @classmethod
    def build(cls, settings: ConvSettings, *, page: RenderSettings | None = None) -> ConvEncoder:
        return cls(width=settings.width)

    def load_checkpoint(self, checkpoint: str | None) -> None:
        """Its random weights are its weights."""

    @property
    def feature_width(self) -> int:
        return self.conv.out_channels

    @property
    def tokens_per_page(self) -> int:
        return 21

    def forward(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        self.check_pages(pages_PHW)
        pixels_P1HW = pages_PHW[:, None].to(self.conv.weight.dtype) / 127.5 - 1
        return self.norm(self.conv(pixels_P1HW)).flatten(2).transpose(1, 2)

    def num_tokens(self, page: Page) -> int:
        return page.num_lines * 7

    def token_spans(self, page: Page) -> TokenSpans:
        return [[(page.text_start, page.text_end)]] * self.num_tokens(page)

    def identity(self) -> str:
        digest = hashlib.sha256(self.name.encode())
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.detach().float().numpy().tobytes())
        return digest.hexdigest()


def tiny_config(*, kind: str = "mlp", feature_dtype: str = "float32", read_tokens: int = 0) -> MEMConfig:
    """Settings for the tiny parts."""
    return MEMConfig.from_settings(
        encoder=EncoderSettings(name="conv"),
        page=PAGE,
        memory=MemorySettings(feature_dtype=feature_dtype),
        projection=ProjectionSettings(kind=kind, num_layers=1, num_heads=2, read_tokens=read_tokens),
        memory_token="<memory>",
        memory_token_id=PLACEHOLDER,
    )


def tiny_model(
    family: str = "qwen3", *, kind: str = "mlp", seed: int = 2, read_tokens: int = 0, **llm_overrides: object
) -> MEMModel:
    """A MEMModel of the tiny parts."""
    llm, encoder = tiny_llm(family, **llm_overrides), ConvEncoder()
    torch.manual_seed(seed)
    config = tiny_config(kind=kind, read_tokens=read_tokens)
    return MEMModel(config, base_llm_model=llm, ocr_embed=encoder, tokenizer=tiny_tokenizer())


def tiny_batch(
    page_tokens: tuple[tuple[int, ...], ...] = ((7, 21), (), (14,)),
    *,
    text: tuple[int, ...] = (5, 9, 4),
    reply: int = 3,
    side: str = "left",
    seed: int = 3,
) -> dict[str, torch.Tensor]:
    """A padded batch: for each sample its pages' tokens in use, then text, of which the last `reply` are labelled."""
    generator = torch.Generator().manual_seed(seed)
    rows, label_rows = [], []
    for tokens, length in zip(page_tokens, text, strict=True):
        words = torch.randint(3, PLACEHOLDER, (length,), generator=generator).tolist()
        row = [1] + [PLACEHOLDER] * sum(tokens) + words
        rows.append(row)
        label_rows.append([-100] * (len(row) - reply) + row[-reply:])
    longest = max(map(len, rows))
    pad = (
        (lambda values, fill: [fill] * (longest - len(values)) + values)
        if side == "left"
        else (lambda values, fill: values + [fill] * (longest - len(values)))
    )
    flat = [tokens for sample in page_tokens for tokens in sample]
    batch = {
        "input_ids": torch.tensor([pad(row, 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([pad(row, -100) for row in label_rows]),
    }
    if flat:
        batch["pages"] = torch.randint(0, 256, (len(flat), 15, 28), dtype=torch.uint8, generator=generator)
        batch["page_num_tokens"] = torch.tensor(flat)
        batch["num_pages"] = torch.tensor([len(sample) for sample in page_tokens])
    return batch
