import pytest
from memory.parts import (
    GEMMA,
    LLAMA,
    MISTRAL_MOVING_SYSTEM,
    TEMPLATES,
    chitchat,
    shared_tokenizer,
    smollm2,
    turns,
)

from ocrmem.errors import ConfigError, DataError
from ocrmem.memory.chat_format import ChatFormat, num_leading_system
from ocrmem.types import Message

TOKEN = "<empty_output>"
HEADER = "Earlier:\n"


def chat_format(template=None):
    return ChatFormat(shared_tokenizer(template), memory_token=TOKEN, header=HEADER)


def test_chatml_keeps_the_default_system_text():
    chat = chat_format()
    question = [Message("user", "hi")]
    text = chat.text(question, add_generation_prompt=True, num_placeholders=2)
    plain = chat.text(question, add_generation_prompt=True)
    assert "SmolLM, trained by Hugging Face" in plain
    assert text == plain.replace("Hugging Face<|im_end|>", f"Hugging Face\n\n{HEADER}{TOKEN}{TOKEN}<|im_end|>")


def test_chatml_memory_follows_the_system_text():
    text = chat_format().text(
        [Message("system", "Be brief."), *turns("hi")], add_generation_prompt=True, num_placeholders=1
    )
    assert text == (
        f"<|im_start|>system\nBe brief.\n\n{HEADER}{TOKEN}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_llama_has_no_default_system_text():
    chat = chat_format(LLAMA)
    assert chat.default_system == ""
    text = chat.text(turns("hi"), add_generation_prompt=True, num_placeholders=1)
    assert f"system<|end_header_id|>\n\n{HEADER}{TOKEN}<|eot_id|><|start_header_id|>user" in text


def test_gemma_takes_system_and_memory_in_the_first_user_turn():
    chat = chat_format(GEMMA)
    assert (chat.accepts_system, chat.accepts_tool, chat.merges_turns) == (False, False, True)
    messages = [
        Message("system", "Be brief."),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
    ]
    assert chat.text(messages, add_generation_prompt=True, num_placeholders=1).endswith(
        f"<start_of_turn>user\nBe brief.\n\n{HEADER}{TOKEN}\n\na<end_of_turn>\n<start_of_turn>model\n"
        "b<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    )


def test_gemma_takes_what_does_not_alternate():
    chat = chat_format(GEMMA)
    messages = [
        Message("assistant", "first"),
        Message("user", "a"),
        Message("user", "b"),
        Message("assistant", "c"),
        Message("tool", "42"),
        Message("system", "later"),
    ]
    text = (
        chat.text(messages, add_generation_prompt=True).replace("<start_of_turn>", "|").replace("<end_of_turn>\n", "")
    )
    assert text.endswith("|user\n|model\nfirst|user\na\nb|model\nc|user\ntool: 42\nsystem: later|model\n")


def test_a_template_that_moves_the_system_text_does_not_get_it():
    chat = chat_format(MISTRAL_MOVING_SYSTEM)
    assert not chat.accepts_system
    messages = [Message("system", "s"), *turns("a", "b", "c")]
    assert "[INST] s\n\na[/INST] b" in chat.text(messages, add_generation_prompt=True)


def test_tool_turns_stay_where_the_template_takes_them():
    chat = chat_format()
    text = chat.text([*turns("a", "b"), Message("tool", "42")], add_generation_prompt=True)
    assert "<|im_start|>tool\n42<|im_end|>" in text


@pytest.mark.parametrize("name", [None, *TEMPLATES])
@pytest.mark.parametrize("has_system", [False, True])
def test_counts_are_those_of_the_template(name, has_system):
    chat = chat_format(TEMPLATES.get(name))
    for conversation in chitchat(20):
        messages = [*([Message("system", "You are Ann.")] if has_system else []), *conversation.messages]
        messages = messages[: len(messages) // 2 * 2 - (0 if has_system else 1)]  # ends with the user, as it began
        lengths = chat.content_lengths([message.content for message in messages])
        rest = messages[1:] if has_system else messages
        counted = chat.base_length(has_system=has_system) + sum(lengths)
        counted += sum(chat.overheads[message.role] for message in rest)
        exact = len(chat.ids(chat.text(messages, add_generation_prompt=True)))
        # Mistral writes a space beside the content, which joins with its first word.
        assert abs(counted - exact) <= (0.03 * exact if name in ("mistral", "mistral-moving-system") else 0)


@pytest.mark.parametrize("name", [None, *TEMPLATES])
@pytest.mark.parametrize("has_system", [False, True])
def test_separators_are_what_a_memory_costs_besides_its_placeholders(name, has_system):
    chat = chat_format(TEMPLATES.get(name))
    messages = [*([Message("system", "Be brief.")] if has_system else []), *turns("What did I say?")]
    plain = chat.ids(chat.text(messages, add_generation_prompt=True))
    ids = chat.ids(chat.text(messages, add_generation_prompt=True, num_placeholders=7))
    assert len(ids) - len(plain) == 7 + chat.separator_tokens(has_system=has_system)


def test_reply_tail():
    assert chat_format().num_reply_tail == 1  # the line break after <|im_end|>
    assert chat_format(TEMPLATES["mistral"]).num_reply_tail == 0
    assert chat_format(GEMMA).num_reply_tail == 1
    assert chat_format("{% for m in messages %}{{ m.role + m.content + 'end' }}{% endfor %}").num_reply_tail == 0


def test_placeholder_in_content_and_header_is_escaped():
    chat = ChatFormat(shared_tokenizer(), memory_token=TOKEN, header=f"Look: {TOKEN}\n")
    index = chat.tokenizer.convert_tokens_to_ids(TOKEN)
    messages = [Message("system", TOKEN), *turns(TOKEN, f"x{TOKEN}", "\ud800")]
    ids = chat.ids(chat.text(messages, add_generation_prompt=True, num_placeholders=3))
    assert ids.count(index) == 3


def test_errors():
    tokenizer = smollm2()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"has no chat template\. Use an instruct model's tokenizer, or set"):
        ChatFormat(tokenizer, memory_token=TOKEN, header="")
    with pytest.raises(ConfigError, match="does not write a user message's text"):
        chat_format("{{ 'nothing' }}")
    broken = LLAMA + "{% if messages | length > 3 %}{{ raise_exception('too long for me') }}{% endif %}"
    with pytest.raises(DataError, match=r"refuses these turns \(user, assistant, user, assistant\): too long for me"):
        chat_format(broken).text(turns("a", "b", "c", "d"), add_generation_prompt=False)


def test_num_leading_system():
    system, user = Message("system", ""), Message("user", "")
    assert [num_leading_system(m) for m in ([], [user, system], [system, system, user, system], [system])] == [
        0,
        0,
        2,
        1,
    ]
