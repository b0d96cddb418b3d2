"""The renderer: every character has its place, full pages never change, nothing vanishes silently."""

import dataclasses
import hashlib
import logging
import subprocess
import sys
import time
import tracemalloc
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ocrmem.config.render import PP_OCR_PAGE, RenderSettings, deepseek_ocr_page
from ocrmem.errors import ConfigError, RenderError
from ocrmem.render import native
from ocrmem.render.files import save_png
from ocrmem.render.renderer import Renderer, render_identity

# Bundled fonts alone: characters they lack become boxes, and nothing has to be fetched.
CELLS = dataclasses.replace(PP_OCR_PAGE, fallback_fonts=("dejavu-sans",))
SQUARE = dataclasses.replace(deepseek_ocr_page(512), fallback_fonts=())
SMALL = RenderSettings(
    page_width=100, page_height=48, line_height=12, font_size=10, cell_width=6, fallback_fonts=(), margin_left=3,
    margin_right=5, margin_top=2, margin_bottom=4,
)  # fmt: skip
CHAT = "user: Hello there! How are you — well-known “quotes”?\nassistant: Fine, thanks; gjpqy ÄÖÜ ñ. E = mc² ≥ 3×4\n"
GOLDEN = {
    "cells": "c3a1c53d35abbcd6f10b1139030ceaf3477bf372c10e81ebbbcf3405cf56db7c",
    "square": "8f7d0402b57900fb563ef03e3ced24e90f1d7f956e778234a07aae5692cdce88",
}
"""SHA-256 of the pages' bytes. A change needs a new RENDERER_VERSION."""
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=300)


def digest(renderer: Renderer, text: str) -> str:
    return hashlib.sha256(b"".join(page.image_HW.tobytes() for page in renderer.pages(text))).hexdigest()


def ink(page, background: int = 255) -> np.ndarray:
    return page.image_HW != background


