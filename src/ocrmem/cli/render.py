"""`ocrmem render`: text to pages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[str, typer.Argument(help="Text file, JSONL file of conversations, or - for text on stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNG pages.")],
    encoder: Annotated[str, typer.Option(help="Whose page settings to use: pp-ocr or deepseek-ocr.")] = "pp-ocr",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A page setting, for example font_size=12."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw text as the pages that the encoder will read, one PNG each."""
    from ocrmem.config.encoder import EncoderSettings
    from ocrmem.config.loader import apply_overrides, from_mapping
    from ocrmem.config.render import RenderSettings
    from ocrmem.encoders.registry import build_encoder
    from ocrmem.render.renderer import Renderer, save_png

    preset = build_encoder(EncoderSettings(name=encoder), load_weights=False, device="meta").page
    page_settings = from_mapping(RenderSettings, apply_overrides(preset, settings or []), where="page")
    renderer = Renderer(page_settings)
    output.mkdir(parents=True, exist_ok=True)
    written, characters = [], 0
    for name, text in read_texts(file):
        characters += len(text)
        for number, page in enumerate(renderer.iter_pages(text), start=1):
            path = output / f"{name}-{number:04d}.png"
            save_png(page, path)
            written.append(str(path))
    if as_json:
        print(
            json.dumps(
                {
                    "pages": written,
                    "characters": characters,
                    "missing_characters": {f"U+{ord(c):04X}": n for c, n in sorted(renderer.missing.items())},
                }
            )
        )
        return
    print(f"{len(written)} pages in {output}, {characters} characters")


def read_texts(file: str) -> list[tuple[str, str]]:
    """(name, text) of what is to be drawn: one for a text, one for each conversation of a JSONL file."""
    from ocrmem.data.conversations import read_conversations
    from ocrmem.errors import DataError
    from ocrmem.memory.history import history_text

    if file == "-":
        return [("page", sys.stdin.read())]
    path = Path(file)
    if path.suffix == ".jsonl":
        conversations = read_conversations(path).conversations
        return [(f"{path.stem}-{n:04d}", history_text(c.messages)) for n, c in enumerate(conversations, start=1)]
    try:
        return [(path.stem, path.read_text(encoding="utf-8", errors="surrogateescape"))]
    except OSError as error:
        raise DataError(
            f"{file!r} cannot be read: {error.strerror or error}. Give a text file, or - for stdin."
        ) from None
