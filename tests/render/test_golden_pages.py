"""The pages that shipped adapters were trained on never change: not a pixel, not a place in the character map."""

import dataclasses
import hashlib
import random

import pytest

from ocrmem.config.render import PP_OCR_PAGE, RenderSettings, deepseek_ocr_page
from ocrmem.render import native
from ocrmem.render.renderer import Renderer, render_identity

TWO_X = dataclasses.replace(PP_OCR_PAGE, page_width=1536, page_height=384, cell_width=11)
"""The pages of the adapters that were shipped first."""
PRESETS = {
    "two-x": TWO_X,
    "shipped": dataclasses.replace(PP_OCR_PAGE, page_width=1728, page_height=384, cell_width=12),
    "pp-ocr": PP_OCR_PAGE,
    "pp-ocr-keep": dataclasses.replace(PP_OCR_PAGE, line_breaks="keep"),
    "deepseek-1024": deepseek_ocr_page(1024),
}
KINDS = (
    "user: assistant: the of well-known e-mail 0x9f3c21 349.50 (paren) [x] {y} path/to/file.py a=b; don't “quoted” "
    "café naïve cafe\u0301 x\u0301 Ελληνικά Привет 中文也要读。 日本語、テキスト ￥100 50% — … · ½ mc² ≥ 3×4 → 한국어 "
    "😀 🚀 👩\u200d🔬 a\u200bb \ufeff \u00ad \u00a0 \tdef \x07 \ue000 \ud800 ---- looooooooooooooooooooooooooooooong, "
    "http://example.org/a?b=c#d £5 'tis #hash @at ~tilde $9 ^ * + _ | \\ ` \" ! ? : ;"
)
WORDS = KINDS.split(" ")


def held_text(count: int = 3000) -> str:
    """Words of every kind in a fixed random order, with line breaks of every kind between some of them."""
    chance = random.Random(6)
    joints = [" "] * 12 + ["\n", "  ", "\n\n", "\r\n", "\u2028", "\n    ", ". ", ", "]
    return "".join(chance.choice(WORDS) + chance.choice(joints) for _ in range(count))


GOLDEN = {
    "two-x": "210fc736147ee8dd4e6b05ce20444481ad81e581cdcf74ad533e9d05cc40baf4",
    "shipped": "6ecabc74edd5268c5ebcf0afc49f1049672e12a6516f9c6181247c409bb96823",
    "pp-ocr": "a8aca8c0c2b069f3d8c9b326ed52c3fc2d8e044a0234259ad7f7a36c7a1432bf",
    "pp-ocr-keep": "5c0602e81e01997936fde7455bc790b8c55a685d229c5ae1aef425d2659cdc6e",
    "deepseek-1024": "9a5dc91cd4af8e6e9a42c9cb82df39888d53c855f1f6ed8235a6e74f4ccd0c07",
}
ENGLISH = {
    "two-x": "779442f03ae9defe41f542ac2bd727bd6f8167e69bf32bf0dea73b21d4e48147",
    "shipped": "88d166686558a021d7c2b329b77957928ba9e6845785d69ce7eb2e4991806e1e",
    "pp-ocr": "70bf6e13ea22a08be37594f199f1d636e51b1ad2297a7934dd8ee0412cdf7730",
    "pp-ocr-keep": "867bff25725dd0afd0b60ef50b464a302c33fb7224df598571f874ecaee811d3",
    "deepseek-1024": "f3f0b2a699eeeb3f0bb4c4c00ae140823af4727bb6ed046eb4ff4abf4e669379",
}
IDENTITY = {
    "two-x": "3f70f1b784e84603b0785c4945dde9b8dde52344cccc1adfb94eadd3251acf77",
    "shipped": "b7fb7c8c52ef3bc36e76266747fa406081cbdb83d033a1c1678371ab5c1eadd1",
    "pp-ocr": "e417e67840a8f1923bdfd13bac424cf365b1b2cc309be0077b8cd5e3c545652c",
    "pp-ocr-keep": "0d770c8aebf4eb39ba5644ddc091201b46fd32bcc27abfabafbfe827eb285a10",
    "deepseek-1024": "78b755e3b6130f7492ff46366744f60f4fc4ebee2f390447e4dcce9f93a6eebb",
}


def digest(settings: RenderSettings, text: str) -> str:
    """SHA-256 of every byte of every page and of its map."""
    total = hashlib.sha256()
    for page in Renderer(settings).iter_pages(text):
        total.update(f"{page.text_start} {page.text_end} {page.num_lines}\n".encode())
        for array, kind in ((page.image_HW, "u1"), (page.glyph_offsets_N, "<i8"), (page.glyph_boxes_N4, "<i4")):
            total.update(f"{array.shape}".encode() + array.astype(kind).tobytes())
    return total.hexdigest()


@pytest.fixture(params=["as built", "numpy alone"], autouse=True)
def way_to_draw(request, monkeypatch):
    """Pages are the same with the compiled extension, where it was built, and without."""
    if request.param == "numpy alone":
        monkeypatch.setattr(native, "blit", None)


@pytest.mark.parametrize("name", PRESETS)
def test_pages_and_maps_keep_their_bytes(name):
    assert digest(PRESETS[name], held_text()) == GOLDEN[name]


@pytest.mark.parametrize("name", PRESETS)
def test_plain_english_keeps_its_bytes(name):
    ascii_text = "".join(character for character in held_text(6000) if character.isascii() and character >= "\n")
    assert digest(PRESETS[name], ascii_text) == ENGLISH[name]


@pytest.mark.parametrize("name", PRESETS)
def test_caches_made_before_are_still_found(name):
    assert render_identity(PRESETS[name]) == IDENTITY[name]
