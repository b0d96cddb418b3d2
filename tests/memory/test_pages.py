import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ocrmem.config.render import PP_OCR_PAGE, RenderSettings
from ocrmem.memory.history import history_text
from ocrmem.memory.pages import NUM_HISTORIES, HistoryPages
from ocrmem.render.renderer import Renderer
from ocrmem.types import Message

SMALL = RenderSettings(page_width=60, page_height=36, line_height=12, font_size=10, cell_width=6)
"""Three lines of ten characters."""


class CountingRenderer(Renderer):
    """The renderer, and a count of the pages that it drew."""

    drawn = 0

    def pages(self, text, *, start=0):
        pages = super().pages(text, start=start)
        self.drawn += len(pages)
        return pages


def assert_same(pages, expected):
    assert len(pages) == len(expected)
    for page, other in zip(pages, expected, strict=True):
        assert (page.text_start, page.text_end, page.num_lines) == (
            other.text_start,
            other.text_end,
            other.num_lines,
        )
        for name in ("image_HW", "glyph_offsets_N", "glyph_boxes_N4"):
            assert np.array_equal(getattr(page, name), getattr(other, name))


contents = st.text(st.sampled_from("ab cd-\n\t漢字e\u0301\ud800👩\u200d🔬\u200b"), max_size=70)


@settings(max_examples=60, deadline=None)
@given(st.lists(contents, min_size=1, max_size=8), st.sampled_from(["keep", "mark"]))
def test_growing_pages_are_those_of_the_whole_text(texts, line_breaks):
    import dataclasses

    renderer = Renderer(dataclasses.replace(SMALL, line_breaks=line_breaks))
    history, fresh = HistoryPages(renderer), renderer
    messages = [Message("user", text) for text in texts]
    for number in range(1, len(messages) + 1):
        text = history_text(messages[:number])
        assert_same(history.pages(text), fresh.pages(text))


def test_only_the_last_page_is_drawn_again():
    renderer = CountingRenderer(PP_OCR_PAGE)
    history = HistoryPages(renderer)
    text = "".join(f"user: message number {i}\n" for i in range(200))
    number = len(history.pages(text))
    assert number > 4
    assert renderer.drawn == number
    assert len(history.pages(text + "user: more\n")) == number
    assert renderer.drawn == number + 1
    history.pages(text + "user: more\n")
    assert renderer.drawn == number + 1


def test_histories_are_kept_apart_and_forgotten_in_turn():
    renderer = CountingRenderer(PP_OCR_PAGE)
    history = HistoryPages(renderer)
    texts = [f"user: history {i}\n" for i in range(NUM_HISTORIES + 1)]
    for text in texts:
        assert_same(history.pages(text), Renderer(PP_OCR_PAGE).pages(text))
    drawn = renderer.drawn
    history.pages(texts[-1])
    assert renderer.drawn == drawn
    history.pages(texts[0])
    assert renderer.drawn == drawn + 1
    assert history.pages("") == []


def test_a_caller_may_change_the_list():
    history = HistoryPages(Renderer(PP_OCR_PAGE))
    history.pages("user: a\n").clear()
    assert len(history.pages("user: a\n")) == 1
