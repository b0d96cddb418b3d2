"""Prompts through the LLM, the keys and values of whatever begins as before reused.

```
last prompt:  [system] [page 1] [page 2] [tail] [turns] [reply]
this prompt:  [system] [page 1] [page 2] [other tail] [turns] …
              └──── keys and values kept ────┘└──── read ──────
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import Cache, DynamicCache

from ocrmem.model.mem_model import MEMModel

Slot = int | tuple[str, int]
"""One position: a token id, or the page whose memory token stands there, by its key and first character."""


def num_positions(slots: Sequence[Slot], model: MEMModel) -> int:
    """Positions that slots take in the LLM's count of them."""
    memory = sum(isinstance(slot, tuple) for slot in slots)
    return len(slots) + memory * (model.position_stride - 1)


class PrefixReader:
    """Reads prompts and goes on token by token, with one cache of keys and values.

    LLMs whose state is no list of keys and values (Mamba and its hybrids) cannot go back: they read every prompt
    whole.

    Args:
        model: in eval mode, on its device.
    """

    def __init__(self, model: MEMModel) -> None:
        self.model = model
        self.num_read = 0
        """Positions that the last `read` computed; the others of its prompt were reused."""
        self._can_go_back = not getattr(model.base_llm_model, "_is_stateful", False)
        self._cache: Cache | None = None
        self._slots: list[Slot] = []

    def forget(self) -> None:
        """Drop every key and value."""
        self._cache, self._slots = None, []

    def read(self, slots: Sequence[Slot], features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits [vocabulary], float32, of what follows a prompt.

        Args:
            slots: the prompt; a page stands there as often as it has memory tokens.
            features: features_VE of each page by its key.
        """
        common = self.common(slots)
        if common < len(self._slots):
            self._go_back(len(self._slots) - common)
        self.num_read = len(slots) - len(self._slots)
        return self._run(list(slots[len(self._slots) :]), features).logits[0, -1].float()

    def step(self, token: int) -> torch.Tensor:
        """Logits [vocabulary], float32, of what follows one more token."""
        return self._run([token], {}).logits[0, -1].float()

    def common(self, slots: Sequence[Slot]) -> int:
        """Positions of a prompt whose keys and values are there; its last position is never among them."""
        if not self._can_go_back:
            return 0
        most = min(len(self._slots), len(slots) - 1)
        equal = next((i for i in range(most) if self._slots[i] != slots[i]), most)
        # A page is read whole or not at all.
        while 0 < equal < len(slots) and isinstance(slots[equal], tuple) and slots[equal] == slots[equal - 1]:
            equal -= 1
        return equal

    @torch.no_grad()
    def attention(self, slots: Sequence[Slot], features: Mapping[str, torch.Tensor], *, last: int) -> torch.Tensor:
        """How much the last positions of a prompt look at each of its positions.

        Returns:
            float32 [S], the attention of the last `last` positions, averaged over them, all layers and all heads.
        """
        llm = self.model.base_llm_model
        self.read(slots[: len(slots) - last], features)
        before = llm.config._attn_implementation or "eager"
        llm.set_attn_implementation("eager")  # the other kernels do not tell
        try:
            outputs = self._run(list(slots[len(slots) - last :]), features, output_attentions=True)
        finally:
            llm.set_attn_implementation(before)
        return torch.stack([layer[0].float().mean(dim=(0, 1)) for layer in outputs.attentions]).mean(dim=0).cpu()

    def _go_back(self, number: int) -> None:
        if self._cache is None or not self._can_go_back or number == len(self._slots):
            self.forget()
            return
        self._cache.crop(-number)
        del self._slots[-number:]

    @torch.no_grad()
    def _run(self, slots: list[Slot], features: Mapping[str, torch.Tensor], **options: Any) -> Any:
        model = self.model
        placeholder = model.config.memory_token_id
        ids = [slot if isinstance(slot, int) else placeholder for slot in slots]
        pages = [
            (key, len(list(group))) for (key, _), group in groupby(slot for slot in slots if isinstance(slot, tuple))
        ]
        device = next(model.proj.parameters()).device
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids], device=device)}
        if model.position_stride > 1:
            inputs["position_ids"] = model.positions(inputs["input_ids"]) + num_positions(self._slots, model)
        if pages:
            inputs["features"] = torch.stack([features[key] for key, _ in pages]).to(device)
            inputs["page_num_tokens"] = torch.tensor([number for _, number in pages], device=device)
            inputs["num_pages"] = torch.tensor([len(pages)], device=device)
        if self._cache is None and self._can_go_back:
            self._cache = DynamicCache()
        try:
            outputs = model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **options)
        except BaseException:  # some layers may have the new keys and others not; Ctrl-C comes at any time
            self.forget()
            raise
        self._cache = outputs.past_key_values
        self._slots += slots
        return outputs
