"""A frozen LLM in 8 or 4 bits: loaded by the setting, near the original, and the projection learns through it."""

import importlib.util

import pytest
import torch
from tiny import ConvEncoder, tiny_batch, tiny_config, tiny_llm

from ocrmem.config.llm import LLMSettings
from ocrmem.errors import ConfigError
from ocrmem.model import llm as llm_module
from ocrmem.model.llm import load_llm
from ocrmem.model.mem_model import MEMModel

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llm")
    tiny_llm("qwen3", **SIZES).save_pretrained(path)
    return path


@pytest.mark.parametrize("quantization", ["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8"])
def test_the_projection_learns_through_it(folder, quantization):
    library = quantization.partition("-")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    batch = tiny_batch(side="right")
    losses, grads = [], []
    for setting in (None, quantization):
        llm, _ = load_llm(LLMSettings(name=str(folder), dtype="float32", quantization=setting))
        torch.manual_seed(2)
        model = MEMModel(tiny_config(), base_llm_model=llm, ocr_embed=ConvEncoder()).train()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(model.proj.linear1.weight.grad)
        assert all(parameter.grad is None for parameter in llm.parameters())
    assert losses[0] != losses[1], "nothing was quantised"
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    similarity = torch.nn.functional.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0)
    assert similarity > 0.9


@pytest.mark.parametrize("quantization", ["bitsandbytes-4bit", "torchao-int8"])
def test_a_library_that_is_missing_is_one_line(folder, monkeypatch, quantization):
    monkeypatch.setattr(llm_module.importlib.util, "find_spec", lambda name: None)
    library = quantization.partition("-")[0]
    with pytest.raises(ConfigError, match=f"needs the package {library}, which is not installed here. Install it with"):
        load_llm(LLMSettings(name=str(folder), quantization=quantization))


def test_unknown_quantization():
    with pytest.raises(ConfigError, match="llm.quantization='8bit': expected one of bitsandbytes-8bit, bits"):
        LLMSettings(quantization="8bit")
