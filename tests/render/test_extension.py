"""The compiled extension refuses what does not fit, and draws what numpy draws wherever the text is cut."""

import dataclasses
import importlib
import itertools
import os
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ocrmem.config.render import RenderSettings
from ocrmem.render import layout, native
from ocrmem.render.breaking import (
    ANNEX_TABLE,
    BREAK,
    SIMPLE_TABLE,
    SPACE,
    annex_breaks,
    simple_breaks,
)
from ocrmem.render.renderer import Renderer

needs_extension = pytest.mark.skipif(native.blit is None, reason="the extension is not built")
EXAMPLES = int(os.environ.get("OCRMEM_UNICODE_EXAMPLES", "100"))
PLAIN = RenderSettings(
    page_width=101, page_height=53, line_height=13, font_size=11, font="dejavu-sans", fallback_fonts=(), margin_left=3,
    margin_right=7, margin_top=2, margin_bottom=4,
)  # fmt: skip
TEXTS = st.text(st.sampled_from("abcde fgh  .,-/(\"'\n\tWm¼中。“”אבxyz e\u0301\u200b\U0001f600"), max_size=400)


def drawing(**changes):
    """Arguments for `draw`: two lines of three glyphs on a page of 40 × 20 pixels."""
    given = {
        "image": np.zeros((20, 40), dtype=np.uint8),
        "boxes": np.zeros((4, 3), dtype=np.int32),
        "stops": np.array([2, 3]),
        "begins": np.array([0, 5]),
        "tops": np.array([1, 9]),
        "ids": np.array([0, 1, 0], dtype=np.int32),
        "widths": np.array([7, 19, 7], dtype=np.int32),
        "places": np.array([[0, 7], [16 * 8, 19]]),
        "pixels": np.full(16 * 8 * 3, 9, dtype=np.uint8),
        "page_width": 40,
        "height": 8,
        "left": 2,
        "right": 36,
        "background": 200,
    }
    return {**given, **changes}


@needs_extension
def test_a_page_is_glyphs_on_background():
    values = drawing()
    native.blit.draw(*values.values())
    expected = np.full((20, 40), 200, dtype=np.uint8)
    expected[1:9, 2:28] = expected[9:17, 7:14] = 9
    assert np.array_equal(values["image"], expected)
    assert values["boxes"].T.tolist() == [[2, 1, 9, 9], [9, 1, 28, 9], [7, 9, 14, 17]]


@needs_extension
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stops", np.array([2, 4])),
        ("begins", np.array([0, 35])),
        ("begins", np.array([0, -1])),
        ("begins", np.array([0, 2**63 - 1])),
        ("tops", np.array([1, 8])),
        ("tops", np.array([1, 13])),
        ("tops", np.array([-1, 9])),
        ("tops", np.array([1, 2**63 - 1])),
        ("ids", np.array([0, 2, 0], dtype=np.int32)),
        ("ids", np.array([0, -1, 0], dtype=np.int32)),
        ("widths", np.array([7, 20, 7], dtype=np.int32)),
        ("widths", np.array([-1, 19, 7], dtype=np.int32)),
        ("places", np.array([[0, 7], [16 * 8 + 1, 19]])),
        ("places", np.array([[-1, 7], [16 * 8, 19]])),
        ("places", np.array([[0, 7], [2**63 - 1, 19]])),
        ("page_width", 0),
        ("page_width", 2**62),
        ("height", 0),
        ("height", 21),
        ("left", -1),
        ("right", 41),
        ("right", 1),
    ],
)
def test_what_does_not_fit_the_page_is_refused(name, value):
    with pytest.raises(ValueError, match="a line or a glyph does not fit the page"):
        native.blit.draw(*drawing(**{name: value}).values())


@needs_extension
@pytest.mark.parametrize("name", ["boxes", "begins", "tops", "widths"])
def test_arrays_that_are_too_short_are_named(name):
    value = drawing()[name]
    with pytest.raises(ValueError, match=rf"{name} holds \d+ bytes, expected at least \d+"):
        native.blit.draw(*drawing(**{name: value.ravel()[:-1].copy()}).values())


