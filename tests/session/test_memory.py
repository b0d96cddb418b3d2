"""A memory that grows: the same as one built at once, at a cost that does not grow with it."""

import pytest
import torch
from memory.parts import shared_tokenizer
from session.parts import make_memory, make_model, shared_model, talk

from ocrmem.config.growing import GrowingSettings
from ocrmem.data.processor import MEMProcessor
from ocrmem.errors import ConfigError, DataError
from ocrmem.memory.growing_pages import FEWEST_PAGES
from ocrmem.memory.history import history_text
from ocrmem.session.memory import Memory
from ocrmem.types import Message

QUESTION = "What was turn 3 about?"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("recall", [0, 2])
def test_grown_equals_built_at_once(family, recall):
    model = shared_model(family)
    turns = talk(101)
    grown = make_memory(model, recall=recall)
    for number, turn in enumerate(turns):
        grown.append(turn)
        if number % 3 == 0:
            grown.logits(QUESTION)  # fills the cache, and moves the memory on
    at_once = make_memory(model, recall=recall)
    at_once.extend(turns)
    assert {page.level for page in grown.pages} == {0, 1}
    assert [page.key for page in grown.pages] == [page.key for page in at_once.pages]
    assert grown.tokens.left_out > 0, "the budget is small enough that turns were left out"
    for question in (QUESTION, "And turn 20?"):
        one, other = grown.logits(question), at_once.logits(question)
        assert grown.num_read < len(grown.prompt(question).input_ids)
        assert (one - other).abs().max() <= 1e-4
        grown._reader.forget()
        assert (grown.logits(question) - other).abs().max() <= 1e-4, "without any reuse"


