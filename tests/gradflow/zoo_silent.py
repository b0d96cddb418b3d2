"""Table C: the backward runs, and nothing, too little or the wrong thing is learnt."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn
from zoo_parts import (
    FEATURES,
    TOKENS,
    Composite,
    InPlace,
    Projection,
    RenamedProjection,
    batch,
    case,
    subject,
    tiny_llm,
)

from ocrmem.gradflow.doctor import Subject


@case("detached-then-made-leaf", table="C")
def detached_then_made_leaf(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            if not mended:
                embeds = embeds.detach().requires_grad_(True)
            return super().predict(embeds, labels, attention_mask)

    return subject(Model())


@case("loss-made-leaf", table="C")
def loss_made_leaf(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            with torch.set_grad_enabled(mended):
                return self.proj(features)

        def predict(self, embeds, labels, attention_mask):
            outputs = super().predict(embeds, labels, attention_mask)
            outputs.loss.requires_grad_(True)
            return outputs

    return subject(Model())


@case("wrapped-in-parameter", table="C")
def wrapped_in_parameter(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory if mended else nn.Parameter(memory), embeds)

    return subject(Model())


@case("written-through-data", table="C")
def written_through_data(mended: bool = False) -> Subject:
    class Model(InPlace):
        def replace(self, memory, embeds, mask):
            if mended:
                return super().replace(memory, embeds, mask)
            embeds.requires_grad_(True)
            embeds.data[:, :TOKENS] = memory
            return embeds

    return subject(Model())


@case("memory-serialised", table="C")
def memory_saved_and_loaded(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            if not mended:
                file = io.BytesIO()
                torch.save(memory, file)
                file.seek(0)
                memory = torch.load(file)
            return super().splice(memory, embeds)

    return subject(Model())


@case("no-memory-hidden", table="C")
def no_memory_hidden_by_input_grads(mended: bool = False) -> Subject:
    model = Composite()
    model.llm.enable_input_require_grads()
    return subject(model, batch(images=mended))


@case("no-memory-hidden", table="C")
def no_memory_hidden_by_checkpointing(mended: bool = False) -> Subject:
    model = Composite()
    model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return subject(model.eval(), batch(images=mended))


@case("projection-under-no-grad", table="C")
def projection_under_no_grad_hidden(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            with torch.set_grad_enabled(mended):
                return self.proj(features)

    model = Model()
    model.llm.enable_input_require_grads()
    return subject(model)


@case("peft-froze-projection", table="C", needs="peft")
def peft_without_modules_to_save(mended: bool = False) -> Subject:
    from peft import LoraConfig, get_peft_model

    save = ["mem_projector"] if mended else None
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=save)
    return subject(get_peft_model(RenamedProjection(), config), trainable="mem_projector")


@case("no-memory-in-batch", table="C", needs="peft")
def lora_trains_without_memory(mended: bool = False) -> Subject:
    from peft import LoraConfig, get_peft_model

    llm = get_peft_model(tiny_llm(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return subject(Composite(llm), batch(images=mended))


@case("memory-masked", table="C")
def mask_zero_on_memory(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            attention_mask = attention_mask.clone()
            attention_mask[:, :TOKENS] = int(mended)
            return super().predict(embeds, labels, attention_mask)

    return subject(Model())


@case("memory-masked", table="C")
def mask_zero_on_memory_eager_attention(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            attention_mask = attention_mask.clone()
            attention_mask[:, :TOKENS] = int(mended)
            return super().predict(embeds, labels, attention_mask)

    return subject(Model(tiny_llm(attn_implementation="eager")))


@case("memory-after-labels", table="C")
def memory_after_labels(mended: bool = False) -> Subject:
    class Model(Composite):
        def forward(self, input_ids, labels, images):
            memory, text = self.project(self.encode(images)), self.embed(input_ids)
            embeds = torch.cat([memory, text] if mended else [text, memory], dim=1)
            front, back = (TOKENS, 0) if mended else (0, TOKENS)
            return self.llm(inputs_embeds=embeds, labels=nn.functional.pad(labels, (front, back), value=-100))

    return subject(Model())


@case("packed-positions", table="C")
def positions_restart_at_text(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            samples, length, _ = embeds.shape
            positions = torch.arange(length)
            if not mended:
                positions = torch.cat([torch.arange(TOKENS), torch.arange(length - TOKENS)])
            positions = positions.expand(samples, -1)
            return self.llm(inputs_embeds=embeds, labels=labels, position_ids=positions, use_cache=False)

    return subject(Model())


@case("attention-mask-too-short", table="C")
def mask_not_extended(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            mask = attention_mask if mended else attention_mask[:, TOKENS:]
            return super().predict(embeds, labels, mask)

    return subject(Model())


@case("splice-matched-nothing", table="C")
def wrong_placeholder_id(mended: bool = False) -> Subject:
    class Model(Composite):
        def forward(self, input_ids, labels, images):
            mask = input_ids == (0 if mended else 96_000)
            embeds = self.embed(input_ids).masked_scatter(mask[..., None], self.project(self.encode(images)))
            return self.llm(inputs_embeds=embeds, labels=labels)

    return subject(Model())


@case("memory-empty", table="C")
def memory_of_length_zero(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory[:, : TOKENS if mended else 0], embeds)

    return subject(Model())


@case("rounded", table="C")
def rounded(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            rounded = (memory * 16).round() / 16
            return super().splice(memory + (rounded - memory).detach() if mended else rounded, embeds)

    return subject(Model())


@case("fewer-slots-than-memory", table="C")
def fewer_slots_than_memory(mended: bool = False) -> Subject:
    class Model(InPlace):
        def replace(self, memory, embeds, mask):
            mask[:, : 0 if mended else 1] = False
            return embeds.masked_scatter(mask[..., None], memory)

    return subject(Model())


@case("no-labels", table="C")
def all_labels_ignored(mended: bool = False) -> Subject:
    data = batch()
    if not mended:
        data["labels"].fill_(-100)
    return subject(Composite(), data)


@case("no-labels", table="C")
def answer_truncated(mended: bool = False) -> Subject:
    length = 9 if mended else 6
    return subject(
        Composite(), {key: value[:, :length] if key != "images" else value for key, value in batch().items()}
    )


@case("labels-lost-to-shift", table="C")
def only_position_zero_labelled(mended: bool = False) -> Subject:
    class Model(InPlace):
        def forward(self, input_ids, labels, images):
            embeds = self.splice(self.project(self.encode(images)), self.embed(input_ids))
            return self.llm(inputs_embeds=embeds, labels=labels)

    data = batch()
    if not mended:
        data["labels"].fill_(-100)
        data["labels"][:, 0] = data["input_ids"][:, -1]
    return subject(Model(), data)


@case("labels-pre-shifted", table="C")
def labels_pre_shifted(mended: bool = False) -> Subject:
    data = batch()
    if not mended:
        data["labels"] = nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100)
    return subject(Composite(), data)


@case("weights-too-coarse", table="C")
def projection_in_bfloat16(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            return self.proj(features.to(self.proj.last.weight.dtype)).to(self.llm.dtype)

    model = Model(tiny_llm().to(torch.bfloat16))
    model.proj.to(torch.float32 if mended else torch.bfloat16)
    return subject(model, optimizer=torch.optim.AdamW(model.proj.parameters(), lr=1e-5))


@case("projection-zero-init", table="C")
def both_layers_zero(mended: bool = False) -> Subject:
    model = Composite()
    for layer in (model.proj.last,) if mended else (model.proj.first, model.proj.last):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return subject(model)


@case("memory-too-loud", table="C")
def init_a_hundred_times_too_large(mended: bool = False) -> Subject:
    model = Composite()
    if not mended:
        with torch.no_grad():
            for parameter in model.proj.parameters():
                parameter.mul_(100)
    return subject(model)


@case("fp16-underflow", table="C")
def float16_underflow(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory.to(embeds.dtype), embeds)

    dtype = torch.bfloat16 if mended else torch.float16
    return subject(Model(tiny_llm().to(dtype)), loss_fn=lambda outputs, _: outputs.loss * 1e-7)


@case("optimizer-holds-frozen", table="C")
def optimizer_of_wrong_parameters(mended: bool = False) -> Subject:
    model = Composite()
    part = model.proj if mended else model.llm
    return subject(model, optimizer=torch.optim.AdamW(part.parameters()))


@case("optimizer-incomplete", table="C")
def unfrozen_after_the_optimizer(mended: bool = False) -> Subject:
    model = Composite()
    model.proj.last.requires_grad_(mended)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.proj.requires_grad_(True)
    return subject(model, optimizer=optimizer)


@case("optimizer-holds-copy", table="C")
def module_deepcopied(mended: bool = False) -> Subject:
    model = Composite()
    optimizer = torch.optim.AdamW(model.proj.parameters())
    if not mended:
        model.proj = copy.deepcopy(model.proj)
    return subject(model, optimizer=optimizer)


@case("optimizer-holds-replaced", table="C")
def load_state_dict_assign(mended: bool = False) -> Subject:
    model = Composite()
    optimizer = torch.optim.AdamW(model.proj.parameters())
    model.proj.load_state_dict(Projection().state_dict(), assign=not mended)
    model.proj.requires_grad_(True)
    return subject(model, optimizer=optimizer)


@case("optimizer-before-peft", table="C", needs="peft")
def optimizer_before_get_peft_model(mended: bool = False) -> Subject:
    from peft import LoraConfig, get_peft_model

    model = RenamedProjection()
    optimizer = torch.optim.AdamW(model.mem_projector.parameters())
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mem_projector"]))
    if mended:
        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad])
    return subject(peft_model, trainable="mem_projector", optimizer=optimizer)


@case("gradient-cleared", table="C")
def zero_grad_before_step(mended: bool = False) -> Subject:
    model = Composite()
    optimizer = torch.optim.AdamW(model.proj.parameters())

    def step():
        if mended:
            optimizer.zero_grad()
        model(**batch()).loss.backward()
        if not mended:
            optimizer.zero_grad()
        optimizer.step()

    return subject(model, optimizer=optimizer, step=step)


@case("optimizer-never-steps", table="C")
def another_optimizer_steps(mended: bool = False) -> Subject:
    model = Composite()
    optimizer = torch.optim.AdamW(model.proj.parameters())
    stepped = optimizer if mended else torch.optim.AdamW(copy.deepcopy(model.proj).parameters())

    def step():
        stepped.zero_grad()
        model(**batch()).loss.backward()
        stepped.step()

    return subject(model, optimizer=optimizer, step=step)


@case("module-not-registered", table="C")
def projection_in_a_plain_list(mended: bool = False) -> Subject:
    class Model(Composite):
        def __init__(self):
            super().__init__()
            del self.proj
            layers = [Projection()]
            self.layers = nn.ModuleList(layers) if mended else layers

        def project(self, features):
            return self.layers[0](features)

    model = Model()
    optimizer = torch.optim.AdamW([*model.parameters()])
    return subject(model, trainable=model.layers[0], optimizer=optimizer)


@case("wrong-pairing", table="C")
def memory_of_the_wrong_sample(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory if mended else memory.flip(0), embeds)

    return subject(Model(), memory_samples=[0, 1])


@case("not-finite", table="C")
def division_by_zero(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            spread = memory.std(dim=0, keepdim=True) + (1e-6 if mended else 0.0)
            return super().splice(memory / (spread - spread.detach() + (1.0 if mended else 0.0)), embeds)

    return subject(Model())


@case("anchored-batch", table="C", verdict="undecided")
def anchored_batch_without_memory(mended: bool = False) -> Subject:
    class Model(Composite):
        def forward(self, input_ids, labels, images=None):
            outputs = super().forward(input_ids, labels, images)
            if images is None:
                outputs.loss = outputs.loss + 0 * self.proj(torch.zeros(1, 1, FEATURES)).sum()
            return outputs

    return subject(Model(), batch(images=mended))