@pytest.mark.parametrize(("name", "page"), [("cells", CELLS), ("square", SQUARE)])
def test_the_same_text_gives_the_same_bytes_everywhere(name, page):
    found = digest(Renderer(page), CHAT * 9)
    assert found == GOLDEN[name]
    code = (
        "import sys; sys.path.insert(0, 'tests/render'); import test_renderer as t;"
        f"print(t.digest(t.Renderer(t.{name.upper()}), t.CHAT * 9))"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == found


@pytest.mark.parametrize("breaks", ["keep", "mark"])
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_any_unicode_is_drawn_and_maps_back_to_its_place(breaks, text):
    page_settings = dataclasses.replace(SMALL, line_breaks=breaks)
    pages = Renderer(page_settings).pages(text)
    found = ""
    for page in pages:
        assert page.text_start == len(found)
        starts = [page.text_start, *page.glyph_offsets_N[1:].tolist()]
        found += "".join(text[start:end] for start, end in zip(starts, [*starts[1:], page.text_end], strict=True))
        boxes = page.glyph_boxes_N4
        assert (boxes[:, 0] >= 3).all()
        assert (boxes[:, 2] <= 95).all()
        assert (boxes[:, 1] >= 2).all()
        assert (boxes[:, 3] <= 44).all()
        assert (boxes[:, 0] <= boxes[:, 2]).all()
        assert 1 <= page.num_lines <= 3
    assert found == text


@pytest.mark.parametrize("breaks", ["keep", "mark"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab -中。e\u0301\n\t\u200bwxyz"), min_size=40, max_size=400), more=ANY_TEXT)
@example(text="aaaaaaaaaa-a。\taaaaaaa\t中\u0301aaaaaaaaaaaaaaaa", more="")
def test_full_pages_never_change(breaks, text, more):
    renderer = Renderer(dataclasses.replace(SMALL, line_breaks=breaks))
    before, after = renderer.pages(text), renderer.pages(text + more)
    for old, new in zip(before[:-1], after, strict=False):
        assert np.array_equal(old.image_HW, new.image_HW)
        assert (old.text_start, old.text_end) == (new.text_start, new.text_end)
    for number, page in enumerate(before[1:], start=1):
        for again, old in zip(renderer.pages(text, start=page.text_start), before[number:], strict=True):
            assert np.array_equal(again.image_HW, old.image_HW)
            assert np.array_equal(again.glyph_offsets_N, old.glyph_offsets_N)


@pytest.mark.parametrize("way", ["as built", "numpy alone"])
def test_no_line_begins_with_a_mark(way, monkeypatch):
    """Neither where a base and its mark are boxes side by side, nor where a long word is cut."""
    if way == "numpy alone":
        monkeypatch.setattr(native, "blit", None)
    renderer = Renderer(SMALL)
    for text in ("a" * 12 + "中\u0301" + "b" * 9, "中\u0301" * 9, "a中" + "\u0301a", "a" * 10 + "ก\u0e31\u0e48"):
        for page in renderer.pages(text):
            firsts = page.glyph_offsets_N[np.flatnonzero(np.diff(page.glyph_boxes_N4[:, 1], prepend=-1))]
            assert not any(unicodedata.category(text[first])[0] == "M" for first in firsts.tolist())
    wider = "𠀀" + "\u0f71" * 40  # a cluster of boxes that is longer than a page is cut, and goes on in the same way
    pages = renderer.pages(wider + "中" * 9)
    assert len(pages) > 3
    for number, page in enumerate(pages):
        for again, old in zip(renderer.pages(wider + "中" * 9, start=page.text_start), pages[number:], strict=True):
            assert np.array_equal(again.image_HW, old.image_HW)


def test_empty_and_blank_texts():
    assert Renderer(SMALL).pages("") == []
    (page,) = Renderer(SMALL).pages("  ")
    assert not ink(page).any()
    assert page.num_lines == 1


def test_words_are_wrapped_and_long_ones_split():
    def lines(text: str) -> list[str]:
        page = Renderer(dataclasses.replace(SMALL, fallback_fonts=("noto-sans-sc",))).pages(text)[0]
        tops = page.glyph_boxes_N4[:, 1]
        ends = np.append(page.glyph_offsets_N[1:], page.text_end)
        rows = {}
        for top, start, end in zip(tops.tolist(), page.glyph_offsets_N.tolist(), ends.tolist(), strict=True):
            rows[top] = rows.get(top, "") + text[start:end]
        return list(rows.values())

    assert lines("hello wonderful world") == ["hello wonderful ", "world"]
    assert lines("well-known things") == ["well-known ", "things"]
    assert lines("abcdefghijklmnopqrstuvwxyz") == ["abcdefghijklmno", "pqrstuvwxyz"]
    assert lines("a\nb\r\nc") == ["a\n", "b\r\n", "c"]
    assert lines("一二三四五六七。八") == ["一二三四五六", "七。八"], "no line starts with closing punctuation"
    assert lines("abcd efghij\u00a0klmnop") == ["abcd ", "efghij\u00a0klmnop"], "no break at a no-break space"


def test_a_marked_line_break_is_visible_and_the_line_goes_on():
    marked = dataclasses.replace(SMALL, line_breaks="mark")
    (page,) = Renderer(marked).pages("ab\ncd")
    assert page.num_lines == 1
    assert np.array_equal(page.image_HW, Renderer(marked).pages("ab»cd")[0].image_HW)


def test_wide_characters_take_two_cells_and_tabs_four():
    page = Renderer(SMALL).pages("a中\tb")[0]
    left, right = page.glyph_boxes_N4[:, 0], page.glyph_boxes_N4[:, 2]
    assert (right - left).tolist()[0] == 6
    assert (right - left).tolist()[2:] == [24, 6]
    fetched = Renderer(dataclasses.replace(PP_OCR_PAGE, fallback_fonts=("noto-sans-sc",)))
    boxes = fetched.pages("中文 ok")[0].glyph_boxes_N4
    assert (boxes[:, 2] - boxes[:, 0]).tolist() == [20, 20, 10, 10, 10]
    assert not fetched.missing


def test_combining_marks_are_composed_or_drawn_over_their_base():
    renderer = Renderer(CELLS)
    composed, decomposed = renderer.pages("caf\u00e9"), renderer.pages("cafe\u0301")
    assert np.array_equal(composed[0].image_HW, decomposed[0].image_HW)
    assert decomposed[0].glyph_offsets_N.tolist() == [0, 1, 2, 3]
    base, marked = renderer.pages("x")[0], renderer.pages("x\u0301")[0]
    assert ink(marked).sum() > ink(base).sum()
    assert np.array_equal(marked.image_HW[24:, :10], base.image_HW[24:, :10]), "the base itself is as without a mark"
    assert len(marked.glyph_offsets_N) == 1
    assert not renderer.missing


def test_invisible_characters_are_not_drawn_and_belong_to_the_glyph_before():
    renderer = Renderer(CELLS)
    page = renderer.pages("\ufeffze\u200bro\u202e\u2066\ufe0f\u00ad!")[0]
    assert np.array_equal(page.image_HW, renderer.pages("zero!")[0].image_HW)
    assert page.glyph_offsets_N.tolist() == [1, 2, 4, 5, 10]
    assert not renderer.missing


def test_what_no_font_has_is_a_box_that_is_counted(caplog):
    renderer = Renderer(CELLS)
    with caplog.at_level(logging.WARNING):
        page = renderer.pages("a\x00b\ud800c\ue000\ue000")[0]
    assert renderer.missing == {"\x00": 1, "\ud800": 1, "\ue000": 2}
    assert [record.getMessage() for record in caplog.records] == [
        "4 characters of 3 kinds have no glyph in dejavu-sans-mono, dejavu-sans: U+E000 ×2, U+0000 ×1, U+D800 ×1; "
        "they are drawn as boxes with their code points"
    ]
    left, top, right, bottom = page.glyph_boxes_N4[1]
    assert ink(page)[top:bottom, left:right].sum() > 100
    other = renderer.pages("a\x01b")[0]
    assert not np.array_equal(other.image_HW[:48, 10:30], page.image_HW[:48, 10:30]), "the code point can be read"


def test_fallback_fonts_are_tried_in_order():
    assert Renderer(CELLS).missing == {}
    renderer = Renderer(CELLS)
    renderer.pages("😀")  # in DejaVu Sans, not in its monospaced sister
    assert not renderer.missing
    alone = Renderer(dataclasses.replace(CELLS, fallback_fonts=()))
    alone.pages("😀")
    assert alone.missing == {"😀": 1}


def test_margins_and_colours():
    page_settings = dataclasses.replace(SMALL, foreground=200, background=10)
    page = Renderer(page_settings).pages("MMMMMMMMMMMMMMMMMMMM ggggg\nggg")[0]
    assert page.image_HW.min() == 10
    assert page.image_HW.max() > 150
    for margin in (page.image_HW[:2], page.image_HW[44:], page.image_HW[:, :3], page.image_HW[:, 95:]):
        assert (margin == 10).all()


def test_descenders_and_accents_are_whole():
    taller = dataclasses.replace(CELLS, line_height=96, page_height=96)
    low = ink(Renderer(CELLS).pages("gjpqy|ÅÉŞ")[0])
    high = ink(Renderer(taller).pages("gjpqy|ÅÉŞ")[0])
    assert low.sum() == high.sum()


def test_a_line_of_a_million_characters_takes_time_in_proportion():
    renderer = Renderer(CELLS)
    times = []
    for size in (250_000, 1_000_000):
        started = time.perf_counter()
        count = sum(1 for _ in renderer.iter_pages("x" * size))
        times.append(time.perf_counter() - started)
        assert count == -(-size // 1024)
    assert times[1] < 12 * times[0]


def test_a_million_marks_on_one_base_are_one_cluster():
    (page,) = Renderer(CELLS).pages("e" + "\u0301" * 1_000_000)
    assert page.text_end == 1_000_001


def test_long_texts_need_the_memory_of_a_page():
    text = CHAT * 20_000
    renderer = Renderer(CELLS)
    tracemalloc.start()
    count = sum(1 for _ in renderer.iter_pages(text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 2000
    assert peak < 30e6


def test_pngs_are_what_was_drawn(tmp_path):
    page = Renderer(SMALL).pages(CHAT)[0]
    save_png(page, tmp_path / "page.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "page.png")), page.image_HW)
    assert [path.name for path in tmp_path.iterdir()] == ["page.png"]


def test_identity_knows_every_setting_and_needs_no_download():
    changes = [
        {"page_width": 768}, {"page_height": 96}, {"line_height": 50}, {"font_size": 30}, {"cell_width": 12},
        {"font": "dejavu-sans"}, {"fallback_fonts": ()}, {"margin_left": 1}, {"line_breaks": "keep"},
        {"foreground": 9}, {"background": 250},
    ]  # fmt: skip
    found = {render_identity(dataclasses.replace(PP_OCR_PAGE, **change)) for change in changes}
    assert len(found | {render_identity(PP_OCR_PAGE)}) == len(changes) + 1


def test_bad_fonts_and_settings_are_refused(tmp_path):
    with pytest.raises(RenderError, match="font 'comic' is neither bundled"):
        Renderer(dataclasses.replace(SMALL, font="comic"))
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font")
    with pytest.raises(RenderError, match=r"broken.ttf' is no readable font"):
        Renderer(dataclasses.replace(SMALL, font=str(broken)))
    for change, message in (
        ({"page_width": 0}, "page_width=0: expected a positive number of pixels"),
        ({"page_height": 10}, "has no room for one line"),
        ({"margin_left": 95}, "leaves 0 pixels for text"),
        ({"foreground": 256}, "foreground=256: expected a grey value"),
        ({"line_breaks": "drop"}, "line_breaks='drop': expected 'keep' or 'mark'"),
        ({"cell_width": 0}, "cell_width=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(SMALL, **change)
