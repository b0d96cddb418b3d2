"""Page settings: how text becomes pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic

from ocrmem.config.colours import colour, grey
from ocrmem.errors import ConfigError

EVERY_SCRIPT = (
    "dejavu-sans", "noto-sans-sc", "noto-sans-kr", "noto-sans-devanagari", "noto-sans-thai",
    "noto-sans-tamil", "noto-sans-telugu", "noto-sans-khmer", "noto-sans-arabic",
)  # fmt: skip
"""Fallback fonts for as many scripts as ocrmem has fonts for; each is fetched when a character first needs it."""


def _as_grey(value: object) -> object:
    """Grey value of a colour; anything else as it is."""
    return grey(colour(value, where="render setting")) if isinstance(value, str) else value


Grey = Annotated[int, pydantic.BeforeValidator(_as_grey)]

MAX_SIDE = 16_384
"""Pixels; a page of A4 at 1,200 dots an inch is 14,031 high. A page is drawn in memory, so more is a slip."""


@dataclass(frozen=True, kw_only=True)
class RenderSettings:
    """Everything that decides the bytes of a page. Lengths are pixels."""

    page_width: int
    """Width of a page."""
    page_height: int
    """Height of a page."""
    line_height: int
    """Distance between the tops of neighbouring lines."""
    font_size: int
    """Size of the em square."""
    font: str = "dejavu-sans-mono"
    """Name of a bundled or fetchable font, or a path to a TrueType or OpenType file."""
    fallback_fonts: tuple[str, ...] = ("dejavu-sans", "noto-sans-sc")
    """Fonts tried in order for a character that `font` lacks; the last resort is a box with the code point. A fetched
    font for one script, such as noto-sans-kr, is tried for characters of that script alone. Nothing else decides which
    font is used: one that cannot be had is an error."""
    cell_width: int | None = None
    """Advance of every narrow character (wide East Asian characters take two); glyphs are squeezed to fit.
    None: the font's own proportional advances."""
    wide_cell_width: int | None = None
    """Advance of every wide character where there are cells. None: two cells."""
    horizontal_scale: float = 1.0
    """Factor on the width of every glyph where there are no cells; 0.9 is a condensed face."""
    margin_left: int = 0
    margin_top: int = 0
    margin_right: int = 0
    margin_bottom: int = 0
    line_breaks: Literal["keep", "mark"] = "keep"
    """`keep`: a line break in the text starts a new line. `mark`: it is drawn as » and the line goes on, which
    wastes no space after short turns."""
    layout: Literal["simple", "unicode"] = "simple"
    """`simple`: lines break at spaces, after hyphens and between wide characters; text runs in logical order, a tab is
    four spaces. `unicode`: lines break by Unicode Standard Annex 14, right-to-left text stands in visual order (Annex
    9; controls of direction take effect and are not drawn), and a tab goes on to the next multiple of four spaces.
    Adapters keep what they were trained with."""
    shaping: Literal["none", "harfbuzz"] = "none"
    """`harfbuzz`: letters of Arabic, Indic and other scripts that change beside others are joined; needs the extra
    `ocrmem[shaping]`. `none`: each letter is drawn alone."""
    missing_glyphs: Literal["code", "name"] = "code"
    """What is drawn for a character that no font has. `code`: a box with its code point. `name`: for emoji and other
    symbols the Unicode name in brackets, such as [rocket], by the tables of the running Python; else the box."""
    roles: Literal["text", "rule", "inverse"] = "text"
    """How the role at the start of a turn (`user: `) is set apart. `text`: not at all. `rule`: by a thin line above it.
    `inverse`: light on dark."""
    alignment: Literal["start", "left", "right", "center", "justify"] = "start"
    """Where lines stand between the margins. `start`: at the left; with `layout="unicode"`, right-to-left paragraphs at
    the right. `justify`: the same, with the spaces of every line widened that goes on in the next."""
    first_indent: int = 0
    """Pixels before the first line of a paragraph."""
    space_after: int = 0
    """Pixels below the last line of a paragraph."""
    foreground: Grey = 0
    """Grey value of the glyphs, 0 (black) to 255 (white), or a colour (a CSS name, #RRGGBB), of which encoders see the
    luma (ITU-R BT.601)."""
    background: Grey = 255
    """Grey value or colour of the page."""

    def __post_init__(self) -> None:
        for name in ("page_width", "page_height", "line_height", "font_size"):
            given = getattr(self, name)
            _require(given > 0, name, given, "a positive number of pixels")
            _require(given <= MAX_SIDE, name, given, f"at most {MAX_SIDE:,} pixels")
        for name in ("margin_left", "margin_top", "margin_right", "margin_bottom", "first_indent", "space_after"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "zero or more pixels")
        for name in ("foreground", "background"):
            if isinstance(given := getattr(self, name), str):
                object.__setattr__(self, name, grey(colour(given, where=f"render setting {name}")))
            _require(0 <= getattr(self, name) <= 255, name, getattr(self, name), "a grey value from 0 to 255")
        for name, choices in CHOICES.items():
            given = getattr(self, name)
            expected = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
            _require(given in choices, name, given, expected)
        for name in ("cell_width", "wide_cell_width"):
            given = getattr(self, name)
            _require(given is None or given > 0, name, given, "a positive number of pixels, or None")
        _require(0.1 <= self.horizontal_scale <= 10, "horizontal_scale", self.horizontal_scale, "a factor, 0.1 to 10")
        if self.cell_width is None and self.wide_cell_width is not None:
            raise ConfigError(f"render setting wide_cell_width={self.wide_cell_width} needs cell_width. Set both.")
        if self.cell_width is not None and self.horizontal_scale != 1:
            raise ConfigError(
                f"render settings cell_width={self.cell_width} and horizontal_scale={self.horizontal_scale} both set "
                "the width of glyphs. Give one of them."
            )
        if self.lines_per_page < 1:
            raise ConfigError(
                f"page_height={self.page_height} with margins {self.margin_top}+{self.margin_bottom} has no room for "
                f"one line of line_height={self.line_height}; make the page higher or the line lower."
            )
        narrowest = self.first_indent + max(2 * (self.cell_width or 1), self.wide_cell_width or 1)
        if self.text_width < narrowest:
            raise ConfigError(
                f"page_width={self.page_width} with margins {self.margin_left}+{self.margin_right} leaves "
                f"{self.text_width} pixels for text; at least {narrowest} are needed. Widen the page."
            )

    @property
    def text_width(self) -> int:
        """Pixels between the left and the right margin."""
        return self.page_width - self.margin_left - self.margin_right

    @property
    def lines_per_page(self) -> int:
        """Lines that fit between the top and the bottom margin."""
        return (self.page_height - self.margin_top - self.margin_bottom) // self.line_height


