"""How much of a page its encoder's own OCR head reads back, and how dense the page is.

```
text ─▶ pages ─▶ lines as drawn ─▶ encoder.read_lines ─▶ edit distance, line by line
```
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from ocrmem.assets.fetch import resolve
from ocrmem.config.encoder import EncoderSettings
from ocrmem.config.loader import from_mapping
from ocrmem.config.render import RenderSettings
from ocrmem.data.texts import read_texts
from ocrmem.encoders.base import OCREncoder
from ocrmem.encoders.pp_ocr import PPOCREncoder
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import ConfigError
from ocrmem.evaluation.chinese_sample import CHINESE
from ocrmem.render.atlas import BREAK_MARK, LINE_BREAKS
from ocrmem.render.renderer import Renderer
from ocrmem.types import Page

MAX_PAGES = 4
"""Pages read of each text, unless asked otherwise."""
TEXTS = ("english", "chinese", "chat")
"""Texts that are at hand: held-out encyclopaedia leads, prose and chat in Chinese, held-out conversations."""


@dataclass(frozen=True)
class Legibility:
    """How one text is read with one set of page settings."""

    text: str
    """Name of the text."""
    settings: Mapping[str, Any]
    """The settings that were tried, by name."""
    recovered: float
    """Share of characters recovered: 1 − edit distance ÷ characters, white space left out, after Unicode NFKC (a
    full-width comma and a comma are one character)."""
    recovered_exactly: float
    """The same without NFKC and with single spaces between words."""
    characters: int
    """Characters compared, without white space."""
    characters_per_token: float
    """Characters of the text, spaces too, to one memory token."""
    characters_per_megapixel: float
    """Characters of the text to a million pixels of lines in use."""


def load_text(name: str) -> str:
    """One of `TEXTS`, or a text or JSONL file.

    Raises:
        AssetError: the data could not be fetched.
        DataError: the file cannot be read.
    """
    if name == "chinese":
        return CHINESE
    if name == "english":
        with (Path(resolve("wiki-leads")) / "heldout.jsonl").open(encoding="utf-8") as file:
            return "\n".join(json.loads(line)["text"] for line in itertools.islice(file, 400))
    path = Path(resolve("chitchat")) / "heldout.jsonl" if name == "chat" else Path(name)
    return "".join(itertools.islice((text for _, text in read_texts(path)), 400))


def measure(
    encoder: OCREncoder,
    texts: Mapping[str, str],
    *,
    tried: Mapping[str, Any] | None = None,
    max_pages: int = MAX_PAGES,
) -> list[Legibility]:
    """Draw texts with an encoder's page settings and let its OCR head read them.

    Args:
        encoder: one with an OCR head and its weights: `PPOCREncoder`.
        texts: text by name.
        tried: settings by which the results shall be known.
        max_pages: pages read of each text.

    Raises:
        ConfigError: the encoder has no OCR head.
    """
    read_lines = _reader(encoder)
    renderer = Renderer(encoder.page)
    found = []
    for name, text in texts.items():
        pages = list(itertools.islice(renderer.iter_pages(text), max_pages))
        errors = exact_errors = characters = exact_characters = 0
        for page in pages:
            with torch.inference_mode():
                read = read_lines(torch.from_numpy(page.image_HW)[None])[0]
            drawn = [line for line in lines_of(page, text) if line.strip()]
            if len(read) != len(drawn):
                raise AssertionError(f"{len(drawn)} lines drawn, {len(read)} read")
            for wanted, got in zip(drawn, read, strict=True):
                exact_errors += Levenshtein.distance(" ".join(wanted.split()), " ".join(got.split()))
                exact_characters += len(" ".join(wanted.split()))
                wanted, got = _compared(wanted), _compared(got)
                errors += Levenshtein.distance(wanted, got)
                characters += len(wanted)
        total = pages[-1].text_end if pages else 0
        tokens = sum(encoder.num_tokens(page) for page in pages)
        pixels = sum(page.num_lines for page in pages) * encoder.page.line_height * encoder.page.page_width
        found.append(
            Legibility(
                text=name,
                settings=dict(tried or {}),
                recovered=1 - errors / max(1, characters),
                recovered_exactly=1 - exact_errors / max(1, exact_characters),
                characters=characters,
                characters_per_token=total / max(1, tokens),
                characters_per_megapixel=1e6 * total / max(1, pixels),
            )
        )
    return found


def lines_of(page: Page, text: str) -> list[str]:
    """The text of each line of a page as it is drawn, breaks as their mark."""
    tops = page.glyph_boxes_N4[:, 1]
    edges = np.flatnonzero(np.diff(tops, prepend=-1)).tolist()
    begins = [page.text_start, *(int(page.glyph_offsets_N[edge]) for edge in edges[1:]), page.text_end]
    return [
        "".join(BREAK_MARK if character in LINE_BREAKS else character for character in text[begin:end])
        for begin, end in itertools.pairwise(begins)
    ]


def tune(
    base: EncoderSettings, texts: Mapping[str, str], grid: Mapping[str, Sequence[Any]], *, max_pages: int = MAX_PAGES
) -> Iterator[list[Legibility]]:
    """`measure` for every combination of page settings; those that the encoder cannot read are an error.

    Args:
        base: encoder; its preset is what the combinations change.
        texts: text by name.
        grid: values to try, by page setting.
        max_pages: pages read of each text.
    """
    empty = build_encoder(base, load_weights=False, device="meta")
    preset, _ = empty.page, _reader(empty)
    for values in itertools.product(*grid.values()):
        tried = dict(zip(grid, values, strict=True))
        page = from_mapping(RenderSettings, {**dataclasses.asdict(preset), **tried}, where="page")
        yield measure(build_encoder(base, page=page), texts, tried=tried, max_pages=max_pages)


def write_plot(results: Sequence[Legibility], path: Path) -> None:
    """A plot of characters recovered against characters a memory token, one line a text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(result.text for result in results):
        points = sorted((r for r in results if r.text == name), key=lambda r: r.characters_per_token)
        x, y = [p.characters_per_token for p in points], [100 * p.recovered for p in points]
        axes.plot(x, y, marker="o", label=name)
        for point in points:
            label = ", ".join(str(value) for value in point.settings.values())
            axes.annotate(label, (point.characters_per_token, 100 * point.recovered), fontsize=7, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
    axes.set_xlabel("characters to a memory token")
    axes.set_ylabel("characters recovered by the OCR head, %")
    axes.set_title("Labels: " + ", ".join(results[0].settings) if results else "")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def as_json(results: Sequence[Legibility]) -> str:
    """Results as indented JSON."""
    rounded = [
        {key: round(value, 5) if isinstance(value, float) else value for key, value in dataclasses.asdict(r).items()}
        for r in results
    ]
    return json.dumps(rounded, indent=1, ensure_ascii=False)


def _reader(encoder: OCREncoder) -> Callable[[torch.Tensor], list[list[str]]]:
    if not isinstance(encoder, PPOCREncoder):
        raise ConfigError(f"encoder {encoder.name!r} has no OCR head to read pages with. Use pp-ocr.")
    return encoder.read_lines


def _compared(line: str) -> str:
    return "".join(unicodedata.normalize("NFKC", line).split())
