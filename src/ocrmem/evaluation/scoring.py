"""Prompts of probes with their contexts, scored and answered in batches.

Letters besides those of `types`: N labelled positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ocrmem.data.processor import MEMProcessor
from ocrmem.evaluation.arms import Context
from ocrmem.evaluation.probes import Probe
from ocrmem.evaluation.rivals import Rival
from ocrmem.memory.chat_format import ChatFormat
from ocrmem.model.label_loss import IGNORE_INDEX, at_positions, labelled_positions, logits_at
from ocrmem.model.mem_model import MEMModel
from ocrmem.model.splice import one_sample_each
from ocrmem.types import Message

BATCH_POSITIONS = {"cpu": 16384, "cuda": 65536}
"""Positions of one batch to score, padding included, by device."""
ANSWER_POSITIONS = 16384
"""Positions of one batch to answer on the CPU, padding and new tokens included."""
CACHE_SHARE = 0.4
"""Of the free GPU memory, what the keys and values of one batch to answer may take, and as much again for what a layer
computes over its prompts; the rest is for masks, and for the pieces that a growing cache leaves unused."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One probe with one context, as token ids."""

    before: list[int]
    context: Context
    after: list[int]
    target: list[int]
    """The reply to score, with its end-of-turn token."""

    def ids(self, memory_token_id: int, *, with_target: bool) -> list[int]:
        """Token ids, placeholders in the places of memory tokens."""
        context = self.context
        memory = [memory_token_id] * sum(context.page_num_tokens)
        target = self.target if with_target else []
        return [*self.before, *context.text_ids, *memory, *context.exact_ids, *self.after, *target]

    def length(self, *, with_target: bool) -> int:
        """How many `ids` there are."""
        target = len(self.target) if with_target else 0
        return len(self.before) + self.context.num_tokens + len(self.after) + target


def make_prompt(probe: Probe, context: Context, chat_format: ChatFormat) -> Prompt:
    """The probe's prompt with the context where the memory belongs."""
    before, after, target = _around(probe, chat_format, context.num_tokens > 0)
    return Prompt(before=before, context=context, after=after, target=target)


@functools.lru_cache(maxsize=8192)
def _around(probe: Probe, chat_format: ChatFormat, has_context: bool) -> tuple[list[int], list[int], list[int]]:
    """Token ids before and after the context, and of the target: the same lists for every arm that has one, so
    nobody may change them."""
    turns = list(probe.turns)
    text = chat_format.text(turns, add_generation_prompt=True, num_placeholders=int(has_context))
    before, _, after = text.partition(chat_format.memory_token) if has_context else ("", "", text)
    reply = Message("assistant", probe.prefix + probe.target)
    whole = chat_format.text([*turns, reply], add_generation_prompt=False, num_placeholders=int(has_context))
    ending = whole[whole.rindex(chat_format.clean(reply.content)) + len(chat_format.clean(reply.content)) :]
    end = chat_format.ids(ending)
    end = end[: len(end) - chat_format.num_reply_tail]
    prefix = chat_format.clean(probe.prefix)
    return (
        chat_format.ids(before),
        chat_format.ids(after) + (chat_format.ids(prefix) if prefix else []),
        [*chat_format.ids(chat_format.clean(probe.target)), *end],
    )


