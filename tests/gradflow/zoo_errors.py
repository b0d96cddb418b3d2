"""Table B: what ends in an error of another kind."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo_parts import TOKENS, Composite, InPlace, RenamedProjection, batch, case, subject, tiny_llm

from ocrmem.gradflow.doctor import Subject


@case("inference-features", table="B")
def inference_features(mended: bool = False) -> Subject:
    class Model(Composite):
        def encode(self, images):
            with torch.no_grad() if mended else torch.inference_mode():
                return self.encoder(images)

    return subject(Model())


@case("inference-features", table="B")
def inference_features_cloned_inside(mended: bool = False) -> Subject:
    class Model(Composite):
        def encode(self, images):
            with torch.inference_mode():
                features = self.encoder(images)
                if not mended:
                    features = features.clone()
            return features.clone() if mended else features.detach().float()

    return subject(Model())


@case("inference-weights", table="B")
def inference_weights(mended: bool = False) -> Subject:
    with torch.inference_mode(not mended):
        llm = tiny_llm()
    return subject(Composite(llm))


@case("requires-grad-on-inference-tensor", table="B")
def requires_grad_on_inference_tensor(mended: bool = False) -> Subject:
    class Model(Composite):
        def encode(self, images):
            with torch.inference_mode():
                features = self.encoder(images)
            return (features.clone() if mended else features).requires_grad_(True)

    return subject(Model())


@case("write-into-inference-tensor", table="B")
def write_into_inference_embeddings(mended: bool = False) -> Subject:
    class Model(InPlace):
        def embed(self, input_ids):
            with torch.no_grad() if mended else torch.inference_mode():
                return super().embed(input_ids)

        def replace(self, memory, embeds, mask):
            embeds[:, :TOKENS] = memory
            return embeds

    return subject(Model())


@case("in-place-splice-on-leaf", table="B")
def in_place_splice_after_input_grads(mended: bool = False) -> Subject:
    class Model(InPlace):
        def replace(self, memory, embeds, mask):
            embeds = embeds.clone() if mended else embeds
            embeds[:, :TOKENS] = memory
            return embeds

    model = Model()
    model.llm.enable_input_require_grads()
    return subject(model)


@case("in-place-splice-on-leaf", table="B")
def masked_scatter_in_place_on_leaf(mended: bool = False) -> Subject:
    class Model(InPlace):
        def replace(self, memory, embeds, mask):
            if mended:
                return embeds.masked_scatter(mask[..., None], memory)
            return embeds.masked_scatter_(mask[..., None], memory)

    model = Model()
    model.llm.gradient_checkpointing_enable()
    return subject(model)


@case("numpy-on-grad-tensor", table="B")
def numpy_on_grad_tensor(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory if mended else torch.from_numpy(memory.numpy()), embeds)

    return subject(Model())


@case("memory-cached", table="B")
def memory_cached_across_steps(mended: bool = False) -> Subject:
    class Model(Composite):
        cached = None

        def project(self, features):
            if mended or self.cached is None:
                self.cached = self.proj(features)
            return self.cached

    model = Model()
    model(**batch()).loss.backward()
    return subject(model)


@case("memory-cached", table="B")
def memory_cached_seen_at_once(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            if mended or "cached" not in vars(self):
                self.cached = self.proj(features)
            return self.cached

    return subject(Model())


@case("reentrant-layers-share-memory", table="B")
def reentrant_layers_share_memory(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            memory = embeds[:, :TOKENS]
            hidden = embeds[:, TOKENS:].detach().requires_grad_(True)
            for _ in range(2):
                hidden = checkpoint(lambda h: h + memory.mean(dim=1, keepdim=True), hidden, use_reentrant=not mended)
            return self.llm(inputs_embeds=hidden, labels=labels[:, TOKENS:])

    return subject(Model())


@case("projection-in-worker", table="B")
def projection_in_worker(mended: bool = False) -> Subject:
    model = Composite()
    features = model.encoder(batch()["images"])
    # What a DataLoader worker does with each item before the main process gets it.
    ForkingPickler.dumps(features if mended else model.proj(features))
    return subject(model)


@case("memory-dtype", table="B")
def float32_memory_into_bfloat16_llm(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            memory = memory.to(embeds.dtype) if mended else memory
            return torch.cat([memory, embeds.to(memory.dtype)], dim=1)

    return subject(Model(tiny_llm().to(torch.bfloat16)))


@case("features-dtype", table="B")
def bfloat16_features_into_float32_projection(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            return self.proj(features.float() if mended else features.bfloat16())

    return subject(Model())


@case("splice-dtype", table="B")
def masked_scatter_of_float32_into_bfloat16(mended: bool = False) -> Subject:
    class Model(InPlace):
        def replace(self, memory, embeds, mask):
            return embeds.masked_scatter(mask[..., None], memory.to(embeds.dtype) if mended else memory)

    return subject(Model(tiny_llm().to(torch.bfloat16)))


@case("more-slots-than-memory", table="B")
def more_slots_than_memory(mended: bool = False) -> Subject:
    class Model(InPlace):
        def replace(self, memory, embeds, mask):
            if not mended:
                mask[:, : TOKENS + 1] = True
            return embeds.masked_scatter(mask[..., None], memory)

    return subject(Model())


@case("labels-not-extended", table="B")
def labels_not_extended(mended: bool = False) -> Subject:
    class Model(Composite):
        def forward(self, input_ids, labels, images):
            embeds = self.splice(self.project(self.encode(images)), self.embed(input_ids))
            if mended:
                labels = nn.functional.pad(labels, (TOKENS, 0), value=-100)
            return self.llm(inputs_embeds=embeds, labels=labels)

    return subject(Model())


@case("optimizer-empty", table="B")
def optimizer_empty(mended: bool = False) -> Subject:
    model = Composite()
    learning = (parameter for parameter in model.proj.parameters())
    print(sum(parameter.numel() for parameter in learning), "parameters will learn")
    return subject(model, optimizer=torch.optim.AdamW(model.proj.parameters() if mended else learning))


@case("modules-to-save-suffix", table="B", needs="peft")
def modules_to_save_suffix(mended: bool = False) -> Subject:
    from peft import LoraConfig, get_peft_model

    name, model = ("mem_projector", RenamedProjection()) if mended else ("proj", Composite())
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=[name]))
    return subject(model, trainable=name)