def test_it_is_what_the_processor_makes_while_the_budget_is_not_reached():
    model = shared_model()
    turns = talk(12)
    memory = make_memory(model, budget=4096, ledger_share=0)
    memory.extend([Message("system", "Be brief."), *turns])
    processor = MEMProcessor.from_model(model, tokenizer=shared_tokenizer())
    chat = [Message("system", "Be brief."), *turns, Message("user", QUESTION)]
    whole = processor.prompt(chat)
    prompt = memory.prompt(QUESTION)
    assert prompt.input_ids == whole.input_ids
    assert [page.key for page in prompt.pages] == whole.page_keys
    assert prompt.split.summary() == whole.split.summary()
    batch = processor([chat])
    with torch.no_grad():
        plain = model(**batch, logits_to_keep=1).logits[0, -1]
    assert (memory.logits(QUESTION) - plain).abs().max() <= 1e-4
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, batch["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert memory.reply(QUESTION, max_new_tokens=8) == expected


def test_full_pages_never_change_and_are_encoded_once():
    model = make_model()
    encoder = model.ocr_embed
    memory = make_memory(model, budget=4096)
    seen = {}
    for turn in talk(60):
        memory.append(turn)
        encoder.calls.clear()
        pages = memory.pages
        assert sum(encoder.calls) <= 2, "the page that became full, and the new tail"
        for page in pages[:-1]:
            assert seen.setdefault(page.start, page.key) == page.key
    assert len(seen) >= 3
    text = history_text(talk(60))
    assert all(text[page.start : page.end] == page.text for page in memory.pages)


def test_the_stable_prefix_is_not_read_again():
    memory = make_memory(budget=4096, ledger_share=0)
    memory.extend(talk(60))
    memory.logits(QUESTION)
    before = memory.prompt(QUESTION)
    assert memory.num_read == len(before.input_ids)
    memory.extend(talk(2, start=60))
    memory.logits(QUESTION)
    prompt = memory.prompt(QUESTION)
    same = {page.key for page in before.pages} & {page.key for page in prompt.pages}
    assert len(same) >= len(before.pages) - 1 >= 5, "all but the tail page"
    stable = sum(page.num_tokens for page in prompt.pages if page.key in same)
    assert memory.num_read < len(prompt.input_ids) - stable
    memory.logits(QUESTION)
    assert memory.num_read == 1, "the same prompt again"


def test_a_memory_within_its_budget_never_above_the_text_it_replaces():
    memory = make_memory(recall=2)
    left_out = 0
    for turn in talk(110):
        memory.append(turn)
        tokens = memory.prompt(QUESTION).tokens
        assert tokens.memory <= tokens.budget
        assert tokens.memory == 0 or tokens.memory < tokens.replaced
        assert tokens.total == len(memory.prompt(QUESTION).input_ids)
        assert tokens.left_out >= left_out
        left_out = tokens.left_out
    assert left_out > 0
    prompt = memory.prompt(QUESTION)
    assert "oldest turns" in prompt.summary()
    assert "left out" in prompt.summary()
    levels = [page.level for page in prompt.pages]
    assert levels == sorted(levels, reverse=True), "the oldest are the densest"


def test_without_denser_pages_the_oldest_are_left_out():
    memory = make_memory(densities=(1.0,))
    memory.extend(talk(110))
    assert {page.level for page in memory.pages} == {0}
    assert memory.tokens.left_out > 0


def test_denser_pages_hold_more_text():
    memory = make_memory()
    memory.extend(talk(60))
    per_token = {}
    for page in memory.pages[:-1]:
        per_token.setdefault(page.level, []).append(len(page.text) / page.num_tokens)
    assert min(per_token[1]) > 1.5 * max(per_token[0])


def test_a_short_conversation_stays_text():
    memory = make_memory()
    memory.append({"role": "user", "content": "Hello."})
    assert memory.pages == []
    assert memory.tokens.memory == 0
    assert "no memory" in memory.prompt().summary()
    assert memory.show("nowhere") == []


def test_ledger_and_recall_are_text_within_their_shares():
    memory = make_memory(budget=2048, recall=2)
    memory.extend(talk(200))
    prompt = memory.prompt("What did you say about turn 5?")
    assert "file_1" in prompt.ledger, prompt.ledger
    assert "turn 5 is about" in prompt.recalled
    assert prompt.ledger in prompt.text
    assert prompt.recalled in prompt.text
    assert 0 < prompt.tokens.ledger <= memory.settings.ledger_tokens + 2
    assert 0 < prompt.tokens.recalled <= memory.settings.recall_tokens + 2
    off = make_memory(budget=2048, ledger_share=0)
    off.extend(talk(200))
    assert off.prompt("What did you say about turn 5?").tokens.ledger == 0
    assert off.prompt("What did you say about turn 5?").recalled == ""


def test_recall_by_attention_ranks_pages():
    memory = make_memory(recall=1, recall_by="attention")
    memory.extend(talk(40))
    prompt = memory.prompt(QUESTION)
    assert prompt.recalled
    scores = memory.page_attention(prompt)
    assert scores.shape == (len(prompt.pages),)
    assert bool((scores > 0).all())
    assert memory.model.base_llm_model.config._attn_implementation != "eager"
    at_once = make_memory(recall=1, recall_by="attention")
    at_once.extend(talk(40))
    assert (memory.logits(QUESTION) - at_once.logits(QUESTION)).abs().max() <= 1e-4


def test_a_reply_streams_and_is_appended():
    memory = make_memory()
    memory.extend(talk(20))
    pieces = list(memory.reply(QUESTION, stream=True, max_new_tokens=6))
    assert memory.messages[-2] == Message("user", QUESTION)
    assert memory.messages[-1] == Message("assistant", "".join(pieces).strip())
    again = make_memory()
    again.extend(talk(20))
    assert again.reply(QUESTION, max_new_tokens=6) == "".join(pieces).strip()
    with pytest.raises(DataError, match="nothing was asked: give a question"):
        memory.reply()
    memory.append(Message("user", "And now?"))
    memory.reply(max_new_tokens=2)
    assert [message.role for message in memory.messages[-2:]] == ["user", "assistant"]


def test_a_stream_that_is_closed_keeps_what_came():
    memory = make_memory()
    memory.extend(talk(20))
    stream = memory.reply(QUESTION, stream=True, max_new_tokens=20)
    first = next(stream)
    stream.close()
    assert memory.messages[-1] == Message("assistant", first.strip())
    fresh = make_memory()
    fresh.extend(memory.messages)
    assert (memory.logits("Go on.") - fresh.logits("Go on.")).abs().max() <= 1e-4


def test_sampling_is_repeated_by_its_seed():
    memory = make_memory()
    memory.extend(talk(9))
    memory.forget(keep=8)
    one = memory.reply("Say it.", max_new_tokens=8, temperature=1.0, seed=5)
    memory.forget(keep=8)
    assert memory.reply("Say it.", max_new_tokens=8, temperature=1.0, seed=5) == one
    with pytest.raises(ConfigError, match="temperature=-1"):
        memory.reply("Say it.", temperature=-1)


def test_an_interrupted_forward_leaves_no_half_cache(monkeypatch):
    memory = make_memory()
    memory.extend(talk(30))
    memory.logits(QUESTION)
    layer = memory.model.base_llm_model.model.layers[1]

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        memory.logits("Another one?")
    hook.remove()
    fresh = make_memory()
    fresh.extend(talk(30))
    assert (memory.logits("Another one?") - fresh.logits("Another one?")).abs().max() <= 1e-4


def test_an_interrupted_growth_is_begun_anew(monkeypatch):
    memory = make_memory()
    memory.extend(talk(60))
    memory.logits(QUESTION)
    memory.extend(talk(50, start=60))

    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(memory._ledger, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            memory.logits(QUESTION)
    fresh = make_memory()
    fresh.extend(talk(110))
    assert (memory.logits(QUESTION) - fresh.logits(QUESTION)).abs().max() <= 1e-4
    assert memory.prompt(QUESTION).ledger == fresh.prompt(QUESTION).ledger


def test_forgetting_the_newest_messages():
    memory = make_memory()
    memory.extend(talk(50))
    memory.logits(QUESTION)
    memory.forget(keep=30)
    assert memory.messages == talk(30)
    fresh = make_memory()
    fresh.extend(talk(30))
    assert (memory.logits(QUESTION) - fresh.logits(QUESTION)).abs().max() <= 1e-4
    memory.forget()
    assert memory.messages == []
    assert memory._features == {}
    with pytest.raises(DataError, match="the conversation is empty"):
        memory.prompt()


def test_a_question_alone_leaves_an_unanswered_turn_where_it_was():
    memory = make_memory()
    memory.extend(talk(21))  # the last is the user's
    memory.prompt("A quite different question, " * 12)
    assert memory.prompt().split.recent[-1] == talk(21)[-1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00\ud800 lone surrogate and NUL",
        "a" * 9000,
        "漢字かな交じり文。" * 300,
        "<empty_output>" * 50,
        "\n" * 3000,
        "e\u0301\u0301\u0301" * 400,
        "مرحبا بالعالم " * 200,
    ],
    ids=["empty", "nul", "one-word", "wide", "placeholder", "breaks", "combining", "right-to-left"],
)
def test_any_text_grows_as_it_is_built(text):
    grown, at_once = make_memory(), make_memory()
    turns = [*talk(9), Message("user", text), *talk(9, start=9)]
    for turn in turns:
        grown.append(turn)
        grown.prompt(QUESTION)
    at_once.extend(turns)
    assert [page.key for page in grown.prompt(QUESTION).pages] == [page.key for page in at_once.prompt(QUESTION).pages]
    assert grown.prompt(QUESTION).tokens.memory <= grown.settings.budget_tokens
    assert (grown.logits(QUESTION) - at_once.logits(QUESTION)).abs().max() <= 1e-4


def test_a_long_text_becomes_memory_but_is_no_question():
    memory = make_memory(make_model(positions=2048))
    text = "".join(f"Line {n} of a long report.\n" for n in range(9000))
    with pytest.raises(ConfigError, match=r"the prompt has \d+ tokens .* but the LLM reads 2048"):
        memory.reply(text)
    assert memory.messages == [], "nothing was appended"
    memory.append(Message("user", text))
    memory.append(Message("assistant", "Thank you."))
    prompt = memory.prompt("What does it say at the end?")
    assert prompt.pages[-1].text.endswith("assistant: Thank you.\n")
    assert prompt.tokens.left_out == 0, "its end is on pages, so the turn is not left out as a whole"
    assert prompt.pages[0].start > 0
    assert memory.messages[0].content == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 100}, "the memory's budget leaves 80 tokens for pages, but a page has 80, and at least 4"),
        ({"densities": (1.0, 0.01)}, "density 0.01 is too low for these pages"),
        ({"densities": (0.5,)}, "expected falling numbers above 0 from 1.0 on"),
        ({"ledger_share": 1.0}, "ledger_share=1.0: expected a share from 0"),
        ({"ledger_share": 0.6, "recall": 1, "recall_share": 0.5}, "leave nothing of budget_tokens=640"),
        ({"recall": -1}, "recall=-1: expected 0 or more pages"),
        ({"recall_by": "magic"}, "recall_by='magic': expected 'bm25' or 'attention'"),
        ({"budget": 0}, "budget_tokens=0: expected 1 or more"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_memory(**settings)


@pytest.mark.parametrize(("tokens_per_page", "budget"), [(72, 1024), (144, 1024), (256, 1792), (400, 2800)])
def test_the_default_budget_holds_enough_pages_of_every_encoder(tokens_per_page, budget):
    settings = GrowingSettings(recall=2).resolved(tokens_per_page)
    assert settings.budget_tokens == settings.tokens == budget
    assert settings.page_tokens > (FEWEST_PAGES + 1) * tokens_per_page
    assert GrowingSettings(budget_tokens=900).resolved(tokens_per_page).tokens == 900
    assert Memory(shared_model(), MEMProcessor.from_model(shared_model(), tokenizer=shared_tokenizer())).settings == (
        GrowingSettings(budget_tokens=1024)
    )


def test_what_is_no_message_is_refused():
    memory = make_memory()
    with pytest.raises(DataError, match="the message, message 0: unknown role 'robot'|unknown role 'robot'"):
        memory.append({"role": "robot", "content": "hi"})
    assert memory.messages == []


@pytest.mark.parametrize("read_tokens", [0, 2])
def test_letters_that_are_not_read_are_named_once(caplog, read_tokens):
    """Nobody would see it otherwise: such a memory is a row of question marks."""
    model = make_model(read_tokens=read_tokens)
    text = [Message(("user", "assistant")[n % 2], f"Повторение номер {n} о небе и о траве.") for n in range(60)]
    memory = make_memory(model)
    with caplog.at_level("WARNING", logger="ocrmem.data.processor"):
        memory.extend(talk(60))  # latin
        memory.prompt("What now?")
        assert not caplog.records
        for _ in range(2):
            memory.extend(text)
            memory.prompt("What now?")
        MEMProcessor.from_model(model, tokenizer=shared_tokenizer()).prompt([*text, Message("user", "What now?")])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (2 if read_tokens else 0)
    assert all(
        "are none that this projection reads (U+041F, U+043E, U+0432…); in the memory each is '?'" in x for x in said
    )
