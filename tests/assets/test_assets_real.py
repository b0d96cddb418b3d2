"""The real assets: what is in the cache (fetched if need be) is what the registry and THIRD_PARTY.md say."""

import collections
import functools
import hashlib
import json
from pathlib import Path

import pytest

from ocrmem.assets import chitchat, long_prose, wiki_leads
from ocrmem.assets.cache import asset_dir, sha256_file
from ocrmem.assets.fetch import asset_revision, catalogue, resolve

ROOT = Path(__file__).parents[2]
ASSETS = {asset.name: asset for asset in catalogue()}
LLM = "smollm2-135m-instruct"


@functools.cache
def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (resolve("chitchat") / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["pp-ocrv6-small-rec", "noto-sans-sc"])
def test_files_are_the_pinned_ones(name):
    path = resolve(name)
    assert sha256_file(path) == ASSETS[name].sha256 == asset_revision(name)
    assert path.stat().st_size == ASSETS[name].size


def test_resolving_again_costs_nothing(monkeypatch):
    names = list(ASSETS)
    for name in names:
        resolve(name)
    monkeypatch.setattr("ocrmem.assets.cache.sha256_file", lambda path: pytest.fail(f"hashed {path} again"))
    for name in names:
        resolve(name, offline=True)


@pytest.mark.parametrize("asset", catalogue(), ids=list(ASSETS))
def test_third_party_file_says_what_the_registry_says(asset):
    text = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    section = text.split(f"### {asset.name}:")[1].split("\n#")[0]
    for fact in (
        f"`{asset.package}=={asset.version}`, file `{asset.member}`, {asset.size:,} bytes",
        f"`{asset.sha256}`",
        asset.license,
        asset.attribution,
    ):
        assert fact in section


def test_third_party_file_names_every_bundled_font_file():
    text = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "src/ocrmem/render/font_files").iterdir())
    assert [file.name for file in files] == ["DejaVuSans.ttf", "DejaVuSansMono.ttf", "LICENSE_DEJAVU"]
    for file in files:
        assert any(f"`{file.name}`" in line and f"`{sha256_file(file)}`" in line for line in text.splitlines())


def test_chitchat_counts():
    train, heldout = records(chitchat.TRAIN_FILE), records(chitchat.HELDOUT_FILE)
    assert (len(train), len(heldout), len(train) + len(heldout)) == (2441, 522, 2963)
    assert sum(record["strict"] for record in heldout) == 196
    assert sum(len(record["messages"]) for record in train + heldout) == 132_554
    assert len({record["id"] for record in train + heldout}) == 2963
    assert all(record.keys() == {"id", "messages"} for record in train)


def test_chitchat_conversations_alternate():
    for record in records(chitchat.TRAIN_FILE) + records(chitchat.HELDOUT_FILE):
        roles = [message["role"] for message in record["messages"]]
        assert len(roles) >= 6
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]


def test_chitchat_split_keeps_people_apart():
    """Recomputed from the raw file by the rule in words, not by the code under test."""
    resolve("chitchat")
    (source,) = asset_dir("chitchat").glob("*/source/dataset.json")
    raw = json.loads(source.read_text(encoding="utf-8"))
    people = {
        id_: {message["sender"] for group in conversation["messages"] for message in group}
        for id_, conversation in raw.items()
    }
    train = {record["id"] for record in records(chitchat.TRAIN_FILE)}
    heldout = {record["id"]: record["strict"] for record in records(chitchat.HELDOUT_FILE)}
    counts = collections.Counter(person for id_ in [*train, *heldout] for person in people[id_])
    hub = {person for person, count in counts.items() if count >= 100}
    assert len(hub) == 5
    seen = {person for id_ in train for person in people[id_]} - hub
    out = {person for person in counts if int(hashlib.sha256(person.encode()).hexdigest(), 16) % 100 < 12} - hub
    assert not seen & out
    for id_, strict in heldout.items():
        assert people[id_] & out
        assert strict == (not people[id_] & seen)


def test_chitchat_text_is_the_raw_text():
    (source,) = asset_dir("chitchat").glob("*/source/dataset.json")
    raw = json.loads(source.read_text(encoding="utf-8"))
    record = records(chitchat.HELDOUT_FILE)[0]
    texts = [message["text"] for group in raw[record["id"]]["messages"] for message in group]
    assert "\n".join(message["content"] for message in record["messages"]) == "\n".join(texts)


