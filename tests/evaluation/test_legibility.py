"""The default pages are read by the encoder's own OCR head, in English and in Chinese."""

import dataclasses

import pytest

from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.render import PP_OCR_PAGE
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import ConfigError
from ocrmem.evaluation.legibility import lines_of, load_text, measure, tune
from ocrmem.render.renderer import Renderer


@pytest.mark.slow
def test_the_default_preset_is_legible():
    encoder = build_encoder(EncoderSettings(name="pp-ocr"))
    english, chinese = measure(encoder, {"english": load_text("english"), "chinese": load_text("chinese")}, max_pages=2)
    assert english.recovered >= 0.985
    assert english.recovered_exactly >= 0.985
    assert chinese.recovered >= 0.97
    assert english.characters_per_token > 2 * 6


def test_lines_are_those_of_the_page():
    page_settings = dataclasses.replace(PP_OCR_PAGE, page_width=120, fallback_fonts=())
    text = "hello wonderful\nworld"
    (page,) = Renderer(page_settings).pages(text)
    assert lines_of(page, text) == ["hello ", "wonderful»", "world"]


def test_an_encoder_without_a_head_cannot_be_measured():
    with pytest.raises(ConfigError, match="encoder 'deepseek-ocr' has no OCR head to read pages with"):
        next(tune(EncoderSettings(name="deepseek-ocr"), {"a": "b"}, {"line_height": [14]}))
