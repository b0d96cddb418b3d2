"""Replies, token by token, on the keys and values that the reader keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ocrmem.data.processor import MEMProcessor
from ocrmem.errors import ConfigError
from ocrmem.session.prompt import MemoryPrompt, max_positions
from ocrmem.session.reader import PrefixReader, num_positions


class Decoder:
    """Generates replies: greedy, or sampled at a temperature."""

    def __init__(self, reader: PrefixReader, processor: MEMProcessor) -> None:
        self.reader, self.processor = reader, processor
        tokenizer: Any = processor.tokenizer
        config = reader.model.base_llm_model.generation_config
        ends = getattr(config, "eos_token_id", None)
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def pieces(
        self,
        prompt: MemoryPrompt,
        features: Mapping[str, torch.Tensor],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int | None,
    ) -> Iterator[str]:
        """The reply as it comes; joined, the pieces are the whole of it.

        Raises:
            ConfigError: `max_new_tokens` or `temperature` makes no sense.
        """
        if max_new_tokens < 1 or temperature < 0:
            raise ConfigError(
                f"max_new_tokens={max_new_tokens}, temperature={temperature}: expected at least one token, and a "
                "temperature of 0 or more."
            )
        most = max_positions(self.reader.model)
        room = (
            max_new_tokens
            if most is None
            else min(max_new_tokens, most - num_positions(prompt.slots, self.reader.model))
        )
        return self._pieces(prompt, features, room, temperature, seed)

    def _pieces(
        self,
        prompt: MemoryPrompt,
        features: Mapping[str, torch.Tensor],
        room: int,
        temperature: float,
        seed: int | None,
    ) -> Iterator[str]:
        logits = self.reader.read(prompt.slots, features)
        generator = None if seed is None else torch.Generator(logits.device).manual_seed(seed)
        ids: list[int] = []
        given = ""
        while len(ids) < room:
            logits[self.processor.memory_token_id] = -torch.inf  # it would stand for memory that is not there
            if temperature == 0:
                token = int(logits.argmax())
            else:
                chances = torch.softmax(logits / temperature, dim=-1)
                token = int(torch.multinomial(chances, 1, generator=generator))
            if token in self.ends:
                break
            ids.append(token)
            text = str(self.processor.tokenizer.decode(ids, skip_special_tokens=True))
            # A character of several tokens is U+FFFD until the last of them.
            if len(text) > len(given) and not text.endswith("\ufffd"):
                yield text[len(given) :]
                given = text
            if len(ids) < room:
                logits = self.reader.step(token)
        text = str(self.processor.tokenizer.decode(ids, skip_special_tokens=True))
        if len(text) > len(given):
            yield text[len(given) :]
