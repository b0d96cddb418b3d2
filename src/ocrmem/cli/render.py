"""`ocrmem render`: text to pages."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ocrmem.config.page_style import Output
    from ocrmem.types import Page


def command(
    file: Annotated[
        str, typer.Argument(help="Text or Markdown file, JSONL file of conversations, or - for text on stdin.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the PNG pages.")] = None,
    pdf: Annotated[Path | None, typer.Option(help="One PDF of all pages.")] = None,
    contact_sheet: Annotated[Path | None, typer.Option(help="One PNG of the first pages, small, side by side.")] = None,
    encoder: Annotated[str, typer.Option(help="Whose page settings to use: pp-ocr or deepseek-ocr.")] = "pp-ocr",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A page setting, for example font_size=12."),
    ] = None,
    style: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|KEY=VALUE",
            help="Page style in points instead of an encoder's: a JSON or YAML file, or page-size=595,842, dpi=72, "
            "font-size=9, alignment=JUSTIFY, auto-crop-width=true, …",
        ),
    ] = None,
    llm: Annotated[str | None, typer.Option(help="LLM whose text tokens the statistics count.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Text on stdin is Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw text as the pages that the encoder will read: PNG files, a PDF, a contact sheet, or statistics alone.

    Text of any length is read, drawn and written in little memory: Markdown block by block, JSONL line by line.
    """
    from ocrmem.errors import ConfigError
    from ocrmem.render.renderer import Renderer

    if style and settings:
        raise ConfigError("--style and --set both give page settings. Give one of them.")
    ocr = None
    if style:
        wanted = read_style(style)
    else:
        ocr, wanted = encoder_page(encoder, settings or [])
    if not wanted.colours.are_grey:
        wanted = wanted._replace(page=dataclasses.replace(wanted.page, foreground=0, background=255))
    renderer = Renderer(wanted.page)
    counter = TokenCounter(llm) if llm is not None else None
    sinks = Sinks(output, pdf, contact_sheet, wanted)
    characters = pages = memory_tokens = 0
    try:
        for name, parts in texts_of(file, markdown):
            for number, page, is_last in numbered(renderer.iter_stream(counter.watch(parts) if counter else parts)):
                sinks.add(page, f"{name}-{number:04d}", is_last)
                pages += 1
                memory_tokens += ocr.num_tokens(page) if ocr is not None else 0
                characters += page.text_end - page.text_start
    except BaseException:
        sinks.discard()
        raise
    sinks.close()
    result: dict[str, Any] = {
        "pages": sinks.written,
        "num_pages": pages,
        "characters": characters,
        "missing_characters": {f"U+{ord(c):04X}": n for c, n in sorted(renderer.missing.items())},
    }
    if ocr is not None:
        result["memory_tokens"] = memory_tokens
    if counter is not None:
        result["text_tokens"] = counter.tokens
        if ocr is not None:
            result["separator_tokens"] = counter.separators()
            result["ratio"] = round(counter.tokens / max(1, memory_tokens + counter.separators()), 3)
    if as_json:
        print(json.dumps(result))
    else:
        print(summary(result, output))


def summary(result: dict[str, Any], output: Path | None) -> str:
    """The statistics as one line."""
    parts = [f"{result['num_pages']} pages{f' in {output}' if output else ''}", f"{result['characters']} characters"]
    if missing := sum(result["missing_characters"].values()):
        parts.append(f"{missing} of them in no font")
    if "memory_tokens" in result:
        parts.append(f"{result['memory_tokens']} memory tokens")
    if "text_tokens" in result:
        parts.append(f"{result['text_tokens']} text tokens")
    if "ratio" in result:
        parts.append(f"ratio {result['ratio']} with {result['separator_tokens']} separators")
    return ", ".join(parts)


def encoder_page(name: str, overrides: list[str]) -> tuple[Any, Output]:
    """An encoder without weights, and its preset with the overrides; the encoder is None where it cannot read them."""
    from ocrmem.config.colours import Colours, colour
    from ocrmem.config.encoder import EncoderSettings
    from ocrmem.config.loader import apply_overrides, from_mapping
    from ocrmem.config.page_style import Cropping, Output
    from ocrmem.config.render import RenderSettings
    from ocrmem.encoders.registry import build_encoder
    from ocrmem.errors import PageSizeError

    settings = EncoderSettings(name=name)
    preset = build_encoder(settings, load_weights=False, device="meta")
    values = apply_overrides(preset.page, overrides)
    page = from_mapping(RenderSettings, values, where="page")
    text, paper = (colour(values[name], where=name) for name in ("foreground", "background"))
    output = Output(page, Cropping(), Colours(text=text, page=paper), dpi=72)
    try:
        return build_encoder(settings, page=page, load_weights=False, device="meta"), output
    except PageSizeError as error:
        print(f"no memory tokens are counted: {error}", file=sys.stderr)
        return None, output


