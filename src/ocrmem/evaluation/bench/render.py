"""Pages a second of the renderer, beside Pillow drawing line by line; `benchmarks/render.py` has ReportLab too."""

from __future__ import annotations

import functools
import random

import torch
from PIL import Image, ImageDraw, ImageFont

from ocrmem.config.render import RenderSettings, deepseek_ocr_page
from ocrmem.evaluation.bench.sizes import Sizes
from ocrmem.evaluation.bench.timing import Results, measure
from ocrmem.render import native
from ocrmem.render.fonts import font_path
from ocrmem.render.renderer import Renderer

WORDS = """
the of and a to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were all her she there would their we him been has when who will no more if out so up said what its about than into them
can only other time new some could these two may first then do any like my now over such our man me even most made after
also did many off before must well back through years much where your way down should because people history question
conversation answer remember yesterday meeting number address doctor summer holiday
"""


def random_text(num_chars: int, *, seed: int = 0) -> str:
    """Sentences of common English words, always the same."""
    generator = random.Random(seed)
    choices = WORDS.split()
    words, size = [], 0
    while size < num_chars:
        word = generator.choice(choices) + generator.choices(("", ",", ".", ".\n"), (80, 10, 8, 2))[0]
        words.append(word)
        size += len(word) + 1
    return " ".join(words)[:num_chars]


def bench_render(results: Results, sizes: Sizes, device: torch.device, tflops: float) -> None:
    """Fill in the rows and ratios of the part; drawing is done on the CPU."""
    cpu = torch.device("cpu")
    settings = deepseek_ocr_page(sizes.page_size)
    text = random_text(sizes.render_chars)
    renderer = Renderer(settings)
    pages = renderer.pages(text)
    results.head |= {
        "page_size": sizes.page_size, "characters": len(text), "pages": len(pages), "cores": 1,
        "characters_per_page": round(pages[0].text_end), "extension": native.blit is not None,
    }  # fmt: skip
    with results.row("ocrmem", cpu) as row:
        results.check_time()
        found = measure(lambda: sum(1 for _ in renderer.iter_pages(text)), cpu, repeats=5, seconds=5)
        row |= {"pages_per_second": round(1e3 * len(pages) / found["ms"], 1), **found}
    few = text[: pages[min(4, len(pages) - 1)].text_end]
    with results.row("Pillow, a line at a time", cpu) as row:
        results.check_time()
        drawn = draw_lines(few, settings)
        found = measure(lambda: draw_lines(few, settings), cpu, repeats=3, warm_up=1, seconds=5)
        row |= {"pages_per_second": round(1e3 * drawn / found["ms"], 1), **found}
    ours, theirs = (results.find(name, "pages_per_second") for name in ("ocrmem", "Pillow, a line at a time"))
    results.ratio("pages_per_second", ours, theirs)


def draw_lines(text: str, settings: RenderSettings) -> int:
    """Draw a text with Pillow, words wrapped by measured widths; the number of pages."""
    font, width = _font(settings), settings.text_width
    space = font.getlength(" ")
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line, used = [], 0.0
        for word in paragraph.split():
            size = _length(font, word)
            if line and used + space + size > width:
                lines.append(" ".join(line))
                line, used = [], 0.0
            line.append(word)
            used += size + (space if len(line) > 1 else 0)
        lines.append(" ".join(line))
    pages = 0
    for begin in range(0, len(lines), settings.lines_per_page):
        image = Image.new("L", (settings.page_width, settings.page_height), 255)
        draw = ImageDraw.Draw(image)
        for number, line in enumerate(lines[begin : begin + settings.lines_per_page]):
            draw.text((settings.margin_left, settings.margin_top + number * settings.line_height), line, 0, font)
        pages += 1
    return pages


@functools.cache
def _font(settings: RenderSettings) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_path(settings.font), settings.font_size)


@functools.cache
def _length(font: ImageFont.FreeTypeFont, word: str) -> float:
    return font.getlength(word)
