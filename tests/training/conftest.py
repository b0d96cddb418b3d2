"""A small bank of real text, its encoder and its tasks."""

import dataclasses

import pytest
from training.bank_parts import PAGE, PROSE, memory_id

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.memory import MemorySettings
from ocrmem.data.bank import BankDocument, build_bank
from ocrmem.data.conversations import read_conversations
from ocrmem.data.processor import MEMProcessor
from ocrmem.encoders.registry import build_encoder
from ocrmem.model.llm import load_tokenizer
from ocrmem.training.build import find_data
from ocrmem.training.corpus import conversation_document
from ocrmem.training.tasks import Frame, TaskSampler


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def encoders():
    """The whole encoder, 20 steps to a token, and the same cut four times as fine."""
    fine = build_encoder(EncoderSettings(settings={"steps_per_token": 5}))
    page = dataclasses.replace(fine.page, **PAGE)
    made = [build_encoder(EncoderSettings(settings={"steps_per_token": steps}), page=page) for steps in (20, 5)]
    return made[0].eval(), made[1].eval()


@pytest.fixture(scope="module")
def documents():
    conversations = read_conversations(find_data("chitchat/heldout.jsonl"), max_conversations=2).conversations
    return [BankDocument("prose", PROSE), *map(conversation_document, conversations)]


@pytest.fixture(scope="module")
def bank(documents, encoders, tokenizer, tmp_path_factory):
    return build_bank(documents, encoder=encoders[1], tokenizer=tokenizer, folder=tmp_path_factory.mktemp("banks"))


@pytest.fixture(scope="module")
def frame(encoders, tokenizer):
    processor = MEMProcessor(tokenizer, encoder=encoders[0], memory=MemorySettings(header=""))
    return Frame(processor.chat_format)


@pytest.fixture(scope="module")
def sampler(bank, frame):
    return TaskSampler(bank.joined(4), frame, memory_token_id=memory_id(frame))
