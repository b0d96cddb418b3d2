"""Pages as files: PNG, PDF and contact sheets."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ocrmem.config.colours import RGB, Colours
from ocrmem.config.page_style import Cropping
from ocrmem.config.render import RenderSettings
from ocrmem.files import fsync, write_files
from ocrmem.types import Page

PDF_BATCH = 16
"""Pages written to a PDF at once."""
SHEET_COLUMNS = 6
SHEET_PAGES = 48
"""Pages that a contact sheet shows at most."""
THUMBNAIL = 240
"""Width of a page on a contact sheet, in pixels."""
GAP = 12


def save_png(page: Page, path: Path) -> None:
    """Write a page as a grey PNG, whole or not at all."""
    save_image(page.image_HW, path)


def save_image(image: np.ndarray, path: Path) -> None:
    """Write an image, [H, W] grey or [H, W, 3], as PNG, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="png")
    write_files(path.parent, {path.name: lambda temporary: temporary.write_bytes(buffer.getvalue())})


def cropped(page: Page, settings: RenderSettings, cropping: Cropping, *, is_last: bool) -> np.ndarray:
    """A page's image without the blank paper that `cropping` cuts off."""
    height, width = page.image_HW.shape
    boxes_N4 = page.glyph_boxes_N4
    if cropping.last_page and is_last and len(boxes_N4):
        height = min(height, int(boxes_N4[:, 3].max()) + settings.margin_bottom)
    if cropping.width and len(boxes_N4):
        inked = np.flatnonzero((page.image_HW != settings.background).any(axis=0))
        right = int(inked[-1]) + 1 if len(inked) else settings.margin_left + 1
        width = min(width, right + settings.margin_left)
    return page.image_HW[:height, :width]


def coloured(image_HW: np.ndarray, page: Page, settings: RenderSettings, colours: Colours) -> np.ndarray:
    """uint8 [H, W, 3]: a page drawn in black on white, or a part of it from the top left, in colours.

    A pixel that a glyph covers by a share a is (1 − a) × the colour behind + a × the colour of the text.
    """
    cover_256 = 1 - np.arange(256)[:, None] / 255

    def table(behind: RGB) -> np.ndarray:
        return np.rint((1 - cover_256) * behind + cover_256 * colours.text).astype(np.uint8)

    image_HW3 = table(colours.page)[image_HW]
    if colours.lines is not None:
        left, right = settings.margin_left, settings.page_width - settings.margin_right
        for top in np.unique(page.glyph_boxes_N4[:, 1]).tolist():
            line = slice(top, top + settings.line_height), slice(left, right)
            image_HW3[line] = table(colours.lines)[image_HW[line]]
    return image_HW3


class PdfWriter:
    """Writes images to one PDF, a batch at a time, so that any number of pages fits into memory.

    The file is written beside its place and renamed by `close`.
    """

    def __init__(self, path: Path, *, dpi: float = 72.0) -> None:
        self._path = path
        self._dpi = dpi
        self._temporary = path.with_name(f".{path.name}.incomplete")
        self._waiting: list[Image.Image] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary.unlink(missing_ok=True)

    def add(self, image: np.ndarray) -> None:
        """Append a page."""
        self._waiting.append(Image.fromarray(np.ascontiguousarray(image)))
        if len(self._waiting) == PDF_BATCH:
            self._flush()

    def close(self) -> None:
        """Finish the file; without pages there is none."""
        self._flush()
        if self._temporary.exists():
            fsync(self._temporary)
            self._temporary.replace(self._path)

    def discard(self) -> None:
        """Remove what has been written; a file that was there before stays."""
        self._waiting.clear()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._waiting:
            first, *others = self._waiting
            first.save(
                self._temporary, format="pdf", save_all=True, append_images=others, quality=95, resolution=self._dpi,
                append=self._temporary.exists(),
            )  # fmt: skip
            self._waiting.clear()


class ContactSheet:
    """The first pages, small, side by side on one image."""

    def __init__(self) -> None:
        self._thumbnails: list[Image.Image] = []
        self.left_out = 0

    def add(self, image: np.ndarray) -> None:
        """Append a page; beyond `SHEET_PAGES` it is only counted."""
        if len(self._thumbnails) == SHEET_PAGES:
            self.left_out += 1
            return
        page = Image.fromarray(np.ascontiguousarray(image))
        height = max(1, round(page.height * THUMBNAIL / page.width))
        small = page.resize((THUMBNAIL, height), Image.Resampling.LANCZOS)
        self._thumbnails.append(ImageOps.expand(small, border=1, fill="#808080"))

    def image(self) -> np.ndarray:
        """uint8 image of the sheet, [H, W], or [H, W, 3] where pages are in colour."""
        columns = max(1, min(SHEET_COLUMNS, len(self._thumbnails)))
        rows = math.ceil(len(self._thumbnails) / columns)
        cell = max((image.height for image in self._thumbnails), default=0)
        mode = "RGB" if any(image.mode == "RGB" for image in self._thumbnails) else "L"
        sheet = Image.new(mode, (GAP + columns * (THUMBNAIL + 2 + GAP), GAP + rows * (cell + GAP)), "#ebebeb")
        for number, image in enumerate(self._thumbnails):
            row, column = divmod(number, columns)
            sheet.paste(image, (GAP + column * (THUMBNAIL + 2 + GAP), GAP + row * (cell + GAP)))
        return np.asarray(sheet)
