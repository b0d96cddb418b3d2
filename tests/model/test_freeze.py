"""What may not change does not change."""

import pytest
import torch
from tiny import ConvEncoder, tiny_config, tiny_llm, tiny_model
from torch import nn

from ocrmem.errors import FrozenPartError
from ocrmem.model.freeze import FrozenBatchNorm, check_trainable, freeze
from ocrmem.model.mem_model import MEMModel


def test_batch_norm_is_frozen_with_its_own_numbers():
    encoder = ConvEncoder().eval()
    pages = torch.randint(0, 256, (5, 15, 28), dtype=torch.uint8)
    expected, identity = encoder(pages), encoder.identity()
    freeze(encoder, part="ocr_embed")
    assert isinstance(encoder.norm, FrozenBatchNorm)
    assert set(encoder.state_dict()) == set(ConvEncoder().state_dict())
    assert encoder.identity() == identity
    torch.testing.assert_close(encoder.train()(pages), expected)


def test_an_unfrozen_batch_norm_would_have_drifted():
    encoder = ConvEncoder().train()
    before = encoder.norm.running_mean.clone()
    encoder(torch.randint(0, 256, (5, 15, 28), dtype=torch.uint8))
    assert not torch.equal(encoder.norm.running_mean, before)


def test_dropout_in_the_llm_is_refused():
    llm = tiny_llm("qwen3", attention_dropout=0.1)
    with pytest.raises(
        FrozenPartError,
        match=r"base_llm_model has active dropout: model.layers.0.self_attn.attention_dropout=0.1.*set it to 0",
    ):
        MEMModel(tiny_config(), base_llm_model=llm, ocr_embed=ConvEncoder())


def test_dropout_in_the_encoder_is_refused():
    encoder = ConvEncoder()
    encoder.extra = nn.Sequential(nn.Dropout2d(0.25))
    with pytest.raises(FrozenPartError, match=r"ocr_embed has active dropout: extra.0.p=0.25"):
        freeze(encoder, part="ocr_embed")
    encoder.extra = nn.Sequential(nn.Dropout(0.0))
    freeze(encoder, part="ocr_embed")


def test_trainable_set_is_compared_by_object():
    model = tiny_model()
    check_trainable(model, proj=model.proj)
    model.base_llm_model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(FrozenPartError, match="trainable but not in proj: base_llm_model.model.embed_tokens.weight"):
        check_trainable(model, proj=model.proj)
    model = tiny_model()
    model.proj.linear2.bias.requires_grad_(False)
    with pytest.raises(FrozenPartError, match="in proj but not trainable: linear2.bias"):
        check_trainable(model, proj=model.proj)


def test_print_trainable_parameters(capsys):
    model = tiny_model()
    model.print_trainable_parameters()
    lines = capsys.readouterr().out.splitlines()
    trainable = (11 * 24 + 24) + (24 * 24 + 24)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert lines[0] == (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}%"
    )
    assert lines[3:] == [
        "  base_llm_model trainable params: 0 (should be 0)",
        "  ocr_embed trainable params: 0 (should be 0)",
        f"  proj trainable params: {trainable:,}",
    ]
    model.ocr_embed.conv.bias.requires_grad_(True)
    model.print_trainable_parameters()
    assert "⚠️ WARNING: ocr_embed should be frozen but has 11 trainable params!" in capsys.readouterr().out
