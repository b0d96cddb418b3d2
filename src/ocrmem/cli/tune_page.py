"""`ocrmem tune-page`: which page settings an encoder reads, and how dense they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_GRID = ["cell_width=7,8,9,10,11,12"]


def command(
    encoder: Annotated[str, typer.Option(help="Encoder with an OCR head: pp-ocr.")] = "pp-ocr",
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--try", metavar="KEY=A,B,C", help="Values of a page setting to try; given again, all combinations."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A page setting that stays as it is.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to read: english, chinese, chat, or a file. Given again, several. [english, chinese]"),
    ] = None,
    pages: Annotated[int, typer.Option(min=1, help="Pages of each text.")] = 4,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG file for the plot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw real text with many page settings and let the encoder's own OCR head read it.

    The table has the share of characters recovered, and characters to a memory token. Needs `ocrmem[eval]`.
    """
    import yaml

    from ocrmem.config.encoder import EncoderSettings
    from ocrmem.errors import ConfigError
    from ocrmem.evaluation.legibility import as_json as to_json
    from ocrmem.evaluation.legibility import load_text, tune, write_plot

    choices = {}
    for option in [*(grid or DEFAULT_GRID), *(settings or [])]:
        key, mark, values = option.partition("=")
        if not mark or not values:
            raise ConfigError(f"option {option!r}: expected KEY=A,B,C, for example cell_width=9,10,11.")
        parts = values.split(",") if option not in (settings or []) else [values]
        choices[key.strip()] = [yaml.safe_load(value) for value in parts]
    texts = {Path(name).stem: load_text(name) for name in text or ["english", "chinese"]}
    results = []
    fixed = {option.partition("=")[0].strip() for option in settings or []}
    names = [name for name in choices if name not in fixed]
    heading = "  ".join([*(f"{name:>12}" for name in names), f"{'text':12}", "recovered", "exactly", "chars/token"])
    for found in tune(EncoderSettings(name=encoder), texts, choices, max_pages=pages):
        if not results and not as_json:
            print(heading)
        results += found
        for row in found:
            values = "  ".join(f"{row.settings[name]!s:>12}" for name in names)
            line = f"{row.recovered:>9.2%}  {row.recovered_exactly:>7.2%}  {row.characters_per_token:>11.2f}"
            print(f"{values}  {row.text:12}  {line}", file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        print(to_json(results))
    if plot is not None:
        write_plot(results, plot)