@needs_extension
def test_look_up_ends_at_the_first_character_that_is_not_simple():
    glyphs, facts = np.zeros(0x110000, dtype=np.int32), np.zeros((0x110000, 4), dtype=np.uint8)
    glyphs[ord("a")], glyphs[ord("中")], glyphs[ord("b")] = 0, 1, 2
    for letter, fact in (("a", (1, 3, 9, 0)), ("中", (1, 4, 5, 1)), ("b", (1, 0, 0, 0)), ("x", (2, 0, 0, 0))):
        facts[ord(letter)] = fact
    widths = np.array([5, 10], dtype=np.int32)

    def look_up(text: str, room: int = 9):
        out = [np.full(room, 77, dtype=kind) for kind in (np.int32, np.int32, np.uint8, np.uint8)]
        return *native.blit.look_up(text, glyphs, facts, widths, *out, 1), [array[:3].tolist() for array in out]

    assert look_up("a中x") == (2, True, [[0, 1, 77], [5, 10, 77], [3, 4, 77], [9, 5, 77]])
    assert look_up("aa") == (2, False, [[0, 0, 77], [5, 5, 77], [3, 3, 77], [9, 9, 77]])
    assert look_up("ab")[0] == 1, "a glyph that is not in the table of widths"
    assert look_up("\U0010ffff")[0] == 0
    assert look_up("")[0] == 0
    with pytest.raises(ValueError, match="ids holds 8 bytes, expected at least 12"):
        look_up("aaa", room=2)
    with pytest.raises(ValueError, match="glyphs holds 4 bytes, expected at least 4456448"):
        native.blit.look_up("a", glyphs[:1], facts, widths, *(np.zeros(4, dtype=np.int32) for _ in range(4)), 1)


@needs_extension
@settings(max_examples=EXAMPLES, deadline=None)
@given(classes=st.lists(st.integers(0, 12), min_size=1, max_size=40), width=st.integers(1, 9))
@pytest.mark.parametrize("annex", [False, True])
def test_lines_end_where_the_tables_of_all_breaks_say(annex, classes, width):
    """One glyph is one pixel wide; each line's end is looked for among all places at once."""
    pairs = np.array(classes, dtype=np.uint8)
    if not annex:
        pairs %= 6
    places, known = annex_breaks(pairs) if annex else (simple_breaks(pairs), None)
    spaces = np.full_like(pairs, 255)  # no class is that of a space or a line break here
    count, ones = len(pairs), np.ones(len(pairs), dtype=np.int32)
    table = ANNEX_TABLE if annex else SIMPLE_TABLE
    rows = np.zeros((64, 4), dtype=np.int64)
    first = 0
    while first < count:
        num_lines, end, _, base, stop, asks = native.blit.break_lines(
            ones, ones, spaces, pairs, table, rows[:1], -1, width, 0, True, annex, SPACE, BREAK, first, False
        )
        fits = min(first + width, count)
        before = [(place, True if known is None else known[number]) for number, place in enumerate(places.tolist())]
        before = [(place, sure) for place, sure in before if first < place <= fits]
        sure_ones = [place for place, sure in before if sure]
        expected = fits if fits == count or not before else before[-1][0]
        if fits < count and annex and not (before and before[-1][1]):
            last_known = max(sure_ones, default=first)
            assert (num_lines, base, stop) == (0, last_known, fits)
            assert asks == any(place > last_known for place, _ in before)
            first = fits
        else:
            assert num_lines == 1
            assert rows[0].tolist() == [first, expected, 0, 0]
            assert end == expected
            first = end


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    text=TEXTS,
    chunk=st.integers(1, 60),
    plain=st.sampled_from(["as built", "numpy alone"]),
    changes=st.fixed_dictionaries(
        {
            "layout": st.sampled_from(["simple", "unicode"]),
            "line_breaks": st.sampled_from(["keep", "mark"]),
            "space_after": st.sampled_from([0, 4]),
            "alignment": st.sampled_from(["left", "justify"]),
            "cell_width": st.sampled_from([None, 6]),
            "font_size": st.sampled_from([11, 40]),
        }
    ),
)
def test_pages_do_not_depend_on_where_the_text_is_cut(text, chunk, plain, changes):
    renderer = Renderer(dataclasses.replace(PLAIN, **changes))
    with pytest.MonkeyPatch.context() as patch:
        whole = renderer.pages(text)
        patch.setattr(layout, "CHUNK", chunk)
        patch.setattr(layout, "LINES_AT_ONCE", 2)
        if plain == "numpy alone":
            patch.setattr(native, "blit", None)
        for page, other in itertools.zip_longest(whole, renderer.pages(text)):
            assert (page.text_start, page.text_end, page.num_lines) == (
                other.text_start,
                other.text_end,
                other.num_lines,
            )
            assert np.array_equal(page.image_HW, other.image_HW)
            assert np.array_equal(page.glyph_offsets_N, other.glyph_offsets_N)
            assert np.array_equal(page.glyph_boxes_N4, other.glyph_boxes_N4)


@pytest.mark.parametrize("found", [types.ModuleType("_blit"), types.SimpleNamespace(INTERFACE=1), None])
def test_an_extension_of_another_version_is_left_alone(monkeypatch, found):
    import ocrmem.render

    monkeypatch.setitem(sys.modules, "ocrmem.render._blit", found)
    monkeypatch.setattr(ocrmem.render, "_blit", found, raising=False)
    if found is None:
        monkeypatch.delattr(ocrmem.render, "_blit")
    before = native.blit
    try:
        assert importlib.reload(native).blit is None
    finally:
        native.blit = before
