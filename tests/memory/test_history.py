from hypothesis import given
from hypothesis import strategies as st

from ocrmem.memory.history import history_text
from ocrmem.types import ROLES, Message

messages = st.lists(st.builds(Message, st.sampled_from(ROLES), st.text(st.characters())), max_size=6)


def test_text():
    text = history_text([Message("user", "hello"), Message("assistant", "hi\nthere"), Message("tool", "")])
    assert text == "user: hello\nassistant: hi\nthere\ntool: \n"
    assert history_text([]) == ""


@given(messages, messages)
def test_append_only(earlier, later):
    assert history_text([*earlier, *later]).startswith(history_text(earlier))
