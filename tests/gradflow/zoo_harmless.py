"""Table D: what looks like a break and is none. Most have nothing to mend; `mended` is there for the common
shape."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo_parts import FEATURES, TOKENS, WIDTH, Composite, InPlace, batch, case, subject, tiny_llm

from ocrmem.gradflow.doctor import Subject


@case(None, table="D")
def eval_everywhere(mended: bool = False) -> Subject:
    return subject(Composite().eval())


@case(None, table="D")
def eval_on_frozen_parts(mended: bool = False) -> Subject:
    model = Composite().train()
    model.llm.eval()
    model.encoder.eval()
    return subject(model)


@case(None, table="D")
def eval_on_frozen_recurrent_and_attention_parts(mended: bool = False) -> Subject:
    class Model(Composite):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True, dropout=0.0).requires_grad_(False).eval()
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, dropout=0.5, batch_first=True)
            self.attention = nn.TransformerEncoder(layer, 1).requires_grad_(False).eval()
            self.norm = nn.BatchNorm1d(WIDTH).requires_grad_(False).eval()

        def splice(self, memory, embeds):
            memory = self.attention(self.rnn(memory)[0])
            return super().splice(self.norm(memory.transpose(1, 2)).transpose(1, 2), embeds)

    return subject(Model())


@case(None, table="D")
def encoder_under_no_grad(mended: bool = False) -> Subject:
    class Model(Composite):
        @torch.no_grad()
        def encode(self, images):
            return self.encoder(images)

    return subject(Model())


@case(None, table="D")
def features_cloned_outside_inference_mode(mended: bool = False) -> Subject:
    class Model(Composite):
        def encode(self, images):
            with torch.inference_mode():
                features = self.encoder(images)
            return features.clone()

    return subject(Model())


@case(None, table="D", warning="inference-features-by-luck")
def inference_features_by_layout_luck(mended: bool = False) -> Subject:
    class Model(Composite):
        def encode(self, images):
            with torch.inference_mode():
                return self.encoder.conv(images).flatten(2).transpose(1, 2)

    return subject(Model())


@case(None, table="D")
def lookup_under_no_grad_write_outside(mended: bool = False) -> Subject:
    class Model(InPlace):
        def embed(self, input_ids):
            with torch.no_grad():
                return super().embed(input_ids)

        def replace(self, memory, embeds, mask):
            embeds[:, :TOKENS] = memory
            return embeds

    return subject(Model())


@case(None, table="D")
def boolean_index_write(mended: bool = False) -> Subject:
    class Model(InPlace):
        def replace(self, memory, embeds, mask):
            embeds[mask] = memory.flatten(0, 1)
            return embeds

    return subject(Model())


@case(None, table="D")
def splice_by_where(mended: bool = False) -> Subject:
    class Model(InPlace):
        def replace(self, memory, embeds, mask):
            padded = nn.functional.pad(memory, (0, 0, 0, embeds.shape[1] - TOKENS))
            return torch.where(mask[..., None], padded, embeds)

    return subject(Model())


@case(None, table="D")
def checkpointing_non_reentrant(mended: bool = False) -> Subject:
    model = Composite()
    model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return subject(model.train())


@case(None, table="D")
def checkpointing_reentrant_with_memory_in_embeds(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            embeds = checkpoint(lambda hidden: hidden * 1.5, embeds, use_reentrant=True)
            return super().predict(embeds, labels, attention_mask)

    return subject(Model())


@case(None, table="D")
def checkpointing_in_eval(mended: bool = False) -> Subject:
    model = Composite()
    model.llm.gradient_checkpointing_enable()
    return subject(model.eval())


@case(None, table="D")
def projection_checkpointed_with_input_grads(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            return checkpoint(self.proj, features.requires_grad_(True), use_reentrant=True)

    return subject(Model())


@case(None, table="D")
def compiled_with_encoder_under_no_grad(mended: bool = False) -> Subject:
    class Model(Composite):
        def encode(self, images):
            with torch.no_grad():
                return self.encoder(images)

    model = Model()
    return subject(torch.compile(model, backend="aot_eager"), trainable=model.proj)


@case(None, table="D")
def compiled_projection(mended: bool = False) -> Subject:
    model = Composite()
    model.proj = torch.compile(model.proj, backend="aot_eager")
    return subject(model)


@case(None, table="D")
def mixed_batch(mended: bool = False) -> Subject:
    class Model(InPlace):
        def forward(self, input_ids, labels, images):
            embeds = self.embed(input_ids)
            mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
            mask[1, :TOKENS] = True
            embeds = embeds.masked_scatter(mask[..., None], self.project(self.encode(images[1:])))
            return self.llm(inputs_embeds=embeds, labels=labels)

    return subject(Model())


@case(None, table="D")
def left_padding(mended: bool = False) -> Subject:
    data = batch()
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    data["attention_mask"][0, :2] = 0
    return subject(Composite(), data)


@case(None, table="D")
def left_padding_gpt2_with_positions(mended: bool = False) -> Subject:
    class Model(Composite):
        def predict(self, embeds, labels, attention_mask):
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            return self.llm(inputs_embeds=embeds, labels=labels, attention_mask=attention_mask, position_ids=positions)

    data = batch()
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    data["attention_mask"][0, :2] = 0
    return subject(Model(tiny_llm("gpt2")), data)


@case(None, table="D")
def tied_embeddings(mended: bool = False) -> Subject:
    return subject(Composite(tiny_llm("llama", tie_word_embeddings=True)))


@case(None, table="D", needs="peft")
def lora_beside_projection(mended: bool = False) -> Subject:
    from peft import LoraConfig, get_peft_model

    llm = get_peft_model(tiny_llm(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model = Composite(llm)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Subject(model=model, batch=batch(), optimizer=torch.optim.AdamW(learning))


@case(None, table="D", warning=None)
def only_the_last_layer_zero(mended: bool = False) -> Subject:
    model = Composite()
    nn.init.zeros_(model.proj.last.weight)
    nn.init.zeros_(model.proj.last.bias)
    return subject(model)


@case(None, table="D")
def values_logged_on_the_way(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            self.logged = (memory.norm().item(), memory.detach().numpy().mean(), memory.argmax().item())
            self.last_memory = memory.detach()
            return super().splice(memory, embeds)

    return subject(Model())


@case(None, table="D")
def straight_through_estimator(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory + (memory.round() - memory).detach(), embeds)

    return subject(Model())


@case(None, table="D")
def custom_autograd_function(mended: bool = False) -> Subject:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return hidden * 0.5

        @staticmethod
        def backward(ctx, grad):
            return grad * 0.5

    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(Scale.apply(memory), embeds)

    return subject(Model())


@case(None, table="D", warning="order-does-not-matter")
def pooled_memory(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory.mean(dim=1, keepdim=True), embeds)

    return subject(Model())


@case(None, table="D", warning="some-without-gradient")
def an_unused_tensor(mended: bool = False) -> Subject:
    model = Composite()
    model.proj.mask_token = nn.Parameter(torch.zeros(FEATURES))
    return subject(model)


@case(None, table="D")
def teacher_in_a_plain_list(mended: bool = False) -> Subject:
    class Model(Composite):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.Linear(WIDTH, WIDTH)]

        def splice(self, memory, embeds):
            with torch.no_grad():
                self.target = self.hidden[0](memory)
            return super().splice(memory, embeds)

    model = Model()
    return subject(model, optimizer=torch.optim.AdamW(model.proj.parameters()))


@case(None, table="D")
def labels_shifted_for_a_loss_that_does_not(mended: bool = False) -> Subject:
    class Model(Composite):
        def forward(self, input_ids, labels, images):
            embeds = self.splice(self.project(self.encode(images)), self.embed(input_ids))
            logits = self.llm(inputs_embeds=embeds).logits[:, TOKENS:]
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    data = batch()
    data["labels"] = nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100)
    return subject(Model(), data)


@case(None, table="D")
def everything_trainable(mended: bool = False) -> Subject:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    data = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    return Subject(model=model, batch=data, loss_fn=lambda outputs, _: outputs.square().mean())


@case(None, table="D")
def autocast_bfloat16(mended: bool = False) -> Subject:
    class Model(Composite):
        def forward(self, *args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(*args, **kwargs)

    return subject(Model())


@case(None, table="D")
def bfloat16_llm_float32_projection(mended: bool = False) -> Subject:
    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(memory.to(embeds.dtype), embeds)

    model = Model(tiny_llm().to(torch.bfloat16))
    return subject(model, optimizer=torch.optim.AdamW(model.proj.parameters(), lr=1e-5))


@case(None, table="D")
def text_mask_for_a_host_that_adds_the_memory_itself(mended: bool = False) -> Subject:
    class Host(nn.Module):
        def __init__(self, llm):
            super().__init__()
            self.llm = llm

        def forward(self, *, inputs_embeds, labels, attention_mask):
            mask = nn.functional.pad(attention_mask, (inputs_embeds.shape[1] - attention_mask.shape[1], 0), value=1)
            return self.llm.model(inputs_embeds=inputs_embeds, attention_mask=mask).last_hidden_state, labels

    class Model(Composite):
        def __init__(self):
            super().__init__()
            self.host = Host(self.llm)

        def predict(self, embeds, labels, attention_mask):
            hidden, labels = self.host(inputs_embeds=embeds, labels=labels, attention_mask=attention_mask[:, TOKENS:])
            logits = self.llm.lm_head(hidden)[:, :-1]
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}

    return subject(Model())


@case(None, table="D")
def bfloat16_projection_with_a_rate_that_moves_it(mended: bool = False) -> Subject:
    class Model(Composite):
        def project(self, features):
            return self.proj(features.bfloat16()).float()

    model = Model()
    model.proj.bfloat16()
    return subject(model, optimizer=torch.optim.AdamW(model.proj.parameters(), lr=1e-3))
