"""Texts without end, lines without a break, broken fonts and pages without room."""

import dataclasses
import time
import tracemalloc

import numpy as np
import pytest
from fontTools import subset
from fontTools.ttLib import TTCollection, TTFont

from ocrmem.config.render import PP_OCR_PAGE, RenderSettings, deepseek_ocr_page
from ocrmem.errors import ConfigError, RenderError
from ocrmem.render.fonts import FOLDER
from ocrmem.render.renderer import Renderer

UNICODE = dataclasses.replace(PP_OCR_PAGE, layout="unicode", fallback_fonts=("dejavu-sans",))
SANS = FOLDER / "DejaVuSans.ttf"
MONO = FOLDER / "DejaVuSansMono.ttf"


def test_a_long_stream_needs_the_memory_of_a_piece():
    renderer = Renderer(dataclasses.replace(deepseek_ocr_page(512), layout="unicode", fallback_fonts=()))
    piece = "user: What is the plan — for today?\nassistant: Let's see; first the train, then naïve art.\n" * 1000
    sizes = []
    for count in (3, 15):
        tracemalloc.start()
        end = 0
        for page in renderer.iter_stream(piece for _ in range(count)):
            assert page.text_start == end
            end = page.text_end
        sizes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert end == count * len(piece)
    assert sizes[1] < 40e6
    assert sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize(
    "unit", ["x", "中", "a-", "\t", " ", "א", "ب", "\u200b", "e\u0301", "/", "\u200d\U0001f469", "(", "\r"]
)
@pytest.mark.parametrize("layout", ["simple", "unicode"])
def test_a_long_line_without_a_break(layout, unit):
    renderer = Renderer(dataclasses.replace(UNICODE, layout=layout))
    started = time.perf_counter()
    text = unit * (100_000 // len(unit))
    end = 0
    for page in renderer.iter_pages(text):
        assert page.text_start == end
        end = page.text_end
    assert end == len(text)
    assert time.perf_counter() - started < 20


def test_a_truncated_font_is_refused(tmp_path):
    whole = SANS.read_bytes()
    for length in (0, 3, 12, 100, 4000, 200_000):
        path = tmp_path / f"cut-{length}.ttf"
        path.write_bytes(whole[:length])
        with pytest.raises(RenderError, match=rf"cut-{length}.ttf' is no readable font"):
            Renderer(dataclasses.replace(UNICODE, font=str(path)))


def test_a_collection_is_read_by_number(tmp_path):
    collection = TTCollection()
    collection.fonts = [TTFont(SANS), TTFont(MONO)]
    path = tmp_path / "both.ttc"
    collection.save(path)
    settings = dataclasses.replace(deepseek_ocr_page(512), fallback_fonts=())
    text = "Which of the two?"

    def draw(font: str) -> np.ndarray:
        return Renderer(dataclasses.replace(settings, font=font)).pages(text)[0].image_HW

    assert np.array_equal(draw(str(path)), draw("dejavu-sans"))
    assert np.array_equal(draw(f"{path}#1"), draw("dejavu-sans-mono"))
    with pytest.raises(RenderError, match=r"both.ttc' is no readable font"):
        draw(f"{path}#2")


def test_a_font_without_the_letters_gives_boxes(tmp_path):
    font = TTFont(SANS)
    cutter = subset.Subsetter()
    cutter.populate(text="ab")
    cutter.subset(font)
    path = tmp_path / "two-letters.ttf"
    font.save(path)
    renderer = Renderer(dataclasses.replace(UNICODE, font=str(path), fallback_fonts=()))
    page = renderer.pages("a b c\tb")[0]
    assert renderer.missing == {" ": 2, "c": 1}
    assert page.text_end == 7


def test_pages_without_room_are_refused():
    good = {"page_width": 100, "page_height": 100, "line_height": 20, "font_size": 16}
    RenderSettings(**good)  # type: ignore[arg-type]
    for change, message in (
        ({"page_width": 0}, "page_width=0: expected a positive number of pixels"),
        ({"page_height": 0}, "page_height=0: expected a positive"),
        ({"page_height": -5}, "page_height=-5: expected a positive"),
        ({"line_height": 0}, "line_height=0: expected a positive"),
        ({"font_size": 0}, "font_size=0: expected a positive"),
        ({"margin_left": 50, "margin_right": 50}, "leaves 0 pixels for text"),
        ({"margin_top": 81}, "has no room for one line"),
        ({"first_indent": 99}, "leaves 100 pixels for text; at least 101 are needed"),
        ({"horizontal_scale": 0}, "horizontal_scale=0: expected a factor"),
        ({"cell_width": 6, "horizontal_scale": 0.9}, "both set the width of glyphs"),
        ({"wide_cell_width": 6}, "wide_cell_width=6 needs cell_width"),
        ({"alignment": "middle"}, "alignment='middle': expected 'start', 'left', 'right', 'center' or 'justify'"),
        ({"layout": "html"}, "layout='html': expected 'simple' or 'unicode'"),
    ):
        with pytest.raises(ConfigError, match=message):
            RenderSettings(**{**good, **change})  # type: ignore[arg-type]


def test_shaping_without_its_library_says_what_to_install(monkeypatch):
    import importlib

    def refuse(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(
        RenderError, match=r"needs the package uharfbuzz. Install it with `pip install 'ocrmem\[shaping\]'`"
    ):
        Renderer(dataclasses.replace(UNICODE, shaping="harfbuzz"))
