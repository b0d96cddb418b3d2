"""Colours of pages: what is written to files in colour, and the grey values that encoders see."""

from __future__ import annotations

import re
from dataclasses import dataclass

from PIL import ImageColor

from ocrmem.errors import ConfigError

RGB = tuple[int, int, int]


def colour(value: object, *, where: str) -> RGB:
    """Red, green and blue, 0 to 255, of a grey value (0 to 255) or a CSS colour: a name, `#RGB`, `#RRGGBB`,
    `rgb(…)`, `hsl(…)`; also `RRGGBB` and `0xRRGGBB`.

    Raises:
        ConfigError: the value is none of these.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255:
        return value, value, value
    if isinstance(value, str):
        text = re.sub(r"^(?:0x)?([0-9a-fA-F]{6})$", r"#\1", value.strip())
        try:
            found = ImageColor.getrgb(text)
        except ValueError:
            found = ()
        if len(found) == 3:
            return found
    raise ConfigError(
        f"{where}={value!r}: expected a colour such as #1a2b3c or darkblue, or a grey value from 0 (black) to 255."
    )


def grey(value: RGB) -> int:
    """Grey value of a colour: the luma of ITU-R BT.601, 0.299 R + 0.587 G + 0.114 B, rounded as Pillow's
    `convert("L")` rounds it, so that a page drawn in grey is the page in colour made grey."""
    red, green, blue = value
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Colours of images that are written; the pages that an encoder reads are grey."""

    text: RGB
    page: RGB
    lines: RGB | None = None
    """Behind lines of text, from margin to margin; None: the page's."""

    @property
    def are_grey(self) -> bool:
        """Whether a grey image shows them."""
        return self.lines is None and all(len({*value}) == 1 for value in (self.text, self.page))
