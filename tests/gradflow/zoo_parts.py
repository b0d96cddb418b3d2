"""Small real parts for the zoo: a two-layer random LLM, a convolutional encoder, a projection, a batch.

Every case is a function that builds one `Subject`: broken as a user would break it, or, with `mended=True`,
with the one-line mend. `python -m ocrmem doctor tests/gradflow/zoo_cuts.py:detach` runs one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ocrmem.gradflow.doctor import Subject

WIDTH, FEATURES, TOKENS, VOCABULARY = 64, 24, 4, 97


@dataclass(frozen=True, kw_only=True)
class Case:
    """One inhabitant of the zoo."""

    name: str
    table: str
    """Table of the reference: A, B, C, D (harmless) or E."""
    cause: str | None
    """What `explain` must say; None: healthy."""
    verdict: str
    warning: str | None
    needs: str | None
    """A package without which the case cannot be built."""
    make: Callable[..., Subject]

    @property
    def code(self) -> str:
        """Source of the case, without the decorator."""
        lines = inspect.getsource(self.make).splitlines()
        start = next(index for index, line in enumerate(lines) if line.startswith("def "))
        return "\n".join(lines[start:])


CASES: dict[str, Case] = {}


def case(
    cause: str | None,
    *,
    table: str,
    verdict: str | None = None,
    warning: str | None = None,
    needs: str | None = None,
) -> Callable[[Callable[..., Subject]], Callable[..., Subject]]:
    """Register a case; the verdict follows from the table where it is not given."""
    usual = {"A": "cut", "B": "raises", "C": "silent", "D": "healthy", "E": "hangs"}[table]

    def register(make: Callable[..., Subject]) -> Callable[..., Subject]:
        name = make.__name__
        there = CASES.get(name)  # the doctor imports a zoo file a second time when it is its target
        assert there is None or there.make.__code__.co_filename == make.__code__.co_filename, f"two cases: {name}"
        CASES[name] = Case(
            name=name,
            table=table,
            cause=cause,
            verdict=verdict or usual,
            warning=warning,
            needs=needs,
            make=make,
        )
        return make

    return register


def tiny_llm(kind: str = "qwen3", **settings: Any) -> Any:
    """A random two-layer causal LM, frozen."""
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if kind == "gpt2":
        llm: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=WIDTH,
                n_layer=2,
                n_head=4,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
            )
        )
    else:
        config, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
        extra = {
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            **({"head_dim": 16} if kind == "qwen3" else {}),
        }
        llm = model(config(**common, **extra, **settings))
    return llm.requires_grad_(False).train()


class Encoder(nn.Module):
    """Images [B, 1, 8, 8] to features [B, 4, 24]; frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, FEATURES, kernel_size=4, stride=4)
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).flatten(2).transpose(1, 2).contiguous()


class Projection(nn.Module):
    """The part that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.gelu(self.first(features)))


class Composite(nn.Module):
    """Encoder, projection and LLM, correctly put together; the cases override one method each."""

    def __init__(self, llm: Any = None) -> None:
        super().__init__()
        self.llm = tiny_llm() if llm is None else llm
        torch.manual_seed(1)
        self.encoder = Encoder()
        self.proj = Projection()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder(images)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(features)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.llm.get_input_embeddings()(input_ids)

    def splice(self, memory: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return torch.cat([memory, embeds], dim=1)

    def predict(self, embeds: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.llm(inputs_embeds=embeds, labels=labels, attention_mask=attention_mask)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, images: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:  # fmt: skip
        embeds = self.embed(input_ids)
        if images is not None:
            embeds = self.splice(self.project(self.encode(images)), embeds)
        front = embeds.shape[1] - labels.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask = nn.functional.pad(attention_mask, (front, 0), value=1)
        return self.predict(embeds, nn.functional.pad(labels, (front, 0), value=-100), attention_mask)


class InPlace(Composite):
    """The same with placeholders (id 0) at the front of `input_ids` that the memory replaces."""

    def splice(self, memory: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        mask[:, :TOKENS] = True
        return self.replace(memory, embeds, mask)

    def replace(self, memory: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return embeds.masked_scatter(mask[..., None], memory)


class RenamedProjection(Composite):
    """The same with the projection under a name that no other module ends with."""

    def __init__(self) -> None:
        super().__init__()
        self.mem_projector = self.proj
        del self.proj

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.mem_projector(features)


def batch(*, images: bool = True, samples: int = 2) -> dict[str, torch.Tensor]:
    """Text of 9 tokens, the last 3 labelled, and one image each."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(1, VOCABULARY, (samples, 9), generator=generator)
    input_ids[:, :TOKENS] = 0
    labels = input_ids.clone()
    labels[:, :-3] = -100
    made = {"input_ids": input_ids, "labels": labels}
    return {**made, "images": torch.randn(samples, 1, 8, 8, generator=generator)} if images else made


def subject(model: nn.Module, data: Any = None, **settings: Any) -> Subject:
    """The usual subject: the projection should learn."""
    return Subject(**{"model": model, "batch": batch() if data is None else data, "trainable": "proj", **settings})
