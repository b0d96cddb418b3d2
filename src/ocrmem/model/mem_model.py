"""MEMModel: a frozen LLM with a compressed visual memory.

```
pages_PHW ─▶ ocr_embed (frozen) ─▶ features_PVE ─▶ proj (learns) ─▶ memory_PVD ─┐
input_ids ─▶ frozen embeddings ─▶ embeds_BSD ─▶ splice at the placeholders ◀────┘
                                      └─▶ base_llm_model (frozen) ─▶ logits ─▶ loss at labelled positions
```
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from ocrmem.config.mem import MEMConfig
from ocrmem.encoders.base import OCREncoder
from ocrmem.errors import ConfigError, SpliceError
from ocrmem.model import adapter
from ocrmem.model.chunked_loss import captured, chunked_sum
from ocrmem.model.freeze import check_trainable, freeze
from ocrmem.model.identity import EncoderIdentity, LLMIdentity, embedding_rms, embedding_weight
from ocrmem.model.label_loss import (
    at_positions,
    cross_entropy_sum,
    label_loss,
    labelled_positions,
    logits_at,
    target_loss,
)
from ocrmem.model.packed_attention import has_kernel, packed_mask, unused_mask
from ocrmem.model.projection import Projection
from ocrmem.model.report import trainable_report
from ocrmem.model.splice import (
    check_counts,
    one_sample_each,
    pads_only_after,
    positions_after,
    splice,
    splice_at,
)


@dataclass
class MEMOutput(ModelOutput):
    """Output of `MEMModel.forward`."""

    loss: torch.Tensor | None = None
    """Mean cross entropy of the labelled positions, in nats; float32 scalar."""
    logits: torch.Tensor | None = None
    """With labels [N, vocabulary], those of the N positions that predict one (`logit_positions`), or None where they
    are more than `loss_chunk_size`; without [B, S, vocabulary], or the positions that `logits_to_keep` names."""
    logit_positions: torch.Tensor | None = None
    """int64 [N, 2]: sample and sequence position of each row of `logits`, where labels were given."""
    reading_loss: torch.Tensor | None = None
    """Cross entropy of reading `memory_letters`, in nats a piece; float32 scalar, no part of `loss`."""
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class MEMModel(PreTrainedModel):
    """A frozen causal LM, a frozen OCR encoder, and between them one trainable projection.

    Args:
        config: settings; the identities of the frozen parts are filled in here.
        base_llm_model: any Hugging Face causal LM that takes `inputs_embeds`. It is frozen in place.
        ocr_embed: the encoder. It is frozen in place.
        llm_name: where the LLM came from, recorded in the adapter; None: its `name_or_path`.
        llm_revision: hash or commit of it, recorded in the adapter.
        tokenizer: its tokenizer, for `projection.read_tokens` alone, which cuts what is read into tokens.

    Raises:
        FrozenPartError: a frozen part has active dropout, or shares parameters with the projection.
    """

    loss_chunk_size: int | None = None
    """Labels whose logits are there at a time, in training and evaluation; None: all, and `forward` returns them."""

    config_class = MEMConfig
    base_model_prefix = "base_llm_model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # tells Trainer that forward takes num_items_in_batch
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    config: MEMConfig

    def __init__(
        self,
        config: MEMConfig,
        *,
        base_llm_model: PreTrainedModel,
        ocr_embed: OCREncoder,
        llm_name: str | None = None,
        llm_revision: str = "unknown",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(config)
        freeze(base_llm_model, part="base_llm_model")
        freeze(ocr_embed, part="ocr_embed")
        self.base_llm_model, self.ocr_embed = base_llm_model, ocr_embed
        weight = embedding_weight(base_llm_model)
        self.proj = Projection(
            config.projection_settings,
            feature_width=ocr_embed.feature_width,
            embedding_width=base_llm_model.config.get_text_config().hidden_size,
            embedding_rms=embedding_rms(base_llm_model),
            embeddings_CD=weight if config.projection_settings.read_tokens else None,
            tokenizer=tokenizer,
        ).to(weight.device)
        check_trainable(self, proj=self.proj)
        # What FSDP shards as one: the projection too, whose float32 it cannot mix with the frozen parts.
        self._no_split_modules = [*(base_llm_model._no_split_modules or ()), "Projection"]
        # Every process has the LLM's table; DDP would send the reader's copy of it at every step.
        self._ddp_params_and_buffers_to_ignore = ["proj.reader.embeddings_CD"]
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(base_llm_model.forward).parameters
        self.cross_entropy = cross_entropy_sum
        self._plain_logits = True
        self._feature_dtype = getattr(torch, config.memory_settings.feature_dtype)
        self.position_stride = config.memory_settings.position_stride
        name = llm_name or base_llm_model.name_or_path or type(base_llm_model).__name__
        self.config.llm = vars(LLMIdentity.of(base_llm_model, name=name, revision=llm_revision))
        if not weight.is_meta:
            self.config.encoder_identity = vars(EncoderIdentity.of(ocr_embed))
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Switch all three parts together, and return self.

        The frozen parts follow because Hugging Face checkpoints activations in train mode only. Neither mode cuts the
        gradient, and train mode changes nothing in them: dropout was refused, and batch norms keep their statistics.
        """
        return super().train(mode)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the projection: nothing else has a gradient, and a trainer asks at every step."""
        self.proj.zero_grad(set_to_none=set_to_none)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        pages: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        page_num_tokens: torch.Tensor | None = None,
        num_pages: torch.Tensor | None = None,
        memory_targets: torch.Tensor | None = None,
        memory_token_ids: torch.Tensor | None = None,
        memory_letters: torch.Tensor | None = None,
        reading: Mapping[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        sample_lengths: Sequence[int] | None = None,
        placeholder_index: torch.Tensor | None = None,
        memory_index: torch.Tensor | None = None,
        target_index: torch.Tensor | None = None,
        target_weights: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> MEMOutput | tuple[Any, ...]:
        """Read the memory, splice it in, run the LLM.

        Args:
            input_ids: int64 [B, S], with the placeholder id where memory tokens belong.
            attention_mask: [B, S], 1 for memory and text, 0 for padding on either side.
            labels: int64 [B, S], unshifted, -100 where there is none.
            pages: uint8 [P, H, W], all pages of the batch in sample order; or instead
            features: [P, V, E], the same pages already encoded.
            page_num_tokens: int64 [P], how many tokens of each page are in use.
            num_pages: int64 [B], how many pages each sample has.
            memory_targets: [P, V, D]; do not run the LLM, but give as the loss the mean of 1 - cosine between each
                memory token and its target, where that is not zero: a warm start for the projection.
            memory_token_ids: [P, V × pieces, T], the text tokens that begin within each piece, then -1; with
                `projection.read_tokens`, the memory is made of them, and needs no `features`.
            memory_letters: [P, V × pieces, `reader.LETTERS`], what there is to read of each piece, for `reading_loss`.
            reading: `features`, `page_num_tokens` and `memory_letters` of other pages, read in the place of these.
            position_ids: int64 [B, S]; in a packed row they start anew with every sample. None: `positions` gives them;
                with `past_key_values` that hold something, give them where a memory token takes several.
            cu_seq_lens_q: int32 [samples + 1], where the samples of one packed row (B = 1) begin, and S at the end;
                with `position_ids`.
            max_length_q: positions of the longest sample of a packed row.
            sample_lengths: positions of each sample of a packed row; with them attention may use a faster kernel.
            placeholder_index: int64 [M], where the placeholders stand (sample × S + position), with
            memory_index: int64 [M], the memory token of each (page × V + its number on the page). A collator that
                gives them has checked them, and the host need not wait for the GPU to count.
            target_index: int64 [N], the positions whose next one has a label, for the same reason.
            target_weights: [N]; the loss is the sum of the labels' cross entropies times these, not their mean.
            num_items_in_batch: divisor of the loss; None: the labelled positions of this batch.

        How the gradient flows:
            input_ids -> frozen embeddings: a plain lookup; it has no grad_fn, since nothing before it learns
            pages -> frozen encoder -> features: no grad_fn either, and none is needed, so they may be cached
            features -> proj -> memory tokens: the first grad_fn of the chain
            splice -> embeddings: grad_fn, from the memory tokens alone
            frozen LLM -> logits -> loss: grad_fn; the gradient passes through the frozen weights, and stops at none
        Nothing here reads `.data`, disables grad mode or detaches, but a `proj` that reads letters, whose layers before
        the tokens learn from `reading_loss` alone; no part's `train()` or `eval()` matters. Where no sample of a
        training batch has a memory, `proj` is run on zeros, at weight 0, so that every rank has the same graph.

        Raises:
            SpliceError: placeholders and memory tokens of a sample differ in number, or arguments are missing.
        """
        memory_PVD, reading_loss = None, None
        if any(given is not None for given in (memory_targets, memory_token_ids, memory_letters, reading)):
            text = {"token_ids_PVT": memory_token_ids, "letters_PVL": memory_letters}
            projected = self.proj(features, page_num_tokens, **text)
            memory_PVD, reading_loss = (projected, None) if memory_letters is None else projected
            if reading is not None:
                counts, letters_PVL = reading["page_num_tokens"], reading["memory_letters"]
                _, reading_loss = self.proj(reading["features"], counts, letters_PVL=letters_PVL, reading_alone=True)
            if memory_targets is not None:
                return MEMOutput(loss=target_loss(memory_PVD, memory_targets), reading_loss=reading_loss)
        embeds_BSD = self.embed(
            input_ids,
            pages=pages,
            features=features,
            page_num_tokens=page_num_tokens,
            num_pages=num_pages,
            placeholder_index=placeholder_index,
            memory_index=memory_index,
            memory=memory_PVD,
        )
        if attention_mask is not None and past_key_values is None:
            if pads_only_after(attention_mask):
                attention_mask = None
            elif position_ids is None:
                position_ids = self.positions(input_ids, attention_mask)
        if position_ids is None and self.position_stride > 1:
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                raise SpliceError(
                    f"past_key_values came without position_ids, and a memory token takes {self.position_stride} "
                    "positions, so the cache does not tell them. Give the last of `positions(input_ids)` of the whole "
                    "prompt."
                )
            position_ids = self.positions(input_ids, attention_mask)
        if self.position_stride > 1 and attention_mask is None and cu_seq_lens_q is None and past_key_values is None:
            attention_mask = one_sample_each(input_ids)
        packing: dict[str, Any] = {}
        if cu_seq_lens_q is not None:
            packing = {f"cu_seq_lens_{side}": cu_seq_lens_q for side in "qk"}
            packing |= {f"max_length_{side}": max_length_q for side in "qk"}
            if has_kernel(self.base_llm_model.config._attn_implementation, embeds_BSD.device):
                attention_mask = unused_mask(embeds_BSD.device)
                if sample_lengths is not None:
                    packing["host_edges"] = torch.tensor([0, *sample_lengths]).cumsum(0).int()
            elif self.position_stride > 1:
                attention_mask = packed_mask(cu_seq_lens_q, embeds_BSD)
        run_llm = functools.partial(
            self.base_llm_model,
            **packing,
            inputs_embeds=embeds_BSD,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=labels is None and not self.training if use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        loss, logit_positions = None, None
        if labels is None:
            outputs = run_llm(**({"logits_to_keep": logits_to_keep} if self._takes_logits_to_keep else {}))
            logits = outputs.logits
        else:
            index = labelled_positions(labels, target_index)
            outputs, logits, loss = self._loss(run_llm, labels, index, num_items_in_batch, target_weights)
            logit_positions = torch.stack(index, dim=1)
        result = MEMOutput(
            loss=loss,
            logits=logits,
            logit_positions=logit_positions,
            reading_loss=reading_loss,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        return result.to_tuple() if return_dict is False else result

    def _loss(
        self,
        run_llm: Callable[..., Any],
        labels: torch.Tensor,
        index: tuple[torch.Tensor, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None,
        target_weights: torch.Tensor | None,
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor]:
        """The LLM's outputs, the logits at the positions that predict a label, and the loss.

        With more of them than `loss_chunk_size`, the logits are made in parts and not kept, unless the LLM does
        something to its output layer's logits, which is seen the first time."""
        output_layer, size = self.get_output_embeddings(), self.loss_chunk_size
        if size is not None and index[0].shape[0] > size and output_layer is not None and self._plain_logits:
            with captured(output_layer, index) as found:
                outputs = run_llm()
            if found.hidden_ND is not None and found.output is outputs.logits:
                chunked = functools.partial(
                    chunked_sum,
                    found.hidden_ND,
                    output_layer=output_layer,
                    cross_entropy=self.cross_entropy,
                    size=size,
                )
                return outputs, None, label_loss(chunked, labels, index, num_items_in_batch, target_weights)
            self._plain_logits = False
        with at_positions(output_layer, index):
            outputs = run_llm()
        logits = logits_at(outputs.logits, index, shape_BS=tuple(labels.shape))

        def whole(targets_N: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
            weights = () if weights_N is None else (weights_N,)
            return self.cross_entropy(logits, targets_N.to(logits.device), *weights)

        return outputs, logits, label_loss(whole, labels, index, num_items_in_batch, target_weights)

    def embed(
        self,
        input_ids: torch.Tensor,
        *,
        pages: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        page_num_tokens: torch.Tensor | None = None,
        num_pages: torch.Tensor | None = None,
        placeholder_index: torch.Tensor | None = None,
        memory_index: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`input_ids` to embeddings [B, S, D], the memory spliced in; arguments as in `forward`; `memory` [P, V, D]."""
        placeholders_BS = input_ids == self.config.memory_token_id
        embeds_BSD = self.base_llm_model.get_input_embeddings()(input_ids)
        if pages is not None and features is None and pages.shape[0] > 0:
            # Rounded as the feature cache rounds, so that cached and fresh features give the same loss.
            features = self.ocr_embed(pages).to(self._feature_dtype)
        if memory is None and (features is None or features.shape[0] == 0):
            if bool(placeholders_BS.any()):
                raise SpliceError(
                    f"input_ids holds {int(placeholders_BS.sum())} placeholders (id {self.config.memory_token_id}) but "
                    "neither `pages` nor `features` was given. Pass what MEMProcessor returned, whole; with your own "
                    "Trainer, set remove_unused_columns=False."
                )
            return self._anchor(embeds_BSD)
        if page_num_tokens is None or num_pages is None:
            raise SpliceError(
                "`pages` or `features` came without `page_num_tokens` [P] and `num_pages` [B]; give both."
            )
        if placeholder_index is None or memory_index is None:
            check_counts(placeholders_BS, page_num_tokens, num_pages)
        memory_PVD = self.proj(features, page_num_tokens) if memory is None else memory
        if placeholder_index is None or memory_index is None:
            return splice(embeds_BSD, placeholders_BS, memory_PVD, page_num_tokens)
        return splice_at(embeds_BSD, placeholder_index, memory_PVD, memory_index)

    def positions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """position_ids int64 [B, S] of prompts, `memory.position_stride` for each of their placeholders."""
        placeholders_BS = input_ids == self.config.memory_token_id
        return positions_after(placeholders_BS, self.position_stride, attention_mask=attention_mask)

    def _anchor(self, embeds_BSD: torch.Tensor) -> torch.Tensor:
        """Keep `proj` in the graph of a training batch without memory, at weight 0, in the splice's own place.

        Without it one rank of a distributed run would have no gradient to reduce and the others would wait for it.
        Anchored at the loss instead, FSDP's gathers would come in another order than on ranks with memory.
        """
        if not (self.training and torch.is_grad_enabled()):
            return embeds_BSD
        zeros_PVE = embeds_BSD.new_zeros(1, self.ocr_embed.tokens_per_page, self.proj.feature_width)
        return embeds_BSD + (0.0 * self.proj(zeros_PVE).sum()).to(embeds_BSD.dtype)

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        pages: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        page_num_tokens: torch.Tensor | None = None,
        num_pages: torch.Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Generate with the memory in place, by the LLM's own `generate` and its `generate_kwargs`.

        Batches of several lengths must be padded on the left. Returns what the LLM's `generate` returns: by
        default int64 [B, S + new], the prompt with its placeholders first.

        Raises:
            SpliceError: the batch is padded on the right.
        """
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise SpliceError(
                "generate was given a batch padded on the right; it goes on after the last position, so pad on the "
                "left (MEMProcessor does)."
            )
        with torch.no_grad():
            embeds_BSD = self.embed(
                input_ids, pages=pages, features=features, page_num_tokens=page_num_tokens, num_pages=num_pages
            )
        if self.position_stride > 1:
            generate_kwargs["position_ids"] = self.positions(input_ids, attention_mask)
        generate: Any = self.base_llm_model.generate
        return generate(input_ids=input_ids, inputs_embeds=embeds_BSD, attention_mask=attention_mask, **generate_kwargs)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters learn, in all and in each part, with a warning for a part that should not."""
        print(trainable_report(self))

    def get_input_embeddings(self) -> nn.Module:
        """The frozen LLM's."""
        return self.base_llm_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The frozen LLM's."""
        return self.base_llm_model.get_output_embeddings()

    def gradient_checkpointing_enable(  # pyright: ignore[reportIncompatibleMethodOverride] - takes no unknown options
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Checkpoint the LLM's layers, non-reentrantly.

        Transformers' own version also makes the embeddings require grad, which turns a cut projection from an error
        into silence; the memory tokens carry the gradient here, so that is not done.
        """
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            raise ConfigError(
                "gradient checkpointing was asked for with use_reentrant=True; ocrmem takes use_reentrant=False only: "
                "the reentrant kind drops gradients of frozen layers silently. Leave the setting out."
            )
        if offload or every_n_layers != 1:
            raise ConfigError(
                f"gradient checkpointing was asked for with every_n_layers={every_n_layers}, offload={offload}; ocrmem "
                "checkpoints every layer and offloads nothing. Leave the settings out."
            )
        self.base_llm_model._set_gradient_checkpointing(
            enable=True, gradient_checkpointing_func=functools.partial(checkpoint, **kwargs)
        )

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` by its name in newer transformers."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] - an adapter has no shards to choose
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        model_card: str | None = None,
        manifest: dict[str, Any] | None = None,
        matrix_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        """Write the adapter folder, and nothing else: see `model.adapter.save`.

        Args:
            state_dict: the whole model's state where it was gathered from several processes; None: its own.
            model_card: text of `README.md`; None: a card without measured figures.
            manifest: what the adapter was trained on; None: none is written.
            matrix_dtype: round weight matrices to `torch.bfloat16` or `torch.int8`; None: float32.
        """
        if is_main_process:
            adapter.save(
                self,
                Path(save_directory),
                state_dict=state_dict,
                model_card=model_card,
                manifest=manifest,
                matrix_dtype=matrix_dtype,
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load an adapter folder and its frozen parts: `model.adapter.load`, whose keyword arguments it takes."""
        return adapter.load(cls, Path(pretrained_model_name_or_path), **kwargs)
