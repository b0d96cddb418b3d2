"""`layout="unicode"`: line breaking, tabs, right-to-left runs and shaping; the map still goes back to the text."""

import dataclasses
import importlib.util
import itertools
import os
import unicodedata

import numpy as np
import pytest
from bidi import get_display
from hypothesis import given, settings
from hypothesis import strategies as st
from uniseg.linebreak import line_break_boundaries

from ocrmem.config.render import PP_OCR_PAGE, RenderSettings, deepseek_ocr_page
from ocrmem.render import native
from ocrmem.render import renderer as renderer_module
from ocrmem.render.bidi import embedding_levels, first_strong, visual_order
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
    "ab 1,.-/(\"'\t\n中。あァー가שלוםمرحبا١\u0301\u05b0\u064e\u200b\u00ad\u200d👩🔬🇩🇪"
    "\u202a\u202e\u202c\u2066\u2067\u2068\u2069\u200f\U0001f3fdक्षิ\r\u2028«»“”…$%"
)
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=300), st.text(st.sampled_from(SCRIPTS), max_size=300)
)
ALL_FEATURES = st.fixed_dictionaries(
    {
        "line_breaks": st.sampled_from(["keep", "mark"]),
        "alignment": st.sampled_from(["start", "left", "right", "center", "justify"]),
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
    left = Renderer(dataclasses.replace(SMALL, alignment="left"))
    hebrew = left.pages("(של)")[0]
    mirror = left.pages("(לש)", start=0)[0]
    assert hebrew.glyph_boxes_N4[:, 0].tolist() == [21, 15, 9, 3]
    assert (hebrew.image_HW[:, 3:9] != 255).any()
    assert not np.array_equal(hebrew.image_HW, mirror.image_HW)
    left_bracket = left.pages("(a")[0].image_HW[:, 3:9]
    assert np.array_equal(hebrew.image_HW[:, 3:9], left_bracket), "the line ends with a bracket that opens to the right"


def test_right_to_left_paragraphs_stand_at_the_right():
    text = "12 שלום abc def ghi jkl mno\nשלום\nabc שלום"
    page_settings = dataclasses.replace(SMALL, page_height=96)

    def edges(**changes) -> list[tuple[int, int]]:
        page = Renderer(dataclasses.replace(page_settings, **changes)).pages(text)[0]
        found, marked = [], "line_breaks" in changes
        for top in np.unique(page.glyph_boxes_N4[:, 1]):
            letters = np.array(
                [text[offset] != " " and (marked or text[offset] != "\n") for offset in page.glyph_offsets_N.tolist()]
            )
            boxes = page.glyph_boxes_N4[letters & (page.glyph_boxes_N4[:, 1] == top)]
            ink = np.flatnonzero((page.image_HW[top : top + 12] != 255).any(axis=0))
            assert boxes[:, 0].min() <= ink.min() <= ink.max() < boxes[:, 2].max()
            found.append((int(boxes[:, 0].min()), int(boxes[:, 2].max())))
        return found

    assert edges() == [(5, 95), (29, 95), (71, 95), (3, 51)], "the second line, Latin alone, is in the first paragraph"
    assert edges(alignment="left") == [(3, 93), (3, 69), (3, 27), (3, 51)]
    assert edges(first_indent=6)[2:] == [(65, 89), (9, 57)], "the first line of a paragraph is indented at its start"
    assert edges(alignment="justify") == [(3, 95), (29, 95), (71, 95), (3, 51)], (
        "last lines of paragraphs stand at the start"
    )
    assert edges(alignment="center")[2:] == [(37, 61), (25, 73)]
    assert [left for left, _ in edges(line_breaks="mark")] == [3, 3, 3], "a line of several paragraphs is in none"


def test_a_right_to_left_line_is_justified():
    page = Renderer(dataclasses.replace(SMALL, alignment="justify")).pages("שלום שלום שלם שלום שלום")[0]
    first = page.glyph_boxes_N4[page.glyph_boxes_N4[:, 1] == 2]
    assert (first[:, 0].min(), first[:, 2].max()) == (3, 95)
    assert (np.diff(first[:13, 0]) < 0).all(), "from the right to the left"


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("abc\u202edef\u202cg", "abcfedg"),
        ("\u202babc שלום\u202c de", "םולש abc de"),
        ("שלום \u2066ab (ש)\u2069 ל", "ל ab (ש) םולש"),
        ("ab \u2068של 12\u2069 34", "ab 12 לש 34"),
        ("ab של\u200e 12", "ab לש 12"),
        ("ab של 12", "ab 12 לש"),
        ("\u2067ab\n\u202dשל", "ab\nשל"),
        ("\u202dשלום שלום שלום שלום", "שלום שלום שלום שלום"),
        ("C++ (שלום abc)", "C++ (םולש abc)"),
        ("ש C++ (a)", "C++ (a) ש"),
    ],
)
def test_controls_of_direction_take_effect_and_are_not_drawn(text, order):
    renderer = Renderer(SMALL)
    (page,) = renderer.pages(text)
    assert not renderer.missing
    offsets, boxes = page.glyph_offsets_N.tolist(), page.glyph_boxes_N4
    assert offsets == sorted(offsets)
    by_place = sorted(range(len(offsets)), key=lambda n: (boxes[n, 1], boxes[n, 0] if text[offsets[n]] != "\n" else 99))
    mirrored = {"(": ")", ")": "("}
    found = "".join(text[offsets[n]] for n in by_place)
    assert found == order or "".join(mirrored.get(c, c) for c in found) == order
    assert text_of([page], text) == text


BIDI = st.text(
    st.sampled_from(
        "abאבمر 12١,.-+()[]<>:/%$\u0301\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f!"
    ),
    max_size=30,
)


@settings(max_examples=10 * EXAMPLES, deadline=None)
@given(text=BIDI)
def test_the_order_is_that_of_another_implementation(text):
    """python-bidi's own `get_display`, in Rust, which knows isolates and brackets, but gives no levels."""
    base = first_strong(text) or 0
    levels = embedding_levels(text, base)
    hidden = ("LRE", "RLE", "LRO", "RLO", "PDF", "BN", "LRI", "RLI", "FSI", "PDI")
    places = [n for n, character in enumerate(text) if unicodedata.bidirectional(character) not in hidden]
    order = [places[n] for n in visual_order(text, levels, places, base)]
    theirs = get_display(text, base_dir="LR"[base])
    assert "".join(text[n] for n in order) == "".join(c for c in theirs if unicodedata.bidirectional(c) not in hidden)


def test_a_paragraph_keeps_its_direction_on_the_next_page_and_in_a_stream():
    text = "שלום \u202e" + "abc def " * 60 + "\nabc\n"
    renderer = Renderer(SMALL)
    pages = renderer.pages(text)
    assert len(pages) > 4
    assert all(page.glyph_boxes_N4[:, 2].max() == 95 for page in pages[:-1])
    fresh = Renderer(SMALL).pages(text, start=pages[2].text_start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renderer_module, "STREAM_PIECE", 20)
        streamed = list(Renderer(SMALL).iter_stream(text[n : n + 7] for n in range(0, len(text), 7)))
    for number, page in enumerate(pages):
        same(streamed[number], page)
        if number >= 2:
            same(fresh[number - 2], page)


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
