"""Arms with an exact part: never more tokens than the memory alone, the newest of it untouched, the text behind it."""

import pytest
import torch
from memory.parts import chitchat, make_processor

from ocrmem.data.processor import stack_pages
from ocrmem.evaluation.arms import Context
from ocrmem.evaluation.exact_arms import EXACT_ARMS, exact_context, without_oldest
from ocrmem.evaluation.probes import Probe
from ocrmem.evaluation.scoring import make_prompt
from ocrmem.memory.history import history_text
from ocrmem.types import Message


def test_whole_units_are_cut_from_the_beginning():
    features_PVE = torch.arange(2 * 6 * 1).reshape(2, 6, 1).float() + 1
    kept, counts = without_oldest(features_PVE, [6, 5], 3, unit=2)
    assert counts == [2, 5]
    assert kept[0].flatten().tolist() == [5, 6, 0, 0, 0, 0]
    assert kept[1].equal(features_PVE[1])
    kept, counts = without_oldest(features_PVE, [6, 5], 7, unit=2)
    assert counts == [3]
    assert kept[0, :3].flatten().tolist() == [9, 10, 11]
    assert without_oldest(features_PVE, [6, 5], 0, unit=2)[1] == [6, 5]
    assert without_oldest(features_PVE, [6, 5], 99, unit=2)[0].shape == (0, 6, 1)


@pytest.mark.parametrize("arm", EXACT_ARMS)
def test_no_more_tokens_than_the_memory(arm):
    processor = make_processor()
    texts = [history_text(conversation.messages)[:3000] for conversation in chitchat(6, min_turns=20)]
    for first in range(3):
        history = "".join(texts[first:]) + "user: My code is XK-7731-B.\n"  # long enough for the ledger's share
        probe = Probe(
            task="cued-recall",
            source="conversation",
            id="x#0",
            history=history,
            turns=(Message("user", "Which code?"),),
            target="x",
            query="code XK-7731-B",
            document_hashes=(),
        )
        pages = processor.pages(history)
        counts = [processor.encoder.num_tokens(page) for page in pages]
        with torch.no_grad():
            features_PVE = processor.encoder(stack_pages(pages, processor.encoder))
        ids, features, left = exact_context(arm, probe, features_PVE, counts, processor=processor)
        assert len(ids) + sum(left) <= sum(counts)
        assert sum(counts) - sum(left) < len(ids) + processor.encoder.tokens_per_unit
        assert features[-1, : left[-1]].equal(features_PVE[-1, counts[-1] - left[-1] : counts[-1]])
        text = processor.tokenizer.decode(ids)
        assert "XK-7731-B" in text
        # As `Memory` writes it: behind the memory, each part behind an empty line.
        context = Context(features_PVE=features, page_num_tokens=left, exact_ids=ids)
        prompt = make_prompt(probe, context, processor.chat_format)
        assert prompt.length(with_target=False) == len(prompt.before) + len(ids) + sum(left) + len(prompt.after)
        whole = processor.chat_format.text(
            probe.turns, add_generation_prompt=True, num_placeholders=sum(left), after_memory=text
        )
        assert prompt.ids(processor.memory_token_id, with_target=False) == processor.chat_format.ids(whole)
        parts = {"memory-ledger": 1, "memory-recall": 1, "memory-ledger-recall": 2}
        assert text.startswith("\n\n")
        assert text.count("\n\n") == parts[arm]
