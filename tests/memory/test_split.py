import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory.parts import chitchat, make_processor, turns

from ocrmem.config.memory import MemorySettings
from ocrmem.errors import MemoryNeverAppearsError
from ocrmem.memory.split import TokenCounts, split_prompt
from ocrmem.types import Message

BASE, SEPARATORS = 10, 8


def counted(roles, lengths):
    """Counts of messages whose lengths, overhead included, are given."""
    messages = tuple(Message({"s": "system", "u": "user", "a": "assistant", "t": "tool"}[r], "") for r in roles)
    ends, last_user, last = [0], [-1], -1
    for i, (message, length) in enumerate(zip(messages, lengths, strict=True)):
        ends.append(ends[-1] + length)
        last = i if message.role == "user" else last
        last_user.append(last)
    num_system = len(roles) - len(roles.lstrip("s"))
    return TokenCounts(messages, num_system, BASE, tuple(ends), SEPARATORS, tuple(last_user))


def split(roles, lengths, end=None, **settings):
    settings = {"context_threshold": 0, "recent_tokens": 0, "max_length": 10_000, **settings}
    counts = counted(roles, lengths)
    return split_prompt(counts, len(roles) if end is None else end, settings=MemorySettings(**settings))


def test_threshold_edge():
    roles, lengths = "uau", [30, 30, 30]
    assert split(roles, lengths, context_threshold=100).history == ()
    assert len(split(roles, lengths, context_threshold=99).history) == 2
    assert split(roles, lengths, context_threshold=100).prompt_tokens == 100


def test_recent_edge():
    roles, lengths = "uauau", [10] * 5
    assert split(roles, lengths, recent_tokens=9).recent_start == 4  # the last user turn, however long
    assert split(roles, lengths, recent_tokens=29).recent_start == 4
    assert split(roles, lengths, recent_tokens=30).recent_start == 2
    assert split(roles, lengths, recent_tokens=40).recent_start == 2  # would begin with the assistant
    assert split(roles, lengths, recent_tokens=50).recent_start == 0


def test_what_follows_the_last_user_turn_stays_text():
    assert split("uauat", [10] * 5).recent_start == 2
    assert split("uaaa", [10] * 4).recent_start == 0


def test_system_messages_stay_in_front():
    s = split("ssuau", [100, 50, 10, 10, 10])
    assert [m.role for m in s.system] == ["system", "system"]
    assert (s.history_start, s.recent_start, s.history_tokens) == (2, 4, 20)
    assert split("uasau", [10] * 5).history_tokens == 40  # a later one is a turn like any other


def test_without_a_user_the_newest_turns_stay():
    assert split("aaa", [10] * 3, recent_tokens=10).recent_start == 2


def test_oldest_whole_turns_beyond_max_length_are_left_out():
    roles, lengths = "ua" * 20 + "u", [10] * 41
    s = split(roles, lengths, max_length=240, context_threshold=100)
    # 420 tokens are 180 too many, a multiple of the step of 30; 18 turns, and a user turn comes next.
    assert (s.num_dropped, s.dropped_tokens, s.history_start) == (18, 180, 18)
    assert s.history_tokens == 400 - 180
    assert s.prompt_tokens == 420
    s = split(roles, lengths, max_length=250, context_threshold=100)
    assert s.dropped_tokens == 200  # 170 too many; steps of 31 give 186; then the next user turn


def test_steps_give_way_where_they_would_leave_nothing():
    s = split("uauauu", [10, 10, 10, 10, 10, 1000], max_length=1030, context_threshold=100)
    assert s.num_dropped == 4  # 30 too many; a step of 128 would drop all 50
    assert s.history_tokens == 10


def test_the_first_page_stays_for_many_replies():
    roles, lengths = "ua" * 300, [10] * 600
    counts = counted(roles, lengths)
    settings = MemorySettings(context_threshold=100, recent_tokens=50, max_length=800)
    starts = [split_prompt(counts, end, settings=settings).history_start for end in range(101, 600, 2)]
    assert starts == sorted(starts)
    assert len(set(starts)) <= 520 // 10 + 2  # every step of 100 tokens, not every turn of 20


