"""Real parts for the tests of memory and data: a tokenizer, conversations, several LLMs' chat templates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from memory.pooling import PoolingEncoder
from tokenizers import AddedToken
from transformers import AutoTokenizer

from ocrmem.assets.fetch import resolve
from ocrmem.config.memory import MemorySettings
from ocrmem.data.conversations import read_conversations
from ocrmem.data.processor import MEMProcessor
from ocrmem.types import Conversation, Message

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') "
    "}}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = "
    "message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
LLAMA = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set "
    "content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) "
    "%}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif "
    "%}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_MOVING_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ bos_token }}{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MARKERS = (
    *("<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]"),
)
"""Special tokens of those LLMs, for SmolLM2's tokenizer to know when it uses their templates."""
TEMPLATES = {
    "gemma": GEMMA,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral-moving-system": MISTRAL_MOVING_SYSTEM,
}


def smollm2(template: str | None = None) -> Any:
    """A fresh tokenizer of SmolLM2-135M-Instruct, with another LLM's chat template if one is given."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
    if template is not None:
        tokenizer.chat_template = template
        tokenizer.add_tokens([AddedToken(marker, special=True) for marker in MARKERS], special_tokens=True)
    return tokenizer


@functools.cache
def shared_tokenizer(template: str | None = None) -> Any:
    """One tokenizer for all tests that leave it as it is."""
    return smollm2(template)


@functools.cache
def chitchat_path() -> Path:
    """The training conversations."""
    return resolve("chitchat") / "train.jsonl"


@functools.cache
def chitchat(number: int, *, min_turns: int = 6) -> tuple[Conversation, ...]:
    """The first conversations that have at least so many turns."""
    conversations = read_conversations(chitchat_path()).conversations
    return tuple(c for c in conversations if len(c.messages) >= min_turns)[:number]


def make_processor(tokenizer: Any = None, *, store: Any = None, scale: float = 1.0, **settings: Any) -> MEMProcessor:
    """A processor with the pooling encoder; keyword arguments are memory settings."""
    return MEMProcessor(
        tokenizer or shared_tokenizer(),
        encoder=PoolingEncoder(scale=scale),
        memory=MemorySettings(**settings),
        store=store,
    )


def turns(*contents: str, first: str = "user") -> list[Message]:
    """Messages by the user and the assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [Message(roles[i % 2], content) for i, content in enumerate(contents)]  # type: ignore[arg-type]
