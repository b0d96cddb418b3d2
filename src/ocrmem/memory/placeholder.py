"""The placeholder: the token id in whose places memory tokens are put."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ocrmem.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANDIDATES = (
    "<|image_pad|>",  # Qwen 2 to 3
    "<|reserved_special_token_0|>",  # Llama 3
    "<unused0>",  # Gemma
    "<unused99>",
    "<|reserved_200000|>",  # Phi-4
    "[control_20]",  # Mistral v3
    "<|extra_0|>",
    "<empty_output>",  # SmolLM and StarCoder: an empty notebook cell's marker, rarest in conversations
    "<jupyter_script>",
    "<filename>",
    "<file_sep>",
    "<repo_name>",
    "<|file_sep|>",
    "<|repo_name|>",
    "<image_soft_token>",  # last: Gemma's text models have no row for it in their embedding
)
"""Tokens that LLM families reserve, the least used first."""

RESERVED = re.compile(r"unused|reserved|extra|control|dummy|placeholder", re.IGNORECASE)
"""How reserved tokens of other families are called."""

ZERO_WIDTH_SPACE = "\u200b"
SURROGATES = re.compile("[\ud800-\udfff]")


def choose_memory_token(
    tokenizer: PreTrainedTokenizerBase, *, memory_token: str | None = None, vocab_size: int | None = None
) -> tuple[str, int]:
    """The placeholder's text and id.

    Args:
        tokenizer: the LLM's.
        memory_token: the user's choice; None: the first of `CANDIDATES` that fits, then any token whose name
            says that it is reserved.
        vocab_size: rows of the LLM's embedding, where known; ids beyond are refused.

    Raises:
        ConfigError: no token fits, or the one given does not; the message says why.
    """
    added = _added(tokenizer)
    if memory_token is not None:
        reason = _refusal(tokenizer, memory_token, vocab_size)
        if reason is not None:
            raise ConfigError(
                f"memory_token={memory_token!r} cannot be the placeholder: {reason}. Give an added token of "
                "the tokenizer that neither the chat template nor a reply uses; it has "
                f"{_some_added(tokenizer)}."
            )
        return memory_token, added[memory_token]
    reserved = [token for token in added if RESERVED.search(token)]
    for token in (*CANDIDATES, *reserved):
        if token in added and _refusal(tokenizer, token, vocab_size) is None:
            return token, added[token]
    raise ConfigError(
        f"the tokenizer {tokenizer.name_or_path!r} has no reserved token that could stand for memory. Give "
        "one with memory_token=…: an added token that neither the chat template nor a reply uses; it has "
        f"{_some_added(tokenizer)}."
    )


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {str(token): index for index, token in sorted(tokenizer.added_tokens_decoder.items())}


def _some_added(tokenizer: PreTrainedTokenizerBase) -> str:
    names = list(_added(tokenizer))
    shown = ", ".join(map(repr, names[:20])) + (", …" if len(names) > 20 else "")
    return shown or "no added tokens at all"


def _refusal(tokenizer: PreTrainedTokenizerBase, token: str, vocab_size: int | None) -> str | None:
    """Why a token cannot be the placeholder; None where it can."""
    index = _added(tokenizer).get(token)
    if index is None:
        return "it is not an added token of the tokenizer, so ordinary text could produce its id"
    if vocab_size is not None and index >= vocab_size:
        return f"its id {index} is beyond the {vocab_size} rows of the LLM's embedding"
    for role in ("bos", "eos", "pad", "sep", "cls", "mask"):
        if index == getattr(tokenizer, f"{role}_token_id"):
            return f"it is the tokenizer's {role} token"
    if token in str(tokenizer.chat_template or ""):
        return "the chat template uses it"
    if tokenizer.encode(f"a{token}{token}b", add_special_tokens=False).count(index) != 2:
        return "text that holds it twice does not become its id twice"
    return None


def escape_placeholder(text: str, token: str) -> str:
    """Text that can never become the placeholder's id.

    A zero-width space is put after the first character of every literal occurrence of the placeholder. That
    is for the tokenizer alone: pages draw the text as it was written.
    """
    # More than once, since what an escape leaves may still hold a token that overlaps itself.
    while token in text:
        text = text.replace(token, token[0] + ZERO_WIDTH_SPACE + token[1:])
    return text


def text_for_tokenizer(text: str, token: str) -> str:
    """Text as the tokenizer gets it: the placeholder escaped; lone surrogates, which it refuses, U+FFFD."""
    return escape_placeholder(SURROGATES.sub("\ufffd", text), token)