def read_style(options: list[str]) -> Output:
    """The page style of files and KEY=VALUE pairs, later ones first."""
    import yaml

    from ocrmem.config.page_style import settings_of_style
    from ocrmem.errors import ConfigError

    style: dict[str, Any] = {}
    for option in options:
        if Path(option).is_file():
            try:
                values = yaml.safe_load(Path(option).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(f"page style {option!r} is neither JSON nor YAML: {error}") from None
            if not isinstance(values, dict):
                raise ConfigError(f"page style {option!r}: expected a mapping of names to values.")
            style |= {str(name).replace("_", "-"): value for name, value in values.items()}
            continue
        name, mark, value = option.partition("=")
        if not mark:
            raise ConfigError(f"--style {option!r} is neither a file nor KEY=VALUE. Give the path of a JSON file.")
        key = name.strip().replace("_", "-")
        style[key] = value if key == "page-size" or key.endswith("color") else yaml.safe_load(value)
    return settings_of_style(style)


def texts_of(file: str, markdown: bool) -> Iterator[tuple[str, Iterable[str]]]:
    """(name, parts) of each text that is to be drawn."""
    from ocrmem.data.lines import pieces
    from ocrmem.data.markdown import plain_pieces
    from ocrmem.data.texts import stream_texts

    if file == "-":
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        yield "page", plain_pieces(sys.stdin) if markdown else pieces(sys.stdin)
    else:
        yield from stream_texts(Path(file))


def numbered(pages: Iterable[Page]) -> Iterator[tuple[int, Page, bool]]:
    """(number from 1, page, whether it is the last)."""
    before: Page | None = None
    number = 0
    for page in pages:
        if before is not None:
            number += 1
            yield number, before, False
        before = page
    if before is not None:
        yield number + 1, before, True


class TokenCounter:
    """Counts the LLM's tokens of text that passes by."""

    def __init__(self, llm: str) -> None:
        from ocrmem.model.llm import load_tokenizer

        self._tokenizer = load_tokenizer(llm)
        self.tokens = 0

    def watch(self, parts: Iterable[str]) -> Iterator[str]:
        """The parts, counted one by one; they end with lines, where no token goes across."""
        for part in parts:
            clean = part.encode("utf-8", "replace").decode("utf-8")
            self.tokens += len(self._tokenizer(clean, add_special_tokens=False)["input_ids"])
            yield part

    def separators(self) -> int:
        """Tokens of a prompt's memory besides its placeholders, with the default header."""
        from ocrmem.config.memory import MemorySettings
        from ocrmem.memory.chat_format import ChatFormat
        from ocrmem.memory.placeholder import choose_memory_token

        token, _ = choose_memory_token(self._tokenizer)
        chat = ChatFormat(self._tokenizer, memory_token=token, header=MemorySettings().header)
        return chat.separator_tokens(has_system=False)


class Sinks:
    """Where pages go: a folder of PNG files, a PDF, a contact sheet."""

    def __init__(
        self,
        output: Path | None,
        pdf: Path | None,
        sheet: Path | None,
        wanted: Output,
    ) -> None:
        from ocrmem.render.files import ContactSheet, PdfWriter

        self._output, self._sheet_path = output, sheet
        self._wanted = wanted
        self._pdf = PdfWriter(pdf, dpi=wanted.dpi) if pdf is not None else None
        self._sheet = ContactSheet() if sheet is not None else None
        self.written: list[str] = []
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)

    def add(self, page: Page, name: str, is_last: bool) -> None:
        """Write one page."""
        from ocrmem.render.files import coloured, cropped, save_image

        image = cropped(page, self._wanted.page, self._wanted.cropping, is_last=is_last)
        if not self._wanted.colours.are_grey:
            image = coloured(image, page, self._wanted.page, self._wanted.colours)
        if self._output is not None:
            path = self._output / f"{name}.png"
            save_image(image, path)
            self.written.append(str(path))
        if self._pdf is not None:
            self._pdf.add(image)
        if self._sheet is not None:
            self._sheet.add(image)

    def discard(self) -> None:
        """Leave no half of a file behind; PNG pages that are written stay."""
        if self._pdf is not None:
            self._pdf.discard()

    def close(self) -> None:
        """Finish what holds several pages."""
        from ocrmem.render.files import save_image

        if self._pdf is not None:
            self._pdf.close()
        if self._sheet is not None and self._sheet_path is not None:
            save_image(self._sheet.image(), self._sheet_path)
            if self._sheet.left_out:
                print(f"{self._sheet.left_out} more pages are not on the contact sheet", file=sys.stderr)
