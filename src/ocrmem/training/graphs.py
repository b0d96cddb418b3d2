"""The frozen LLM's layers as one CUDA graph, forward and backward.

A small LLM's layers finish faster than Python can launch them: of a step of 85 ms on an H100, SmolLM2-135M with 16,384
packed positions kept the GPU busy for 49. Packed rows have one shape, so the layers are captured once and replayed.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ocrmem.model.packed_attention import PACKED, unused_mask

log = logging.getLogger(__name__)

SPARE = 1.25
"""Room for more samples in a row than the row that was captured had."""
GRANULE = 64
"""Samples to which that room is rounded up."""


class GraphedLayers:
    """Replays the decoder of a causal LM where it is called for a packed training row; all other calls run as before.

    Args:
        llm: a Hugging Face causal LM with `attn_implementation: packed`, on a CUDA device.
    """

    def __init__(self, llm: PreTrainedModel) -> None:
        self.decoder: Any = llm.base_model
        self.eager = self.decoder.forward
        self.enabled = llm.config._attn_implementation == PACKED and llm.device.type == "cuda"
        self.graph: Any = None
        self.shape: tuple[int, ...] = ()
        self.max_samples = self.max_length = 0
        if self.enabled:
            self.decoder.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward."""
        embeds_BSD, edges = kwargs.get("inputs_embeds"), kwargs.get("cu_seq_lens_q")
        if not self.enabled or edges is None or embeds_BSD is None or not embeds_BSD.requires_grad:
            return self.eager(*args, **kwargs)
        length = int(kwargs["max_length_q"])
        if self.shape != tuple(embeds_BSD.shape) or len(edges) > self.max_samples or length > self.max_length:
            self.shape = tuple(embeds_BSD.shape)
            self.max_samples = max(self.max_samples, -(-int(len(edges) * SPARE) // GRANULE) * GRANULE)
            self.max_length = max(self.max_length, 1 << (length - 1).bit_length())
            self._capture(embeds_BSD, kwargs["position_ids"])
        if self.graph is None:
            return self.eager(*args, **kwargs)
        padded = edges.new_full((self.max_samples,), int(embeds_BSD.shape[1]))
        padded[: len(edges)] = edges  # samples of no length at the end
        return BaseModelOutputWithPast(last_hidden_state=self.graph(embeds_BSD, kwargs["position_ids"], padded))

    def _capture(self, embeds_BSD: torch.Tensor, position_ids_BS: torch.Tensor) -> None:
        self.graph = None
        torch.cuda.empty_cache()
        length = self.max_length
        mask = unused_mask(embeds_BSD.device)

        def decode(embeds: torch.Tensor, positions: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            packing = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": length, "max_length_k": length}
            return self.eager(
                inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False, **packing
            ).last_hidden_state

        size = embeds_BSD.shape[1]
        edges = torch.full((self.max_samples,), size, dtype=torch.int32, device=embeds_BSD.device)
        edges[: size // min(length, size)] = torch.arange(
            0, size // min(length, size) * min(length, size), min(length, size), device=embeds_BSD.device
        )
        sample = (embeds_BSD.detach().clone().requires_grad_(), position_ids_BS.clone(), edges)
        try:
            self.graph = torch.cuda.make_graphed_callables(decode, sample)
        except RuntimeError as error:
            self.enabled = False
            log.warning("the LLM's layers cannot be captured as a CUDA graph and run without one: %s", error)
