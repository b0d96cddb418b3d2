"""The frozen LLM's layers as CUDA graphs: one forward and backward, one forward alone.

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
GRANULE = 16
"""Samples to which that room is rounded up."""
WARM_UPS = 3
"""Runs before a capture, as `torch.cuda.make_graphed_callables` has them."""


class GraphedLayers:
    """Replays the decoder of a causal LM where it is called for a packed row; all other calls run as before.

    Rows that need a gradient (the student's) and rows that need none (the teacher's, and those of an evaluation) have
    a graph each, and so has every length of a row.

    Args:
        llm: a Hugging Face causal LM with `attn_implementation: packed`, on a CUDA device.
    """

    def __init__(self, llm: PreTrainedModel) -> None:
        self.decoder: Any = llm.base_model
        self.eager = self.decoder.forward
        self.enabled = llm.config._attn_implementation == PACKED and llm.device.type == "cuda"
        self.graphs: dict[tuple[bool, int], _Graph] = {}
        if self.enabled:
            self.decoder.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward."""
        embeds_BSD, edges = kwargs.get("inputs_embeds"), kwargs.get("cu_seq_lens_q")
        if not self.enabled or edges is None or embeds_BSD is None:
            return self.eager(*args, **kwargs)
        learns = bool(embeds_BSD.requires_grad and torch.is_grad_enabled())
        if not learns and torch.is_grad_enabled():
            return self.eager(*args, **kwargs)
        length = int(kwargs["max_length_q"])
        key = (learns, embeds_BSD.shape[1])
        graph = self.graphs.get(key)
        if graph is None or not graph.fits(embeds_BSD, len(edges), length):
            self.graphs.pop(key, None)
            torch.cuda.empty_cache()
            try:
                graph = _Graph(self.eager, embeds_BSD, kwargs["position_ids"], len(edges), length, before=graph)
            except RuntimeError as error:
                self.enabled = False
                log.warning("the LLM's layers cannot be captured as a CUDA graph and run without one: %s", error)
                return self.eager(*args, **kwargs)
            self.graphs[key] = graph
        return BaseModelOutputWithPast(last_hidden_state=graph(embeds_BSD, kwargs["position_ids"], edges))


class _Graph:
    """A captured decoder, for rows of one shape with up to so many samples of up to such a length.

    Without a gradient its output is overwritten by the next call.
    """

    def __init__(
        self,
        eager: Any,
        embeds_BSD: torch.Tensor,
        position_ids_BS: torch.Tensor,
        num_edges: int,
        length: int,
        *,
        before: _Graph | None,
    ) -> None:
        self.shape = tuple(embeds_BSD.shape)
        size = self.shape[1]
        self.max_samples = -(-int(num_edges * SPARE) // GRANULE) * GRANULE
        self.max_length = 1 << (length - 1).bit_length()
        if before is not None:
            self.max_samples = max(self.max_samples, before.max_samples)
            self.max_length = max(self.max_length, before.max_length)
        longest, mask = self.max_length, unused_mask(embeds_BSD.device)

        def decode(embeds: torch.Tensor, positions: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            packing = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
            return eager(
                inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False, **packing
            ).last_hidden_state

        edges = torch.full((self.max_samples,), size, dtype=torch.int32, device=embeds_BSD.device)
        each = min(longest, size)
        edges[: size // each] = torch.arange(0, size // each * each, each, device=embeds_BSD.device)
        learns = bool(embeds_BSD.requires_grad and torch.is_grad_enabled())
        self.inputs = (embeds_BSD.detach().clone().requires_grad_(learns), position_ids_BS.clone(), edges)
        self.run: Any = torch.cuda.make_graphed_callables(decode, self.inputs) if learns else None
        if not learns:
            self._capture(decode)

    def _capture(self, decode: Any) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                decode(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.replayed = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.replayed):
            self.output = decode(*self.inputs)

    def fits(self, embeds_BSD: torch.Tensor, num_edges: int, length: int) -> bool:
        """Whether a row can be run by this graph."""
        return self.shape == tuple(embeds_BSD.shape) and num_edges <= self.max_samples and length <= self.max_length

    def __call__(self, embeds_BSD: torch.Tensor, position_ids_BS: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        padded = edges.new_full((self.max_samples,), self.shape[1])
        padded[: len(edges)] = edges  # samples of no length at the end
        if self.run is not None:
            return self.run(embeds_BSD, position_ids_BS, padded)
        for static, given in zip(self.inputs, (embeds_BSD, position_ids_BS, padded), strict=True):
            static.copy_(given)
        self.replayed.replay()
        return self.output
