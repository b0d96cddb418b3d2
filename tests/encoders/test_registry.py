"""Encoders are found by name; a wrong name or setting is met with the nearest."""

import pytest

from ocrmem.config.encoder import EncoderSettings
from ocrmem.encoders.base import OCREncoder
from ocrmem.encoders.registry import build_encoder, encoder_class, encoder_names
from ocrmem.errors import ConfigError


def test_both_encoders_are_registered():
    assert {"pp-ocr", "deepseek-ocr"} <= set(encoder_names())
    assert issubclass(encoder_class("deepseek-ocr"), OCREncoder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EncoderSettings(name="pp_ocr"), "unknown encoder 'pp_ocr'. Did you mean 'pp-ocr'?"),
        (EncoderSettings(name="tesseract"), "unknown encoder 'tesseract'. Known: deepseek-ocr, pp-ocr"),
        (EncoderSettings(settings={"step_per_token": 2}), "Did you mean 'steps_per_token'?"),
        (EncoderSettings(settings={"steps_per_token": 0}), "steps_per_token=0: expected 1 or more"),
        (
            EncoderSettings(name="deepseek-ocr", settings={"features": "clip"}),
            "encoder.settings.features='clip'",
        ),
        (EncoderSettings(name="deepseek-ocr", settings={"page_size": 800}), "encoder.settings.page_size=800"),
    ],
)
def test_wrong_names_are_met_with_the_nearest(settings, message):
    with pytest.raises(ConfigError) as caught:
        build_encoder(settings, load_weights=False, device="meta")
    assert message in str(caught.value)
