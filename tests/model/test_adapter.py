"""The adapter folder: small, strict, whole or not at all."""

import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ConvEncoder, tiny_batch, tiny_config, tiny_llm, tiny_model

from ocrmem.errors import AdapterMismatchError, CheckpointError
from ocrmem.model.mem_model import MEMModel


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(kind="attention")
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def load(folder, **parts):
    parts = {"base_llm_model": tiny_llm(), "ocr_embed": ConvEncoder(), **parts}
    return MEMModel.from_pretrained(folder, **parts)


def test_a_loaded_adapter_gives_the_same_logits(saved):
    model, folder = saved
    loaded = load(folder)
    assert not loaded.training
    batch = tiny_batch()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.config.llm == model.config.llm


def test_the_folder_holds_the_projection_alone(saved):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "config.json",
    ]
    assert set(load_file(folder / "adapter.safetensors")) == set(model.proj.state_dict())
    config = json.loads((folder / "config.json").read_text())
    assert config["llm"]["hidden_size"] == 24
    assert config["encoder_identity"]["feature_width"] == 11
    assert config["ocrmem_version"]
    assert "conv" in (folder / "README.md").read_text()


def test_saving_again_keeps_what_the_user_put_there(saved):
    model, folder = saved
    (folder / "README.md").write_text("my own card")
    (folder / "notes.txt").write_text("mine")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "my own card"
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_state_dict_of_the_whole_model_is_narrowed_to_the_projection(tmp_path):
    model = tiny_model()
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    weights = load_file(tmp_path / "adapter.safetensors")
    torch.testing.assert_close(weights["linear1.bias"], model.proj.linear1.bias.detach() + 1)


def test_other_llm_is_refused(saved):
    _, folder = saved
    with pytest.raises(AdapterMismatchError, match="with hidden_size=24, but the LLM given, .* has hidden_size=32"):
        load(folder, base_llm_model=tiny_llm(hidden_size=32))
    with pytest.raises(AdapterMismatchError, match="has other weights of the same shape"):
        load(folder, base_llm_model=tiny_llm(seed=7))
    with pytest.raises(AdapterMismatchError, match="with model_type='qwen3', but the LLM given, .* model_type='llama'"):
        load(folder, base_llm_model=tiny_llm("llama"))
    load(folder, base_llm_model=tiny_llm().to(torch.bfloat16))


def test_other_encoder_is_refused(saved):
    _, folder = saved
    with pytest.raises(AdapterMismatchError, match="the encoder 'conv' with feature_width=11, .* feature_width=13"):
        load(folder, ocr_embed=ConvEncoder(width=13))
    with pytest.raises(AdapterMismatchError, match="the encoder 'conv' with digest="):
        load(folder, ocr_embed=ConvEncoder(seed=9))


def test_missing_and_truncated_files_are_named(saved, tmp_path):
    _, folder = saved
    with pytest.raises(CheckpointError, match="has no config.json: there is no such folder"):
        load(tmp_path / "nowhere")
    weights = folder / "adapter.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is truncated or no safetensors file"):
        load(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter.safetensors: the folder holds README.md, config.json"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="has model_type 'bert', expected 'ocrmem'"):
        load(folder)


def test_tensors_are_loaded_strictly(saved):
    _, folder = saved
    path = folder / "adapter.safetensors"
    weights = load_file(path)
    bias = weights.pop("linear1.bias")
    weights["linear2.bias"] = weights["linear2.bias"].half()
    weights["linear3.bias"] = bias
    save_file(weights, path)
    with pytest.raises(
        CheckpointError,
        match=r"linear2.bias is float16 \[24\], expected float32 \[24\]; missing linear1.bias; unexpected linear3.bias",
    ):
        load(folder)


def test_a_full_disk_leaves_the_old_adapter(saved):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.proj.linear1.weight.add_(1)
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old_limit[1]))  # the kernel refuses to write more
    try:
        with pytest.raises(CheckpointError, match="could not be saved to .* Nothing there was changed"):
            model.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_config_round_trips():
    config = tiny_config(kind="attention")
    again = type(config).from_dict(config.to_dict())
    assert again.page_settings == config.page_settings
    assert again.projection_settings == config.projection_settings
    assert again.memory_settings == config.memory_settings
