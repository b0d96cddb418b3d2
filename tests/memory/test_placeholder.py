import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory.parts import shared_tokenizer, smollm2
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from ocrmem.errors import ConfigError
from ocrmem.memory.placeholder import choose_memory_token, escape_placeholder, text_for_tokenizer


def test_smollm2_has_one():
    tokenizer = shared_tokenizer()
    token, index = choose_memory_token(tokenizer)
    assert token in tokenizer.get_added_vocab()
    assert tokenizer.convert_tokens_to_ids(token) == index
    assert token not in tokenizer.chat_template
    assert index not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|reserved_special_token_0|>", "<unused0>", "<my_unused_3>"])
def test_reserved_tokens_of_other_families_come_first(token):
    tokenizer = smollm2()
    tokenizer.add_tokens([AddedToken(token, special=True)])
    if token == "<my_unused_3>":  # a name by pattern alone comes after the known ones
        tokenizer.chat_template += " ".join(t for t in tokenizer.get_added_vocab() if t != token)
    assert choose_memory_token(tokenizer) == (token, len(tokenizer) - 1)


@pytest.mark.parametrize(
    ("token", "match"),
    [
        ("hello", r"memory_token='hello' cannot be the placeholder: it is not an added token"),
        (
            "<|im_end|>",
            r"it is the tokenizer's (eos|pad) token.*Give an added token.*it has '<\|endoftext\|>'",
        ),
        ("<|im_start|>", r"it is the tokenizer's bos token"),
    ],
)
def test_a_wrong_choice_is_refused(token, match):
    with pytest.raises(ConfigError, match=match):
        choose_memory_token(shared_tokenizer(), memory_token=token)


def test_a_token_of_the_template_or_beyond_the_embedding_is_refused():
    tokenizer = smollm2()
    tokenizer.chat_template += "{# <file_sep> #}"
    with pytest.raises(ConfigError, match="the chat template uses it"):
        choose_memory_token(tokenizer, memory_token="<file_sep>")
    assert choose_memory_token(tokenizer, memory_token="<filename>")[0] == "<filename>"
    with pytest.raises(ConfigError, match=r"its id 6 is beyond the 6 rows of the LLM's embedding"):
        choose_memory_token(tokenizer, memory_token="<filename>", vocab_size=6)


def test_a_token_that_text_does_not_become_is_refused():
    tokenizer = smollm2()
    tokenizer.add_tokens([AddedToken("lone", single_word=True)])
    with pytest.raises(ConfigError, match="text that holds it twice does not become its id twice"):
        choose_memory_token(tokenizer, memory_token="lone")


def test_no_reserved_token():
    backend = smollm2().backend_tokenizer
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="plain")
    plain.chat_template = " ".join(plain.get_added_vocab())
    with pytest.raises(ConfigError, match=r"'plain' has no reserved token.*Give one with\s+memory_token=…"):
        choose_memory_token(plain)


def test_escaped_text_never_gives_the_id():
    tokenizer = shared_tokenizer()
    token, index = choose_memory_token(tokenizer)
    text = f"a{token}{token} b <{token}> {token[:-1]}"
    assert index in tokenizer.encode(text)
    escaped = escape_placeholder(text, token)
    assert index not in tokenizer.encode(escaped)
    assert escaped.replace("\u200b", "") == text
    assert escape_placeholder("plain", token) == "plain"


@given(st.text("aba<>"), st.sampled_from(["aba", "<a>", "aa", "<<"]))
def test_escape_leaves_no_token(text, token):
    escaped = escape_placeholder(text, token)
    assert token not in escaped
    assert escaped.replace("\u200b", "") == text


def test_lone_surrogates_for_the_tokenizer():
    text = text_for_tokenizer("a\ud800b\udfff😀", "<m>")
    assert text == "a\ufffdb\ufffd😀"
    assert shared_tokenizer().encode(text)