def _require(holds: bool, name: str, given: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"render setting {name}={given!r}: expected {expected}.")


CHOICES = {
    "line_breaks": ("keep", "mark"),
    "layout": ("simple", "unicode"),
    "shaping": ("none", "harfbuzz"),
    "missing_glyphs": ("code", "name"),
    "roles": ("text", "rule", "inverse"),
    "alignment": ("start", "left", "right", "center", "justify"),
}
"""The values of the settings that are one of several words."""
LATER_SETTINGS = (
    "wide_cell_width", "horizontal_scale", "layout", "shaping", "missing_glyphs", "roles", "alignment", "first_indent",
    "space_after",
)  # fmt: skip
"""Settings that came after feature caches and adapters did: at their defaults, pages are as before, byte for byte."""

PP_OCR_PAGE = RenderSettings(
    page_width=640, page_height=768, line_height=48, font_size=36, cell_width=10, line_breaks="mark"
)
"""16 lines of 64 characters. PP-OCRv6-small reads 99.9% of the characters of English prose at 10 pixels each, 99.4% at
9 and 80.9% at 8; of Chinese, in two cells a character, 99.1% to 99.7% at any width from 7 to 12
(`benchmarks/legibility.py`). The page stays at 10: adapters were trained on it."""


def deepseek_ocr_page(page_size: int) -> RenderSettings:
    """A square page for DeepSeek-OCR's encoder, in small proportional type with a narrow margin."""
    return RenderSettings(
        page_width=page_size,
        page_height=page_size,
        line_height=14,
        font="dejavu-sans",
        font_size=12,
        fallback_fonts=("noto-sans-sc",),
        margin_left=8,
        margin_top=8,
        margin_right=8,
        margin_bottom=8,
    )
