"""`layout="unicode"`: line breaking, tabs, right-to-left runs and shaping; the map still goes back to the text."""

import dataclasses
import importlib.util
import itertools
import os
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uniseg.linebreak import line_break_boundaries

from ocrmem.config.render import PP_OCR_PAGE, RenderSettings, deepseek_ocr_page
from ocrmem.render import native
from ocrmem.render import renderer as renderer_module
from ocrmem.render.breaking import annex_class
from ocrmem.render.renderer import Renderer

SMALL = RenderSettings(
    page_width=100, page_height=48, line_height=12, font_size=10, cell_width=6, fallback_fonts=("dejavu-sans",),
    margin_left=3, margin_right=5, margin_top=2, margin_bottom=4, layout="unicode",
)  # fmt: skip
WIDE = dataclasses.replace(SMALL, fallback_fonts=("dejavu-sans", "noto-sans-sc"))
PROSE = dataclasses.replace(deepseek_ocr_page(512), layout="unicode")
EXAMPLES = int(os.environ.get("OCRMEM_UNICODE_EXAMPLES", "100"))
"""Random strings for each property; 10,000 take some minutes."""
SCRIPTS = (
    "ab 1,.-/(\"'\t\n中。あァー가שלוםمرحبا١\u0301\u05b0\u064e\u200b\u00ad\u200d\u202e\u2066👩🔬🇩🇪"
    "\U0001f3fdक्षิ\r\u2028«»“”…$%"
)
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=300), st.text(st.sampled_from(SCRIPTS), max_size=300)
)
ALL_FEATURES = st.fixed_dictionaries(
    {
        "line_breaks": st.sampled_from(["keep", "mark"]),
        "alignment": st.sampled_from(["left", "right", "center", "justify"]),
        "roles": st.sampled_from(["text", "rule", "inverse"]),
        "space_after": st.sampled_from([0, 5]),
        "first_indent": st.sampled_from([0, 7]),
        "missing_glyphs": st.sampled_from(["code", "name"]),
        "cell_width": st.sampled_from([None, 6]),
    }
)


def text_of(pages, text: str) -> str:
    """The text, put together from the places of the glyphs."""
    found = ""
    for page in pages:
        starts = [page.text_start, *page.glyph_offsets_N[1:].tolist()]
        found += "".join(text[start:end] for start, end in zip(starts, [*starts[1:], page.text_end], strict=True))
    return found


def lines(text: str, page_settings: RenderSettings = WIDE) -> list[str]:
    """The text of each line."""
    found = []
    for page in Renderer(page_settings).iter_pages(text):
        edges = np.flatnonzero(np.diff(page.glyph_boxes_N4[:, 1], prepend=-1)).tolist()
        begins = [page.text_start, *(int(page.glyph_offsets_N[edge]) for edge in edges[1:]), page.text_end]
        found += [text[begin:end] for begin, end in itertools.pairwise(begins)]
    return found


def same(page, other, distance: int = 0) -> None:
    assert (page.text_start - distance, page.text_end - distance) == (other.text_start, other.text_end)
    assert page.num_lines == other.num_lines
    assert np.array_equal(page.image_HW, other.image_HW)
    assert np.array_equal(page.glyph_offsets_N - distance, other.glyph_offsets_N)
    assert np.array_equal(page.glyph_boxes_N4, other.glyph_boxes_N4)


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=ANY_TEXT, changes=ALL_FEATURES)
def test_any_unicode_is_drawn_within_the_margins_and_maps_back(text, changes):
    pages = Renderer(dataclasses.replace(SMALL, **changes)).pages(text)
    assert text_of(pages, text) == text
    for page in pages:
        boxes = page.glyph_boxes_N4
        assert (boxes[:, 0] >= 3).all()
        assert (boxes[:, 2] <= 95).all()
        assert (boxes[:, 1] >= 2).all()
        assert (boxes[:, 3] <= 44).all()
        assert (boxes[:, 0] <= boxes[:, 2]).all()
        assert (np.diff(boxes[:, 1]) >= 0).all()


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=ANY_TEXT, more=ANY_TEXT, changes=ALL_FEATURES)
def test_full_pages_never_change_and_can_be_drawn_alone(text, more, changes):
    renderer = Renderer(dataclasses.replace(SMALL, **changes))
    before, after = renderer.pages(text), renderer.pages(text + more)
    for old, new in zip(before[:-1], after, strict=False):
        same(old, new)
    for number, page in enumerate(before[1:], start=1):
        for old, new in zip(before[number:], renderer.pages(text, start=page.text_start), strict=True):
            same(old, new)


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=ANY_TEXT, changes=ALL_FEATURES)
def test_the_extension_draws_what_numpy_draws(text, changes):
    renderer = Renderer(dataclasses.replace(SMALL, **changes))
    pages = renderer.pages(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "blit", None)
        for page, other in zip(pages, renderer.pages(text), strict=True):
            same(page, other)


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=ANY_TEXT, cuts=st.lists(st.integers(0, 300), max_size=5), changes=ALL_FEATURES)
def test_a_stream_gives_the_pages_of_the_whole(text, cuts, changes):
    renderer = Renderer(dataclasses.replace(SMALL, **changes))
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renderer_module, "STREAM_PIECE", 20)
        streamed = list(renderer.iter_stream(text[a:b] for a, b in itertools.pairwise(edges)))
    for page, other in zip(streamed, renderer.pages(text), strict=True):
        same(page, other)