def test_history_stays_text_where_memory_is_not_smaller():
    s = split("uau", [30, 30, 30])
    assert s.history_tokens == 60
    kept = s.with_memory(60 - SEPARATORS - 1)
    assert (kept.memory_tokens, kept.placeholder_tokens, kept.separator_tokens) == (59, 51, SEPARATORS)
    assert kept.compression_ratio == pytest.approx(60 / 59)
    text = s.with_memory(60 - SEPARATORS)
    assert (text.history, len(text.recent), text.memory_tokens, text.compression_ratio) == ((), 3, 0, None)


def test_summary_and_json():
    s = split("ua" * 20 + "u", [10] * 41, max_length=240, context_threshold=100)
    assert s.with_memory(80).summary() == (
        "memory: 22 turns, 220 text tokens as 88 memory tokens (ratio 2.50); 1 turns stay text; "
        "18 oldest turns (180 tokens) left out"
    )
    assert split("u", [10]).summary() == "no memory: all 1 turns stay text"
    assert s.with_memory(80).as_json() == {
        "prompt_tokens": 420,
        "history_turns": 22,
        "history_tokens": 220,
        "memory_tokens": 88,
        "compression_ratio": 2.5,
        "recent_turns": 1,
        "dropped_turns": 18,
        "dropped_tokens": 180,
    }


def test_impossible_settings_are_refused_with_both_numbers():
    with pytest.raises(MemoryNeverAppearsError, match="max_length=512 is not above context_threshold=512"):
        MemorySettings(max_length=512)
    with pytest.raises(MemoryNeverAppearsError, match="max_length=600 is not above recent_tokens=700"):
        MemorySettings(max_length=600, recent_tokens=700)


@given(
    roles=st.text("suat", min_size=1, max_size=25),
    data=st.data(),
    threshold=st.integers(0, 300),
    recent=st.integers(0, 300),
    extra=st.integers(1, 300),
)
def test_invariants(roles, data, threshold, recent, extra):
    lengths = data.draw(st.lists(st.integers(3, 60), min_size=len(roles), max_size=len(roles)))
    max_length = max(threshold, recent) + extra
    s = split(roles, lengths, context_threshold=threshold, recent_tokens=recent, max_length=max_length)
    end, total = len(roles), sum(lengths)
    assert s.prompt_tokens == BASE + total
    assert s.num_system <= s.history_start <= s.recent_start <= end
    assert len(s.system) + s.num_dropped + len(s.history) + len(s.recent) == end
    system = sum(lengths[: s.num_system])
    recent_length = sum(lengths[s.recent_start :])
    assert total == system + s.dropped_tokens + s.history_tokens + recent_length
    if s.prompt_tokens <= threshold:
        assert s.recent_start == s.num_system
        return
    users = [i for i in range(s.num_system, end) if roles[i] == "u"]
    if users:
        assert s.recent_start <= users[-1]
        assert roles[s.recent_start] == "u"
        assert recent_length <= recent or s.recent_start == users[-1]
        earlier = [i for i in users if i < s.recent_start]
        if earlier:  # one more user turn would not fit
            assert sum(lengths[earlier[-1] :]) > recent
    if s.history:
        assert s.prompt_tokens - s.dropped_tokens <= max_length
    if s.prompt_tokens <= max_length:
        assert s.num_dropped == 0
    text = s.as_text()
    assert len(text.recent) == len(s.history) + len(s.recent)
    assert text.num_dropped == s.num_dropped


def test_real_counts_are_exact():
    processor = make_processor()
    for conversation in chitchat(40):
        counts = processor.count(conversation.messages)
        for end in (1, len(conversation.messages) // 2, len(conversation.messages)):
            text = processor.chat_format.text(conversation.messages[:end], add_generation_prompt=True)
            assert counts.prompt_tokens(end) == len(processor.chat_format.ids(text))


def test_each_message_is_tokenised_once(monkeypatch):
    processor = make_processor()
    processor.count(turns("warm", "up"))
    seen = []
    lengths = processor.chat_format.content_lengths
    monkeypatch.setattr(
        processor.chat_format, "content_lengths", lambda contents: seen.extend(contents) or lengths(contents)
    )
    contents = [f"message {i}" for i in range(50)]
    counts = processor.count(turns(*contents))
    for end in range(1, 50, 2):
        split_prompt(counts, end, settings=processor.memory)
    assert seen == contents


def test_split_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        split("u", [1]).end = 2
