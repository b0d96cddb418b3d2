import pytest
import torch
from memory.parts import GEMMA, TEMPLATES, chitchat, make_processor, shared_tokenizer, smollm2, turns
from memory.pooling import PoolingEncoder

from ocrmem.config.memory import MemorySettings
from ocrmem.data.processor import MEMProcessor
from ocrmem.errors import ConfigError, DataError, SpliceError
from ocrmem.memory.features import FeatureStore
from ocrmem.memory.history import history_text
from ocrmem.render.renderer import Renderer
from ocrmem.types import Conversation, Message

LONG = turns(*(f"Message number {i} says that the sky is blue and the grass is green today." for i in range(61)))
"""61 turns of about 21 tokens, the last by the user."""


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def test_a_short_prompt_is_text(processor):
    prompt = processor.prompt(turns("hi"))
    tokenizer = shared_tokenizer()
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert prompt.input_ids == expected
    assert (prompt.pages, prompt.page_keys, prompt.page_num_tokens) == ([], [], [])
    assert set(processor([turns("hi")])) == {"input_ids", "attention_mask"}


def test_a_long_prompt_has_its_history_on_pages(processor):
    prompt = processor.prompt(LONG)
    split = prompt.split
    ids = prompt.input_ids
    assert ids.count(processor.memory_token_id) == sum(prompt.page_num_tokens) == split.placeholder_tokens > 0
    first = ids.index(processor.memory_token_id)
    assert ids[first : first + split.placeholder_tokens] == [processor.memory_token_id] * split.placeholder_tokens
    assert prompt.text.index("Earlier in this conversation") < prompt.text.index("<|im_start|>user")
    assert all(message.content in prompt.text for message in split.recent)
    assert not any(message.content in prompt.text for message in split.history)
    text = history_text(split.history)
    assert prompt.pages[0].text_start == 0
    assert prompt.pages[-1].text_end == len(text)
    for page, expected in zip(prompt.pages, Renderer(processor.encoder.page).pages(text), strict=True):
        assert (page.image_HW == expected.image_HW).all()
    assert prompt.page_num_tokens == [processor.encoder.num_tokens(page) for page in prompt.pages]


def test_counts_of_real_prompts_are_exact_and_never_bigger(processor):
    seen = 0
    for conversation in chitchat(40, min_turns=40):
        counts = processor.count(conversation.messages)
        for end in range(1, len(conversation.messages), 14):
            prompt = processor.prepare(counts, end)
            split = prompt.split
            kept = split.prompt_tokens - split.dropped_tokens
            assert len(prompt.input_ids) == kept - split.history_tokens + split.memory_tokens
            if split.compression_ratio is not None:
                seen += 1
                assert len(prompt.input_ids) < kept
                assert split.compression_ratio == split.history_tokens / split.memory_tokens > 1
    assert seen > 40


def test_history_that_pages_would_not_shorten_stays_text():
    long_last = "word " * 600
    short = [*turns("hi", "ho"), Message("user", long_last)]
    prompt = make_processor().prompt(short)
    assert prompt.split.prompt_tokens > 512
    assert prompt.pages == []
    assert "ho<|im_end|>" in prompt.text
    longer = [*turns("hi " * 60, "ho"), Message("user", long_last)]
    assert make_processor().prompt(longer).pages


@pytest.mark.parametrize("name", [None, *TEMPLATES])
@pytest.mark.parametrize("has_system", [False, True])
def test_every_template_takes_the_memory(name, has_system):
    processor = make_processor(shared_tokenizer(TEMPLATES.get(name)))
    prompt = processor.prompt([*([Message("system", "You are Ann.")] if has_system else []), *LONG])
    assert prompt.split.placeholder_tokens == prompt.input_ids.count(processor.memory_token_id) > 0
    assert ("You are Ann." in prompt.text) == has_system
    assert prompt.text.index(processor.memory_token) < prompt.text.index(prompt.split.recent[0].content)


def test_placeholder_in_the_conversation_is_text(processor):
    token, index = processor.memory_token, processor.memory_token_id
    messages = [
        Message("system", f"never say {token}"),
        *LONG[:-1],
        Message("user", f"what is {token}{token}?"),
    ]
    messages[1] = Message("user", f"{token} was said early")
    prompt = processor.prompt(messages)
    assert prompt.input_ids.count(index) == prompt.split.placeholder_tokens > 0
    plain = processor.prompt([Message("user", token)])
    assert index not in plain.input_ids
    drawn = processor.prompt(LONG).page_keys[0]
    assert prompt.page_keys[0] != drawn


@pytest.mark.parametrize("content", ["\ud800", "\x00", "\u202e\u2066", "👩‍👩‍👧", "e\u0301", "", "\n\n", " "])
def test_strange_content_in_every_place(processor, content):
    messages = [Message("system", content), *LONG, Message("assistant", content), Message("user", content)]
    messages[3] = Message("user", content)
    batch = processor([messages, [Message("user", content)]])
    assert batch["input_ids"].shape == batch["attention_mask"].shape


