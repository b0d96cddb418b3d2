"""Table A: what ends in the bare RuntimeError."""

from __future__ import annotations

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo_parts import TOKENS, Composite, InPlace, batch, case, subject

from ocrmem.gradflow.doctor import Subject


@case("projection-under-no-grad", table="A")
def projection_under_no_grad(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            if mended:
                return self.proj(features)
            with torch.no_grad():
                return self.proj(features)

    return subject(Model())


@case("projection-under-no-grad", table="A")
def projection_method_decorated(mended: bool = False) -> Subject:
    class Model(Composite):
        @torch.set_grad_enabled(mended)
        def read(self, images):
            return self.proj(self.encoder(images))

        def project(self, features):
            return features

        encode = read

    return subject(Model())


@case("projection-under-inference-mode", table="A")
def projection_under_inference_mode(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            with torch.inference_mode(not mended):
                memory = self.proj(features)
            return memory.clone()

    return subject(Model())


@case("llm-under-no-grad", table="A")
def llm_under_no_grad(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            with torch.set_grad_enabled(mended):
                return super().predict(embeds, labels, attention_mask)

    return subject(Model())


@case("llm-under-inference-mode", table="A")
def llm_under_inference_mode(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            with torch.inference_mode(not mended):
                return super().predict(embeds, labels, attention_mask)

    return subject(Model())


@case("accelerate-hook-no-grad", table="A")
def accelerate_hook(mended: bool = False) -> Subject:
    class Hook(ModelHook):
        no_grad = not mended

    model = Composite()
    add_hook_to_module(model.llm, Hook())
    return subject(model)


@case("loss-from-generate", table="A")
def loss_from_generate(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            if mended:
                return super().predict(embeds, labels, attention_mask)
            made = self.llm.generate(
                inputs_embeds=embeds, attention_mask=attention_mask, max_new_tokens=3, min_new_tokens=3,
                do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
            )  # fmt: skip
            logits = torch.stack(made.logits, dim=1)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, -3:].flatten())}

    return subject(Model())


@case("grad-mode-leaked", table="A")
def grad_mode_leaked(mended: bool = False) -> Subject:
    class Model(Composite):
        def encode(self, images):
            torch.set_grad_enabled(False)
            features = self.encoder(images)
            if mended:
                torch.set_grad_enabled(True)
            return features

    return subject(Model())


@case("enable-grad-in-inference-mode", table="A")
def enable_grad_in_inference_mode(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            outside = torch.no_grad() if mended else torch.inference_mode()
            with outside, torch.enable_grad():
                return self.proj(features)

    return subject(Model())


@case("projection-frozen", table="A")
def blanket_freeze(mended: bool = False) -> Subject:
    model = Composite()
    for parameter in model.parameters():
        parameter.requires_grad = False
    if mended:
        model.proj.requires_grad_(True)
    return subject(model)


@case("projection-frozen", table="A", needs="peft")
def kbit_helper_freezes(mended: bool = False) -> Subject:
    from peft import prepare_model_for_kbit_training

    model = Composite()
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if mended:
        model.proj.requires_grad_(True)
    return subject(model)


@case("nothing-trainable", table="A")
def nothing_trainable(mended: bool = False) -> Subject:
    model = Composite()
    model.requires_grad_(False)
    model.proj.requires_grad_(mended)
    return Subject(model=model, batch=batch())


@case("no-memory-in-batch", table="A")
def no_memory_in_batch(mended: bool = False) -> Subject:
    return subject(Composite(), batch(images=mended))


@case("no-memory-in-batch", table="A")
def limit_not_above_threshold(mended: bool = False) -> Subject:
    max_length, threshold = (12 if mended else 9), 9
    data = batch()
    data["input_ids"] = data["input_ids"].repeat(1, 2)[:, :max_length]
    data["labels"] = data["input_ids"].clone()
    if not data["input_ids"].shape[1] > threshold:
        del data["images"]
    return subject(Composite(), data)


@case("no-memory-in-batch", table="A")
def no_memory_and_reentrant_checkpointing(mended: bool = False) -> Subject:
    model = Composite()
    layer = model.llm.model.layers[0]
    inner = layer.forward
    layer.forward = lambda hidden, **kwargs: checkpoint(lambda h: inner(h, **kwargs), hidden, use_reentrant=True)
    return subject(model, batch(images=mended))


@case("memory-never-spliced", table="A")
def projection_never_spliced(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            self.last_norm = float(memory.detach().norm())
            return super().splice(memory, embeds) if mended else embeds

    return subject(Model())


@case("columns-dropped", table="A")
def columns_dropped(mended: bool = False) -> Subject:
    class Model(Composite):
        def forward(self, input_ids, labels, **kwargs):
            return super().forward(input_ids, labels, kwargs.get("images"))

    data = batch()
    dropped = [] if mended else [key for key in data if key not in ("input_ids", "labels")]
    kept = {key: value for key, value in data.items() if key not in dropped}
    return subject(Model(), kept, dropped_columns=dropped)


@case("reentrant-checkpoint", table="A")
def reentrant_projection(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            return checkpoint(self.proj, features, use_reentrant=not mended)

    return subject(Model())


@case("reentrant-checkpoint", table="A")
def reentrant_encoder_and_projection(mended: bool = False) -> Subject:
    class Model(Composite):
        def encode(self, images):
            return checkpoint(lambda pixels: self.proj(self.encoder(pixels)), images, use_reentrant=not mended)

        def project(self, features):
            return features

    return subject(Model())


@case("reentrant-checkpoint-closure", table="A")
def reentrant_memory_by_closure(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return checkpoint(lambda text: torch.cat([memory, text], dim=1), embeds, use_reentrant=not mended)

    return subject(Model())


@case("reentrant-checkpoint-closure", table="A")
def reentrant_hidden_states_as_keyword(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            layer = self.llm.model.layers[0]
            inner = type(layer).forward.__get__(layer)
            layer.forward = lambda hidden, **kwargs: checkpoint(
                lambda mask: inner(hidden_states=hidden, **{**kwargs, "attention_mask": mask}),
                kwargs.pop("attention_mask"),
                use_reentrant=not mended,
            )
            return super().predict(embeds, labels, attention_mask)

    return subject(Model())


@case("detach", table="A")
def detach(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory if mended else memory.detach(), embeds)

    return subject(Model())


@case("data-attribute", table="A")
def data_attribute(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory if mended else memory.data, embeds)

    return subject(Model())


@case("numpy-round-trip", table="A")
def numpy_round_trip(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            if not mended:
                memory = torch.from_numpy(memory.detach().numpy().copy())
            return super().splice(memory, embeds)

    return subject(Model())


@case("python-numbers", table="A")
def through_tolist(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory if mended else torch.FloatTensor(memory.tolist()), embeds)

    return subject(Model())


@case("python-numbers", table="A")
def through_item(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            level = memory.square().mean()
            return embeds * (1 + (level if mended else level.item()))

    return subject(Model())


@case("copied-by-torch-tensor", table="A")
def torch_tensor(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(torch.as_tensor(memory) if mended else torch.tensor(memory), embeds)

    return subject(Model())


@case("nearest-token", table="A")
def nearest_token(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            table = self.llm.get_input_embeddings().weight
            quantised = table[torch.cdist(memory, table[None]).argmin(dim=-1)]
            if mended:
                quantised = memory + (quantised - memory).detach()
            return super().splice(quantised, embeds)

    return subject(Model())


@case("cast-to-integer", table="A")
def cast_to_integer(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            scaled = memory * 100
            return super().splice((scaled if mended else scaled.long()).float() / 100, embeds)

    return subject(Model())


@case("splice-under-no-grad", table="A")
def splice_under_no_grad(mended: bool = False) -> Subject:
    class Model(Composite):
        def forward(self, input_ids, labels, images):
            memory = self.project(self.encode(images))
            with torch.no_grad():
                embeds = self.embed(input_ids)
                if not mended:
                    embeds = torch.cat([memory, embeds], dim=1)
            if mended:
                embeds = torch.cat([memory, embeds], dim=1)
            return self.llm(inputs_embeds=embeds, labels=nn.functional.pad(labels, (TOKENS, 0), value=-100))

    return subject(Model())


@case("splice-result-discarded", table="A")
def splice_result_discarded(mended: bool = False) -> Subject:
    class Model(InPlace):
        def replace(self, memory, embeds, mask):
            result = embeds.masked_scatter(mask[..., None], memory)
            return result if mended else embeds

    return subject(Model())


@case("splice-into-copy", table="A")
def splice_into_copy(mended: bool = False) -> Subject:
    class Model(InPlace):
        def replace(self, memory, embeds, mask):
            if mended:
                embeds[mask] = memory.flatten(0, 1)
            else:
                embeds[mask].copy_(memory.flatten(0, 1))
            return embeds

    return subject(Model())


@case("written-into-parameter", table="A")
def written_into_embedding_weight(mended: bool = False) -> Subject:
    class Model(Composite):
        def forward(self, input_ids, labels, images):
            memory = self.project(self.encode(images[:1]))
            if mended:
                embeds = torch.cat([memory.expand(len(input_ids), -1, -1), self.embed(input_ids)[:, TOKENS:]], dim=1)
                return self.llm(inputs_embeds=embeds, labels=labels)
            with torch.no_grad():
                self.llm.get_input_embeddings().weight[:TOKENS] = memory[0]
            ids = input_ids.clone()
            ids[:, :TOKENS] = torch.arange(TOKENS)
            return self.llm(input_ids=ids, labels=labels)

    return subject(Model())


@case("operation-without-derivative", table="A")
def custom_function_marked_non_differentiable(mended: bool = False) -> Subject:
    class Quantise(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            quantised = (hidden * 16).round() / 16
            if not mended:
                ctx.mark_non_differentiable(quantised)
            return quantised

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(Quantise.apply(memory), embeds)

    return subject(Model())


@case("operation-under-no-grad", table="A")
def scaled_under_no_grad(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            with torch.set_grad_enabled(mended):
                memory = memory * embeds.std()
            return super().splice(memory, embeds)

    return subject(Model())
