"""Pages a second: ocrmem's renderer beside ReportLab and Poppler, same text, font, size and page, one core, one run.

    pip install reportlab pdf2image    # and Poppler: apt-get install poppler-utils
    python benchmarks/render.py --out benchmarks/results/render.json

The reference is the usual path: ReportLab lays paragraphs out to a PDF, Poppler (by pdf2image) draws its pages, and
Pillow makes them grey and crops them. Chinese is set in Noto Sans SC, whose outlines are rewritten as TrueType first,
since ReportLab reads no others; that is not counted. Both paths draw a few pages before the clock starts.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import ImageOps

from ocrmem.assets.fetch import resolve
from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.render import PP_OCR_PAGE, RenderSettings
from ocrmem.encoders.registry import build_encoder
from ocrmem.memory.growing_pages import GrowingPages
from ocrmem.memory.pages import HistoryPages
from ocrmem.render import native
from ocrmem.render.fonts import font_path
from ocrmem.render.renderer import Renderer

PAGE = 1280
MARGIN = 8
POINTS = 9
SECONDS = 1.0
"""The reference needs about as long for its pages."""
CHINESE = (
    "人类在漫长的历史中不断学习，文字记录了他们的思想和经验。今天，机器也能阅读这些文字，并且记住其中的内容！",
    "春天来了，河边的柳树发出新芽，孩子们在草地上放风筝，老人坐在长椅上谈论天气和收成。",
    "这座城市建于一千三百年前，城墙高十二米，周长约十四公里，至今仍然保存完好。",
    "科学家说，海洋的温度在过去五十年里上升了零点六度，许多鱼类因此向北迁移。",
)


def settings_at(dpi: int, font: str) -> RenderSettings:
    """1,280 × 1,280 pixels at 9 points, with lines 1.2 times as high."""
    size = round(POINTS * dpi / 72)
    return RenderSettings(
        page_width=PAGE, page_height=PAGE, margin_left=MARGIN, margin_right=MARGIN, margin_top=MARGIN,
        margin_bottom=MARGIN, font=font, fallback_fonts=(), font_size=size, line_height=round(1.2 * size),
        layout="unicode",
    )  # fmt: skip


def english() -> str:
    """Held-out prose as paragraphs, without the few characters that DejaVu Sans lacks."""
    with (Path(resolve("long-prose")) / "heldout.jsonl").open(encoding="utf-8") as file:
        text = "\n".join(json.loads(line)["text"] for line in file)
    return "".join(character for character in text if character.isprintable() or character == "\n")


def chinese() -> str:
    """Paragraphs of a few hundred characters."""
    return "".join("".join(CHINESE[(i + j) % 4] for j in range(3 + i % 7)) + "\n" for i in range(4000))


def truetype(source: Path, characters: str, target: Path) -> Path:
    """A font's glyphs for these characters, with quadratic outlines."""
    from fontTools import subset
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.cu2quPen import Cu2QuPen
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from fontTools.ttLib import TTFont

    font = TTFont(source)
    cutter = subset.Subsetter(subset.Options(notdef_outline=True, layout_features=[]))
    cutter.populate(text=characters + " ")
    cutter.subset(font)
    glyph_set, order = font.getGlyphSet(), font.getGlyphOrder()
    outlines = {}
    for name in order:
        pen = TTGlyphPen(None)
        glyph_set[name].draw(Cu2QuPen(pen, 1.0, reverse_direction=True))
        outlines[name] = pen.glyph()
    builder = FontBuilder(font["head"].unitsPerEm, isTTF=True)  # type: ignore[attr-defined]
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(font.getBestCmap())
    builder.setupGlyf(outlines)
    metrics = font["hmtx"].metrics  # type: ignore[attr-defined]
    builder.setupHorizontalMetrics({name: (metrics[name][0], 0) for name in order})
    head = font["hhea"]
    builder.setupHorizontalHeader(ascent=head.ascent, descent=head.descent)  # type: ignore[attr-defined]
    builder.setupNameTable({"familyName": "Noto Sans SC", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(target)
    return target


def reference(text: str, font_file: Path, settings: RenderSettings, dpi: int) -> list[np.ndarray]:
    """Grey pages by ReportLab, Poppler and Pillow."""
    from pdf2image import convert_from_bytes
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFont
    from reportlab.platypus import Frame, PageTemplate, Paragraph
    from reportlab.platypus.doctemplate import BaseDocTemplate

    name = font_file.stem
    if name not in pdfmetrics.getRegisteredFontNames():
        pdfmetrics.registerFont(TTFont(name, str(font_file)))
    unit = 72 / dpi
    side = settings.page_width * unit
    style = ParagraphStyle(
        "text", fontName=name, fontSize=settings.font_size * unit, leading=settings.line_height * unit,
        wordWrap="CJK" if "Noto" in name else None,
    )  # fmt: skip
    stream = io.BytesIO()
    document = BaseDocTemplate(stream, pagesize=(side, side))
    inner = side - 2 * MARGIN * unit
    frame = Frame(MARGIN * unit, MARGIN * unit, inner, inner, 0, 0, 0, 0)
    document.addPageTemplates([PageTemplate(frames=[frame])])
    lines = (line.replace("&", "&amp;").replace("<", "&lt;") for line in text.split("\n"))
    document.build([Paragraph(line, style) for line in lines if line])
    grey = [image.convert("L") for image in convert_from_bytes(stream.getvalue(), dpi=dpi)]
    return [np.asarray(image.crop(ImageOps.invert(image).getbbox())) for image in grey]


def rate(draw: Callable[[], int], *, seconds: float = 0.0) -> float:
    """Pages a second; what is drawn is drawn again until so much time is over."""
    pages, started = 0, time.perf_counter()
    while not pages or time.perf_counter() - started < seconds:
        pages += draw()
    return pages / (time.perf_counter() - started)


def spread(found: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(statistics.median(found), 2), "least": round(min(found), 2), "most": round(max(found), 2)}


def compare(name: str, text: str, font: str, dpi: int, folder: Path, *, reference_pages: int, runs: int) -> dict:
    """Both paths on the same text."""
    settings = settings_at(dpi, font)
    renderer = Renderer(settings)
    pages = renderer.pages(text)
    # The reference has this many pages of the text, so that it does not take minutes.
    part = text[: pages[reference_pages - 1].text_end]
    file = font_path(font)
    if file.suffix == ".otf":
        file = truetype(file, "".join(sorted(set(part))), folder / "NotoSansSC.ttf")
    reference(part[:2000], file, settings, dpi)
    extension = native.blit
    theirs, ours, numpy_alone = [], [], []
    for _ in range(runs):  # in turn, so that what else the machine does slows all of them
        theirs.append(rate(lambda: len(reference(part, file, settings, dpi))))
        ours.append(rate(lambda: sum(1 for _ in renderer.iter_pages(text)), seconds=SECONDS))
        native.blit = None
        numpy_alone.append(rate(lambda: sum(1 for _ in renderer.iter_pages(text)), seconds=SECONDS))
        native.blit = extension
    row = {
        "text": name,
        "dpi": dpi,
        "font": font,
        "font_pixels": settings.font_size,
        "line_pixels": settings.line_height,
        "characters_per_page": round(pages[-2].text_end / (len(pages) - 1)),
        "pages": len(pages),
        "reference_pages": len(reference(part, file, settings, dpi)),
        "reference_pages_per_second": spread(theirs),
        "pages_per_second": spread(ours),
        "pages_per_second_without_the_extension": spread(numpy_alone),
        "times_as_fast": spread([a / b for a, b in zip(ours, theirs, strict=True)]),
    }
    print(json.dumps(row), file=sys.stderr)
    return row


def appending(runs: int) -> dict:
    """What one more line costs in a history of 100 pages, against drawing its last page and all of it."""
    settings = settings_at(72, "dejavu-sans")
    renderer = Renderer(settings)
    text = english()
    while len(renderer.pages(text)) < 100:
        text += text
    hundred = text[: renderer.pages(text)[99].text_end - 2000]
    whole, more, last = [], [], []
    for number in range(runs):
        history = HistoryPages(renderer)
        started = time.perf_counter()
        pages = history.pages(hundred)
        whole.append(time.perf_counter() - started)
        grown = hundred + f"one more line, number {number}\n"
        started = time.perf_counter()
        history.pages(grown)
        more.append(time.perf_counter() - started)
        started = time.perf_counter()
        renderer.pages(hundred[pages[-1].text_start :])
        last.append(time.perf_counter() - started)
    values = {"all_pages": whole, "one_line_more": more, "last_page_alone": last}
    return {"pages": len(pages), **medians(values)}


def growing(runs: int) -> dict:
    """The same in a memory of 100 pages, which is told what is new and never sees the whole text again."""
    encoder = build_encoder(EncoderSettings())
    renderer, text = Renderer(encoder.page), english()
    while len(renderer.pages(text)) < 100:
        text += text
    hundred = text[: renderer.pages(text)[99].text_end - 200]
    more, last = [], []
    for number in range(runs):
        budget = 200 * encoder.tokens_per_page
        pages = GrowingPages(encoder, densities=[1.0], budget=budget, page_key=lambda text, identity: text)
        pages.append(hundred)
        started = time.perf_counter()
        pages.append(f"one more line, number {number}\n")
        more.append(time.perf_counter() - started)
        tail = pages.pages[-1].text
        started = time.perf_counter()
        renderer.pages(tail)
        last.append(time.perf_counter() - started)
    return {"pages": len(pages.pages), **medians({"one_line_more": more, "last_page_alone": last})}


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds by name."""
    return {f"{name}_ms": round(1e3 * statistics.median(values), 3) for name, values in seconds.items()}


def main() -> None:
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/render.json"))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--reference-pages", type=int, default=12)
    options = parser.parse_args()
    missing = [name for name in ("reportlab", "pdf2image") if not has(name)]
    if missing or shutil.which("pdftoppm") is None:
        sys.exit(f"the reference needs {', '.join(missing) or 'pdftoppm'}: see the first lines of {sys.argv[0]}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # Poppler's process inherits it
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dpi in (72, 96):
            for name, text, font in (("English", english(), "dejavu-sans"), ("Chinese", chinese(), "noto-sans-sc")):
                rows.append(
                    compare(
                        name, text, font, dpi, Path(folder), reference_pages=options.reference_pages, runs=options.runs
                    )
                )
    renderer, text = Renderer(PP_OCR_PAGE), english()
    renderer.pages(text)
    result = {
        "command": "python benchmarks/render.py",
        "device": "2 cores, one of them used",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("numpy", "pillow", "reportlab", "pdf2image", "uniseg")},
        "extension": native.blit is not None,
        "page": f"{PAGE} × {PAGE} pixels, {POINTS} points",
        "rows": rows,
        "pp_ocr_pages_per_second": spread(
            [rate(lambda: sum(1 for _ in renderer.iter_pages(text)), seconds=SECONDS) for _ in range(options.runs)]
        ),
        "appending": appending(options.runs),
        "growing": growing(options.runs),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1, ensure_ascii=False))


def has(package: str) -> bool:
    """Whether a distribution is installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