def test_llm_folder_holds_no_pickle_and_no_gguf():
    names = {path.name for path in resolve(LLM).iterdir()}
    assert names == {
        ".ocrmem-seal.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "quantization_config" not in json.loads((resolve(LLM) / "config.json").read_text())


def test_llm_tokenizer():
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(resolve(LLM))
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (1, 2, 0)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.model_max_length == 8192
    generation = GenerationConfig.from_pretrained(resolve(LLM))
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == ids
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llm_tokenizer_cuts_numbers_into_digits():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(LLM))
    assert tokenizer.tokenize("in   2018, 3") == ["in", "ĠĠĠ", "2", "0", "1", "8", ",", "Ġ", "3"]


@pytest.mark.parametrize("text", ["naïve ▁ “quotes” 中文 🦊\u200d x\u0301\t\n\n  end ", "<|im_end|> \x00 \u202e"])
def test_llm_tokenizer_gives_text_back(text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(LLM))
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
def test_llm_folder_equals_the_gguf_file():
    import torch
    from transformers import AutoModelForCausalLM

    resolve(LLM)
    (source,) = asset_dir(LLM).glob("*/source/*.gguf")
    prepared = AutoModelForCausalLM.from_pretrained(resolve(LLM))
    direct = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    assert prepared.dtype == torch.float32
    assert sum(parameter.numel() for parameter in prepared.parameters()) == 134_515_008
    expected = direct.state_dict()
    assert prepared.state_dict().keys() == expected.keys()
    for key, tensor in prepared.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    input_ids_BS = torch.arange(17, 17 + 23)[None]
    with torch.no_grad():
        assert torch.equal(prepared(input_ids_BS).logits, direct(input_ids_BS).logits)


@pytest.mark.slow
def test_llm_stops_by_itself():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(LLM))
    llm = AutoModelForCausalLM.from_pretrained(resolve(LLM))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out_BS = llm.generate(**batch, max_new_tokens=30, do_sample=False)
    reply = tokenizer.decode(out_BS[0, batch["input_ids"].shape[1] :])
    assert reply == "The capital of France is Paris.<|im_end|>"


def articles(name):
    return [json.loads(line) for line in (resolve("wiki-leads") / name).read_text(encoding="utf-8").splitlines()]


def test_wiki_leads_counts_and_split():
    train, heldout = articles(wiki_leads.TRAIN_FILE), articles(wiki_leads.HELDOUT_FILE)
    assert (len(train), len(heldout)) == (8408, 948)
    assert sum(len(article["text"]) for article in train) == 4_278_583
    assert sum(len(article["text"]) for article in heldout) == 492_134
    assert not {article["title"] for article in train} & {article["title"] for article in heldout}
    for article in heldout:
        assert int(hashlib.sha256(article["title"].encode()).hexdigest(), 16) % 100 < 10
    for article in train + heldout:
        assert len(article["text"]) >= 200
        assert "  " not in article["text"]
        assert "\n\n" not in article["text"]


def test_long_prose_counts_and_split():
    train, heldout = (
        [json.loads(line) for line in (resolve("long-prose") / name).read_text(encoding="utf-8").splitlines()]
        for name in (long_prose.TRAIN_FILE, long_prose.HELDOUT_FILE)
    )
    assert (len(train), len(heldout)) == (329, 39)
    assert sum(len(document["text"]) for document in train) == 10_829_261
    assert not {document["text"] for document in train} & {document["text"] for document in heldout}
    held_out_years = {document["id"].split("/")[1][:4] for document in heldout if document["id"].startswith("sotu/")}
    assert held_out_years == {str(year) for year in range(1790, 2021, 10)}
    chapters = [document["title"] for document in train + heldout if document["id"].startswith("moby-dick/")]
    assert len(chapters) == 135
    for title in (document["title"] for document in heldout if document["id"].startswith("moby-dick/")):
        assert int(hashlib.sha256(title.encode()).hexdigest(), 16) % 100 < 10
    for document in train + heldout:
        assert "  " not in document["text"]
        assert "\n\n" not in document["text"]
