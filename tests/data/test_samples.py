import copy

import pytest
import torch
from memory.parts import GEMMA, chitchat, make_processor, shared_tokenizer, smollm2, turns
from memory.pooling import PoolingEncoder
from torch.utils.data import DataLoader

from ocrmem.data.collator import MEMCollator
from ocrmem.data.samples import MEMDataset
from ocrmem.errors import ConfigError, DataError, MemoryNeverAppearsError
from ocrmem.types import Conversation, Message

REPLIES = [f"Reply number {i} says that the grass is green." for i in range(40)]


def conversation(number_of_turns=60, *, source="a.jsonl:1"):
    contents = [
        REPLIES[i // 2] if i % 2 else f"Question {i}: is the sky blue over the sea?" for i in range(number_of_turns)
    ]
    return Conversation(tuple(turns(*contents)), source)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def dataset(processor):
    return MEMDataset([conversation()], processor)


def decode(processor, ids):
    return processor.tokenizer.decode(ids)


def test_one_sample_for_each_reply_with_a_memory(processor):
    every = MEMDataset([conversation()], processor, samples="all")
    with_memory = MEMDataset([conversation()], processor)
    assert len(every) == 30
    assert 0 < len(with_memory) < 30
    report = with_memory.report
    assert (report.num_conversations, report.num_replies, report.num_unusable) == (1, 30, 0)
    assert report.num_samples == len(with_memory) == 30 - report.num_without_memory
    assert [bool(every[i]["page_keys"]) for i in range(30)] == [False] * (30 - len(with_memory)) + [True] * len(
        with_memory
    )


def test_only_the_reply_is_labelled(processor, dataset):
    for i in range(len(dataset)):
        sample = dataset[i]
        ids, labels = sample["input_ids"], sample["labels"]
        labelled = labels != -100
        reply = REPLIES[30 - len(dataset) + i]
        assert decode(processor, ids[labelled]) == f"{reply}<|im_end|>"
        assert torch.equal(labels[labelled], ids[labelled])
        assert labelled.nonzero()[0] == (~labelled).sum()  # one run, at the end
        assert not labelled[ids == processor.memory_token_id].any()
        assert (ids == processor.memory_token_id).sum() == sample["page_num_tokens"].sum()
        assert decode(processor, ids[~labelled]).endswith("<|im_start|>assistant\n")


def test_the_prompt_is_the_one_of_generation(processor, dataset):
    messages = conversation().messages
    for i in (0, len(dataset) - 1):
        sample = dataset[i]
        end = (30 - len(dataset) + i) * 2 + 1
        prompt = processor.prompt(messages[:end])
        assert sample["input_ids"][sample["labels"] == -100].tolist() == prompt.input_ids
        assert sample["page_keys"] == prompt.page_keys
        assert sample["page_num_tokens"].tolist() == prompt.page_num_tokens
        assert sample["pages"].shape == (len(prompt.pages), 768, 640)
        assert (sample["pages"][0].numpy() == prompt.pages[0].image_HW).all()


@pytest.mark.parametrize(
    "reply", ["\nstarts with a line break", "", " ", "\ud800", "<empty_output>", "<|im_end|> in it"]
)
def test_strange_replies_are_labelled_whole(processor, reply):
    messages = (*conversation(59).messages, Message("assistant", reply))
    dataset = MEMDataset([Conversation(messages)], processor)
    sample = dataset[len(dataset) - 1]
    labelled = sample["labels"] != -100
    shown = reply.replace("\ud800", "\ufffd").replace("<empty_output>", "<\u200bempty_output>")
    assert decode(processor, sample["input_ids"][labelled]) == f"{shown}<|im_end|>"
    assert sample["input_ids"][~labelled].tolist() == processor.prompt(messages[:-1]).input_ids


def test_a_long_reply_is_cut(processor):
    dataset = MEMDataset([conversation()], processor, max_reply_tokens=5)
    assert all((dataset[i]["labels"] != -100).sum() == 5 for i in range(0, len(dataset), 4))
    assert dataset.report.num_cut_replies == len(dataset)
    assert "with a reply cut short" in str(dataset.report)
    lengths = [
        int((sample["labels"] != -100).sum())
        for sample in map(MEMDataset([conversation()], processor).__getitem__, range(16))
    ]
    longest = max(lengths)
    assert MEMDataset([conversation()], processor, max_reply_tokens=longest).report.num_cut_replies == 0
    cut = MEMDataset([conversation()], processor, max_reply_tokens=longest - 1)
    assert cut.report.num_cut_replies == lengths.count(longest)
    sample = cut[lengths.index(longest)]
    assert sample["labels"][-1] != processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_real_conversations(processor):
    dataset = MEMDataset(chitchat(30, min_turns=60), processor)
    assert len(dataset) > 200
    special = set(processor.tokenizer.all_special_ids)
    for i in range(0, len(dataset), 60):
        sample = dataset[i]
        reply = sample["input_ids"][sample["labels"] != -100].tolist()
        assert len(reply) > 512 - 1 or reply[-1] in special
        assert len(sample["page_keys"]) == len(sample["pages"]) > 0
    measured = dataset.measure(max_samples=20)
    assert 0 < measured.num_measured <= 20
    assert measured.num_with_memory == measured.num_measured
    assert measured.mean_ratio > 2
    assert measured.history_tokens > measured.memory_tokens > 0


def test_samples_are_the_same_each_time(processor, dataset):
    again = MEMDataset([conversation()], make_processor())
    for i in (0, 3, len(dataset) - 1, 3):
        one, other = dataset[i], again[i]
        assert one["page_keys"] == other["page_keys"]
        assert all(torch.equal(one[name], other[name]) for name in ("input_ids", "labels", "pages", "page_num_tokens"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_data_loader_with_workers(processor, dataset, side):
    collator = MEMCollator(processor.pad_token_id, padding_side=side)
    plain = list(DataLoader(dataset, batch_size=3, collate_fn=collator))
    worked = list(DataLoader(dataset, batch_size=3, collate_fn=collator, num_workers=2))
    assert len(plain) == len(worked) == -(-len(dataset) // 3)
    for one, other in zip(plain, worked, strict=True):
        assert one["page_keys"] == other["page_keys"]
        assert all(torch.equal(one[name], other[name]) for name in one if name != "page_keys")


def test_replies_that_nobody_asked_for_are_left_out(processor):
    messages = (Message("assistant", "Welcome!"), *conversation(60).messages)
    report = MEMDataset([Conversation(messages)], processor, samples="all").report
    assert (report.num_replies, report.num_samples, report.num_unusable) == (31, 30, 1)
    doubled = (*conversation(60).messages, Message("assistant", "And another thing."))
    assert MEMDataset([Conversation(doubled)], processor, samples="all").report.num_unusable == 0
    gemma = make_processor(shared_tokenizer(GEMMA))
    assert MEMDataset([Conversation(doubled)], gemma, samples="all").report.num_unusable == 1


def test_gemma_labels_end_with_its_own_marker():
    processor = make_processor(shared_tokenizer(GEMMA))
    dataset = MEMDataset([Conversation((Message("assistant", "Welcome!"), *conversation().messages))], processor)
    sample = dataset[0]
    assert decode(processor, sample["input_ids"][sample["labels"] != -100]).endswith("green.<end_of_turn>")


def test_a_sample_that_pages_would_not_shorten_stays_text(processor):
    dashes = "-" * 4000  # few text tokens, 63 lines on a page
    messages = turns(dashes, "ok", "word " * 600, "fine")
    dataset = MEMDataset([Conversation(tuple(messages)), conversation()], processor)
    sample = dataset[0]
    assert sample["page_keys"] == []
    assert dashes in decode(processor, sample["input_ids"])
    assert decode(processor, sample["input_ids"][sample["labels"] != -100]) == "fine<|im_end|>"
    measured = dataset.measure()
    assert measured.num_with_memory == measured.num_measured - 1 == len(dataset) - 1
    batch = MEMCollator(processor.pad_token_id)([sample, dataset[1]])
    assert batch["num_pages"].tolist() == [0, len(dataset[1]["page_keys"])]


def test_never_long_enough(processor):
    with pytest.raises(
        MemoryNeverAppearsError,
        match=r"the longest of 5 prompts has 182 tokens, not above context_threshold=512\. Lower",
    ):
        MEMDataset([conversation(10)], processor)
    with pytest.raises(MemoryNeverAppearsError, match="not above context_threshold=512"):
        MEMDataset([conversation(10)], processor, samples="all")


def test_never_a_turn_left_for_history():
    processor = make_processor(context_threshold=100, recent_tokens=2000)
    with pytest.raises(
        MemoryNeverAppearsError,
        match=r"longest of 30 prompts has 1\d\d\d tokens, but all that is left besides recent_tokens=2000",
    ):
        MEMDataset([conversation()], processor)


def test_never_smaller():
    processor = make_processor(context_threshold=10, recent_tokens=10)
    messages = tuple(turns("a", "b", "c", "d"))
    with pytest.raises(
        MemoryNeverAppearsError,
        match=r"longest history of 2 prompts has \d+ text tokens, and its pages .*'pooling' takes 5 to 80",
    ):
        MEMDataset([Conversation(messages)], processor)


def test_a_page_that_always_costs_all_its_tokens():
    class WholePages(PoolingEncoder):
        def num_tokens(self, page):
            return self.tokens_per_page

    processor = make_processor(context_threshold=60, recent_tokens=30)
    whole = copy.copy(processor)
    whole.encoder = WholePages()
    assert (processor.smallest_memory(), whole.smallest_memory()) == (5, 80)
    assert len(MEMDataset([conversation()], whole)) < len(MEMDataset([conversation()], processor))


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = smollm2()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for message", "{{ messages | length }}{% for message", 1
    )
    with pytest.raises(DataError, match=r"a.jsonl:1: message \d+: the chat template of .* writes the prompt otherwise"):
        MEMDataset([conversation()], make_processor(tokenizer))


def test_bad_arguments(processor):
    with pytest.raises(ConfigError, match="samples='some': expected 'with_memory' or 'all'"):
        MEMDataset([conversation()], processor, samples="some")
    with pytest.raises(ConfigError, match="max_reply_tokens=0: expected 1 or more"):
        MEMDataset([conversation()], processor, max_reply_tokens=0)
    with pytest.raises(DataError, match="the data set is empty: no conversations were given"):
        MEMDataset([], processor)
    with pytest.raises(DataError, match=r"none of the 1 replies in 1 conversations can be learnt from: a reply needs"):
        MEMDataset([Conversation((Message("assistant", "hi"),))], processor)