def test_five_megabytes(processor):
    content = "five megabytes of text " * 220_000
    assert len(content) > 5_000_000
    prompt = processor.prompt(turns(content, "long", "yes"))
    assert prompt.split.num_dropped == 2  # more than max_length, so left out
    assert len(prompt.input_ids) < 100


def test_batch_is_padded_on_the_left_and_equals_single(processor):
    conversations = [LONG, turns("hi"), LONG[:41]]
    batch = processor(conversations)
    singles = [processor([messages]) for messages in conversations]
    longest = batch["input_ids"].shape[1]
    for row, single in enumerate(singles):
        length = single["input_ids"].shape[1]
        assert batch["input_ids"][row, longest - length :].tolist() == single["input_ids"][0].tolist()
        assert batch["attention_mask"][row].tolist() == [0] * (longest - length) + [1] * length
        assert (batch["input_ids"][row, : longest - length] == processor.pad_token_id).all()
    for name in ("features", "page_num_tokens"):
        assert torch.equal(batch[name], torch.cat([singles[0][name], singles[2][name]]))
    assert batch["num_pages"].tolist() == [len(singles[0]["features"]), 0, len(singles[2]["features"])]
    assert batch["features"].dtype == torch.float16
    per_sample = (batch["input_ids"] == processor.memory_token_id).sum(1)
    per_page = torch.repeat_interleave(torch.arange(3), batch["num_pages"])
    assert per_sample.tolist() == torch.zeros(3).long().index_add(0, per_page, batch["page_num_tokens"]).tolist()


def test_pages_instead_of_features(processor):
    encoded, plain = processor([LONG]), processor([LONG], encode=False)
    assert "features" not in plain
    assert plain["pages"].dtype == torch.uint8
    assert torch.equal(processor.encoder(plain["pages"]).to(torch.float16), encoded["features"])


def test_a_store_is_used(tmp_path):
    processor = make_processor(store=FeatureStore(tmp_path))
    first = processor([LONG])
    calls = list(processor.encoder.calls)
    assert torch.equal(processor([LONG])["features"], first["features"])
    assert processor.encoder.calls == calls
    other = make_processor(store=FeatureStore(tmp_path), scale=2.0)  # other weights, other keys
    assert torch.equal(other([LONG])["features"], 2 * first["features"])


def test_new_turns_keep_full_pages_valid(processor):
    shorter = processor.prompt(LONG[:41]).page_keys
    longer = processor.prompt(LONG).page_keys
    assert len(longer) > len(shorter) >= 1
    assert longer[: len(shorter) - 1] == shorter[:-1]


def test_forms_of_a_conversation(processor):
    dicts = [message.as_dict() for message in LONG]
    expected = processor([LONG])["input_ids"]
    for form in (LONG, tuple(LONG), dicts, Conversation(tuple(LONG)), [dicts], [Conversation(tuple(LONG))]):
        assert torch.equal(processor(form)["input_ids"], expected)


def test_device_of_the_tensors(processor):
    assert all(tensor.device.type == "cpu" for tensor in processor([LONG], device="cpu").values())


@pytest.mark.parametrize(
    ("conversations", "match"),
    [
        ([], r"no conversation was given\. Give one"),
        ([[]], r"conversation 0: the conversation is empty"),
        ([turns("hi"), [{"role": "user", "content": None}]], r"conversation 1: message 0: content is null"),
        ([{"role": "usr", "content": "x"}], r"unknown role 'usr'. Did you mean 'user'"),
    ],
)
def test_bad_conversations(processor, conversations, match):
    with pytest.raises(DataError, match=match):
        processor(conversations)


def test_empty_prompt(processor):
    with pytest.raises(DataError, match=r"the prompt is empty: no messages were given"):
        processor.prompt([])


def test_a_template_that_repeats_the_memory_is_found_out():
    tokenizer = smollm2()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}", "{{ messages[0]['content'] }}{% if add_generation_prompt %}"
    )
    processor = make_processor(tokenizer)
    n = processor.prompt(turns("a")).split.placeholder_tokens
    assert n == 0
    with pytest.raises(
        SpliceError, match=r"the prompt holds (\d+) placeholders .* but the pages\s+give \d+ memory tokens"
    ):
        processor.prompt(LONG)


def test_a_tokenizer_without_padding():
    tokenizer = smollm2()
    tokenizer.pad_token = None
    assert make_processor(tokenizer).pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"has neither a pad token nor an end-of-text token; set tokenizer\."):
        make_processor(tokenizer)


def test_a_chosen_placeholder():
    processor = MEMProcessor(
        shared_tokenizer(), encoder=PoolingEncoder(), memory=MemorySettings(), memory_token=("<file_sep>", 5)
    )
    assert processor.prompt(LONG).input_ids.count(5) > 0


def test_gemma_prompt_starts_with_the_user():
    processor = make_processor(shared_tokenizer(GEMMA))
    for end in range(1, 61, 2):
        text = processor.prompt(LONG[:end]).text
        assert text.partition("<start_of_turn>")[2].startswith("user\n")
