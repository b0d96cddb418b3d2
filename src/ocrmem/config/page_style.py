"""Page styles in points: the names that PDF-based renderers use, as page settings in pixels."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ocrmem.config.colours import RGB, Colours, colour, grey
from ocrmem.config.loader import nearest
from ocrmem.config.render import EVERY_SCRIPT, RenderSettings
from ocrmem.errors import ConfigError

PAPER = {"A4": (595.28, 841.89), "A5": (419.53, 595.28), "LETTER": (612.0, 792.0)}
"""Width and height in points."""
DEFAULTS: dict[str, Any] = {
    "page-size": "595,842",
    "dpi": 72,
    "margin-x": 10,
    "margin-y": 10,
    "font-path": "dejavu-sans",
    "fallback-fonts": EVERY_SCRIPT,
    "font-size": 9,
    "line-height": None,
    "font-color": "#000000",
    "page-bg-color": "#FFFFFF",
    "para-bg-color": None,
    "para-border-color": None,
    "alignment": "START",
    "first-line-indent": 0,
    "left-indent": 0,
    "right-indent": 0,
    "space-before": 0,
    "space-after": 0,
    "border-width": 0,
    "border-padding": 0,
    "horizontal-scale": 1.0,
    "newline-markup": "<br/>",
    "shaping": "none",
    "auto-crop-width": False,
    "auto-crop-last-page": False,
}
"""Every name and its default. Lengths are points, 1/72 inch; the line height follows the font size."""


@dataclass(frozen=True, kw_only=True)
class Cropping:
    """How much blank paper is cut off images that are written; the pages that an encoder reads are never cut."""

    width: bool = False
    """Right of the widest line, as far as the left margin is wide."""
    last_page: bool = False
    """Below the last line of the last page."""


class Output(NamedTuple):
    """How pages are drawn and written to files."""

    page: RenderSettings
    """The page settings, with grey values for colours."""
    cropping: Cropping
    colours: Colours
    dpi: float
    """Dots an inch of a PDF's images."""


def settings_of_style(style: Mapping[str, Any]) -> Output:
    """What a style says; underscores in names are hyphens.

    Lengths are rounded to pixels; the page settings have the colours as grey values. The larger of `space-before` and
    `space-after` is the space between paragraphs. Any `newline-markup` but a line break draws breaks as a mark.

    Raises:
        ConfigError: a name is unknown, a value is none of its kind, or paragraphs shall have borders. The color of
            borders is taken and has no effect.
    """
    given = {str(name).replace("_", "-"): value for name, value in style.items()}
    for name in given:
        if name not in DEFAULTS:
            raise ConfigError(f"unknown page style setting {name!r}. {nearest(name, tuple(DEFAULTS))}")
    values = {**DEFAULTS, **given}
    for name in ("border-width", "border-padding"):
        if _number(values, name):
            raise ConfigError(f"page style setting {name}={values[name]!r}: paragraphs have no borders here. Set 0.")
    scale = _number(values, "dpi") / 72

    def pixels(name: str) -> int:
        return round(_number(values, name) * scale)

    def of(name: str) -> RGB:
        return colour(values[name], where=f"page style setting {name}")

    behind = None if values["para-bg-color"] is None else of("para-bg-color")
    colours = Colours(text=of("font-color"), page=of("page-bg-color"), lines=behind)
    if behind == colours.page:
        colours = replace(colours, lines=None)
    width, height = _paper(values["page-size"])
    size = pixels("font-size")
    line = round(1.2 * size) if values["line-height"] is None else pixels("line-height")
    alignment = str(values["alignment"]).lower().removeprefix("ta_")
    settings = RenderSettings(
        page_width=round(width * scale),
        page_height=round(height * scale),
        line_height=line,
        font=str(values["font-path"]),
        fallback_fonts=_names(values["fallback-fonts"]),
        font_size=size,
        margin_left=pixels("margin-x") + pixels("left-indent"),
        margin_right=pixels("margin-x") + pixels("right-indent"),
        margin_top=pixels("margin-y"),
        margin_bottom=pixels("margin-y"),
        first_indent=pixels("first-line-indent"),
        space_after=max(pixels("space-before"), pixels("space-after")),
        alignment={"centre": "center"}.get(alignment, alignment),  # type: ignore[arg-type]
        horizontal_scale=_number(values, "horizontal-scale"),
        line_breaks="keep" if re.fullmatch(r"<br ?/?>", str(values["newline-markup"])) else "mark",
        layout="unicode",
        shaping=values["shaping"],
        missing_glyphs="name",
        foreground=grey(colours.text),
        background=grey(colours.page),
    )
    cropping = Cropping(width=_flag(values, "auto-crop-width"), last_page=_flag(values, "auto-crop-last-page"))
    return Output(settings, cropping, colours, 72 * scale)


def _number(values: Mapping[str, Any], name: str) -> float:
    try:
        number = float(values[name])
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"page style setting {name}={values[name]!r}: expected a number.")
    return number


def _flag(values: Mapping[str, Any], name: str) -> bool:
    if not isinstance(values[name], bool):
        raise ConfigError(f"page style setting {name}={values[name]!r}: expected true or false.")
    return values[name]


def _names(value: Any) -> tuple[str, ...]:
    """Names separated by commas, or a list of them."""
    parts = value.split(",") if isinstance(value, str) else value or ()
    if not isinstance(parts, (list, tuple)):
        raise ConfigError(f"page style setting fallback-fonts={value!r}: expected names of fonts, separated by commas.")
    return tuple(name for part in parts if (name := str(part).strip()))


def _paper(value: Any) -> tuple[float, float]:
    if isinstance(value, str) and value.upper() in PAPER:
        return PAPER[value.upper()]
    parts = value.split(",") if isinstance(value, str) else value
    try:
        width, height = (float(part) for part in parts)
        if not math.isfinite(width + height):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(
            f"page style setting page-size={value!r}: expected WIDTH,HEIGHT in points or one of {', '.join(PAPER)}."
        ) from None
    return width, height