class Scorer:
    """Runs prompts through a model.

    Args:
        model: in eval mode, on its device.
        processor: for the placeholder, and for reading answers.
        advance: called with the number of prompts done after each batch.
    """

    def __init__(
        self, model: MEMModel, processor: MEMProcessor, *, advance: Callable[[int], None] | None = None
    ) -> None:
        self.model, self.processor = model, processor
        self.device = next(model.proj.parameters()).device
        self.advance = advance or (lambda _: None)

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Cross entropy in nats per token, and token accuracy, of each prompt's target, teacher-forced."""
        losses, accuracies = np.zeros(len(prompts)), np.zeros(len(prompts))
        lengths = [prompt.length(with_target=True) for prompt in prompts]
        most = BATCH_POSITIONS.get(self.device.type, BATCH_POSITIONS["cpu"])
        for indices in batches(lengths, [0] * len(prompts), most=most):
            chosen = [prompts[i] for i in indices]
            batch = self._batch(chosen, with_target=True, pad_left=False)
            embeds_BSD = self._embeds(batch, chosen)
            labels = batch["labels"]
            index = labelled_positions(labels)
            with at_positions(self.model.get_output_embeddings(), index):
                outputs = self.model.base_llm_model(
                    inputs_embeds=embeds_BSD,
                    attention_mask=one_sample_each(batch["input_ids"]),
                    position_ids=self.model.positions(batch["input_ids"]),
                    use_cache=False,
                )
            logits_NC = logits_at(outputs.logits, index, shape_BS=tuple(labels.shape))
            targets_N = labels[index[0], index[1] + 1]
            loss_N = F.cross_entropy(logits_NC.float(), targets_N, reduction="none")
            right_N = (logits_NC.argmax(dim=-1) == targets_N).float()
            count_B = torch.bincount(index[0], minlength=len(chosen)).clamp(min=1)
            for values, result in ((loss_N, losses), (right_N, accuracies)):
                sums_B = torch.zeros(len(chosen), device=self.device).index_add_(0, index[0], values)
                result[np.array(indices)] = (sums_B / count_B).cpu().numpy()
            self.advance(len(chosen))
        return losses, accuracies

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt], *, max_new_tokens: Sequence[int]) -> list[str]:
        """Greedy answers, each at most so many tokens long.

        On a GPU a step takes as long for many answers as for few, so give the prompts of all arms in one call.
        """
        answers = [""] * len(prompts)
        lengths = [prompt.length(with_target=False) for prompt in prompts]
        for indices in batches(lengths, max_new_tokens, most=answer_positions(self.model.base_llm_model, self.device)):
            chosen = [prompts[i] for i in indices]
            rooms = [max_new_tokens[i] for i in indices]
            batch = self._batch(chosen, with_target=False, pad_left=True)
            generate: Any = self.model.base_llm_model.generate
            ids = generate(
                inputs_embeds=self._embeds(batch, chosen),
                attention_mask=batch["attention_mask"],
                position_ids=self.model.positions(batch["input_ids"], batch["attention_mask"]),
                max_new_tokens=max(rooms),
                stopping_criteria=StoppingCriteriaList([_OwnRoom(torch.tensor(rooms, device=self.device))]),
                do_sample=False,
                pad_token_id=self.processor.pad_token_id,
            )
            for row, i in zip(ids.tolist(), indices, strict=True):
                text: Any = self.processor.tokenizer.decode(row[: max_new_tokens[i]], skip_special_tokens=True)
                answers[i] = text
            self.advance(len(chosen))
        return answers

    def _batch(self, prompts: Sequence[Prompt], *, with_target: bool, pad_left: bool) -> dict[str, torch.Tensor]:
        rows = [prompt.ids(self.processor.memory_token_id, with_target=with_target) for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.processor.pad_token_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels = torch.full((len(rows), longest), IGNORE_INDEX)
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            start = longest - len(row) if pad_left else 0
            ids[number, start : start + len(row)] = torch.tensor(row)
            mask[number, start : start + len(row)] = 1
            if with_target:
                stop = start + len(row)
                labels[number, stop - len(prompt.target) : stop] = torch.tensor(prompt.target)
        return {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
            "labels": labels.to(self.device),
        }

    def _embeds(self, batch: dict[str, torch.Tensor], prompts: Sequence[Prompt]) -> torch.Tensor:
        """embeds_BSD of prompts of any arms; each memory token is made by the projection of its own arm."""
        rows_of: dict[Rival | None, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(prompt.context.rival, []).append(row)
        embeds_BSD = self.model.get_input_embeddings()(batch["input_ids"])
        for rival, rows in rows_of.items():
            contexts = [prompts[row].context for row in rows]
            embeds_BSD[rows] = self._projected(batch["input_ids"][rows], contexts, rival)
        return embeds_BSD

    def _projected(self, ids_BS: torch.Tensor, contexts: Sequence[Context], rival: Rival | None) -> torch.Tensor:
        """embeds_BSD of prompts whose memory tokens one projection makes: the rival's, or the memory's own."""
        own = self.model.proj
        features = [context.features_PVE for context in contexts if context.features_PVE is not None]
        if rival is not None:
            slots = [context.slots_PVT for context in contexts if context.slots_PVT is not None]
            features = [rival.features(torch.cat(slots).to(self.device))]
            self.model.proj = rival.proj
        arguments: dict[str, torch.Tensor] = {}
        if features:
            arguments = {
                "features": torch.cat(features).to(self.device),
                "page_num_tokens": torch.tensor([n for c in contexts for n in c.page_num_tokens], device=self.device),
                "num_pages": torch.tensor([len(c.page_num_tokens) for c in contexts], device=self.device),
            }
        embeds_BSD = self.model.embed(ids_BS, **arguments)
        self.model.proj = own
        for row, context in enumerate(contexts):
            if context.order is not None:
                places = (ids_BS[row] == self.processor.memory_token_id).nonzero().squeeze(-1)
                embeds_BSD[row, places] = embeds_BSD[row, places[torch.tensor(context.order, device=self.device)]]
        return embeds_BSD


class _OwnRoom(StoppingCriteria):
    """Ends every answer at its own length, so that a batch goes on only as long as some answer may.

    Args:
        room_B: new tokens that each answer may have.
    """

    def __init__(self, room_B: torch.Tensor) -> None:
        self.room_B = room_B

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        """bool [B]: which answers are done; `input_ids` holds new tokens alone, the prompts being embeddings."""
        return input_ids.shape[1] >= self.room_B


def batches(lengths: Sequence[int], rooms: Sequence[int], *, most: int) -> Iterator[list[int]]:
    """Indices of prompts in batches, those of like length together.

    Args:
        lengths: positions of each prompt.
        rooms: positions that may follow each.
        most: positions of a batch, if it has more than one prompt: padded prompts, and room for the longest answer.
    """
    batch: list[int] = []
    longest, widest = 0, 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i] + rooms[i]):
        longest, widest = max(longest, lengths[index]), max(widest, rooms[index])
        if batch and (len(batch) + 1) * (longest + widest) > most:
            yield batch
            batch, longest, widest = [], lengths[index], rooms[index]
        batch.append(index)
    if batch:
        yield batch


def answer_positions(llm: PreTrainedModel, device: torch.device) -> int:
    """Positions of one batch to answer that the device has memory for."""
    if device.type != "cuda":
        return ANSWER_POSITIONS
    config: Any = llm.config.get_text_config()
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    cached = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or num_heads) * head_dim
    computed = 4 * (config.hidden_size + getattr(config, "intermediate_size", 4 * config.hidden_size))
    return int(CACHE_SHARE * free_memory(device)) // (max(cached, computed) * llm.dtype.itemsize)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may still take: what is free, and within its share of the memory."""
    torch.cuda.empty_cache()  # what PyTorch holds unused counts as taken otherwise
    free, total = torch.cuda.mem_get_info(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device.index) * total)
    return max(0, min(free, share - torch.cuda.memory_reserved(device.index)))
