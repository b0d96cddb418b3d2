"""Page styles in points: the names that PDF-based renderers use, as page settings in pixels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


def settings_of_style(style: Mapping[str, Any]) -> tuple[RenderSettings, Cropping]:
    """Page settings and cropping of a style; underscores in names are hyphens.

    Lines and colours are rounded to pixels and grey values. The larger of `space-before` and `space-after` is the space
    between paragraphs. Any `newline-markup` but a line break draws breaks as a mark.

    Raises:
        ConfigError: a name is unknown, a value is none of its kind, or paragraphs shall have borders.
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

    width, height = _paper(values["page-size"])
    size = max(1, pixels("font-size"))
    line = round(1.2 * size) if values["line-height"] is None else max(1, pixels("line-height"))
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
        foreground=_grey(values["font-color"], "font-color"),
        background=_grey(values["page-bg-color"], "page-bg-color"),
    )
    return settings, Cropping(width=bool(values["auto-crop-width"]), last_page=bool(values["auto-crop-last-page"]))


def _number(values: Mapping[str, Any], name: str) -> float:
    try:
        return float(values[name])
    except (TypeError, ValueError):
        raise ConfigError(f"page style setting {name}={values[name]!r}: expected a number.") from None


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
        width, height = map(float, parts)
    except (TypeError, ValueError):
        raise ConfigError(
            f"page style setting page-size={value!r}: expected WIDTH,HEIGHT in points or one of {', '.join(PAPER)}."
        ) from None
    return width, height


def _grey(value: Any, name: str) -> int:
    """Grey value of a colour, as ITU-R BT.601 weighs red, green and blue."""
    match = re.fullmatch(r"(?:#|0x)?([0-9a-fA-F]{6})", str(value))
    if match is None:
        raise ConfigError(f"page style setting {name}={value!r}: expected a colour such as #000000.")
    red, green, blue = bytes.fromhex(match[1])
    return round(0.299 * red + 0.587 * green + 0.114 * blue)