@settings(max_examples=max(1, EXAMPLES // 3), deadline=None)
@given(
    words=st.lists(st.text(st.sampled_from("ab1,.;:!?-/()[]\"'%$中文。，；！？“”あァー שלום"), max_size=12), max_size=9)
)
def test_lines_end_where_annex_14_lets_them(words):
    text = " ".join(words)
    allowed = {0, len(text), *line_break_boundaries(text)}
    place = 0
    for line in lines(text):
        place += len(line)
        if place in allowed or place == len(text):
            continue
        # Only where no place of the line is allowed may a word be cut, at the margin.
        assert not any(edge in allowed for edge in range(place - len(line) + 1, place + 1))
        assert sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) * 6 > 92 - 12


def test_well_known_breaks():
    assert lines("path/to/some/file.txt") == ["path/to/some/", "file.txt"]
    assert lines("costs about $1,234.50 or more") == ["costs about ", "$1,234.50 or ", "more"]
    assert lines("一二三四五六“七八”九") == ["一二三四五六“七", "八”九"]
    assert lines("一二三四五六（七八）") == ["一二三四五六", "（七八）"]
    assert lines("abcdefg\u200bhijklmnopq") == ["abcdefg\u200b", "hijklmnopq"]
    assert lines("abcdefghijk (lmnop)") == ["abcdefghijk ", "(lmnop)"]
    assert lines("abcdefghijk\u2060-\u2060lmnop") == ["abcdefghijk\u2060-\u2060lmn", "op"], "a long word is cut"


def test_a_cut_leaves_grapheme_clusters_whole():
    found = lines("abcdefghijklmn👩\u200d🔬z", dataclasses.replace(SMALL, missing_glyphs="code"))
    assert found[0] == "abcdefghijklmn"


def test_letters_of_known_classes_are_what_uniseg_says():
    for character in "aZ9éЖשعकกあ中ー々“(\u00a0-/":
        assert annex_class(character) in range(13)
    assert annex_class("中") != annex_class("ー") != annex_class("a")


def test_tabs_end_at_the_next_stop():
    page = Renderer(SMALL).pages("a\tbb\tc")[0]
    assert page.glyph_boxes_N4[:, 0].tolist() == [3, 9, 27, 33, 39, 51]


def test_right_to_left_runs_stand_in_visual_order():
    renderer = Renderer(SMALL)
    page = renderer.pages("ab שלום cd")[0]
    lefts = page.glyph_boxes_N4[:, 0].tolist()
    assert lefts[:3] == [3, 9, 15]
    assert lefts[3:7] == [39, 33, 27, 21], "Hebrew letters go to the left"
    assert lefts[7:] == [45, 51, 57]
    assert page.glyph_offsets_N.tolist() == list(range(10)), "the map stays in the order of the text"
    hebrew = renderer.pages("(של)")[0]
    mirror = renderer.pages("(לש)", start=0)[0]
    assert hebrew.glyph_boxes_N4[:, 0].tolist() == [21, 15, 9, 3]
    assert (hebrew.image_HW[:, 3:9] != 255).any()
    assert not np.array_equal(hebrew.image_HW, mirror.image_HW)
    left_bracket = renderer.pages("(a")[0].image_HW[:, 3:9]
    assert np.array_equal(hebrew.image_HW[:, 3:9], left_bracket), "the line ends with a bracket that opens to the right"


@pytest.mark.skipif(importlib.util.find_spec("uharfbuzz") is None, reason="needs ocrmem[shaping]")
def test_arabic_letters_are_joined():
    plain = dataclasses.replace(PP_OCR_PAGE, layout="unicode", fallback_fonts=("dejavu-sans",))
    shaped = dataclasses.replace(plain, shaping="harfbuzz")
    text = "سلام, مرحبا بك"
    alone, joined = Renderer(plain).pages(text)[0], Renderer(shaped).pages(text)[0]
    assert text_of([joined], text) == text
    assert not np.array_equal(alone.image_HW, joined.image_HW)
    assert len(joined.glyph_offsets_N) == len(text) - 1, "lam and alef are one glyph"

    def gaps(page) -> int:
        ink = (page.image_HW[:48, : int(page.glyph_boxes_N4[:, 2].max())] < 128).any(axis=0)
        return int((np.diff(ink.astype(int)) == -1).sum())

    assert gaps(joined) < gaps(alone)
    english = "plain English, unchanged"
    same(Renderer(plain).pages(english)[0], Renderer(shaped).pages(english)[0])


def test_prose_is_the_same_with_and_without_the_shortcuts():
    """The tables that spare asking Annex 14 say what it says."""
    text = (
        "It was 5 p.m. (or 17:00) when she said: \"Well-known e-mail addresses—like a.b@c.de—cost $1,200.50, don't "
        'they?" Yes; see http://example.org/a/b?c=d&e=f#g [12]. 中文和 English 混排，价格是￥100。 ½ of it… '
    ) * 20
    allowed = {len(text), *line_break_boundaries(text)}
    place = 0
    for line in lines(text, PROSE):
        place += len(line)
        assert place in allowed
