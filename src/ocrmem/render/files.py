"""Pages as files: PNG, PDF and contact sheets."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

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


def save_image(image_HW: np.ndarray, path: Path) -> None:
    """Write a grey image as PNG, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HW)).save(buffer, format="png")
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


class PdfWriter:
    """Writes grey images to one PDF, a batch at a time, so that any number of pages fits into memory.

    The file is written beside its place and renamed by `close`.
    """

    def __init__(self, path: Path, *, dpi: float = 72.0) -> None:
        self._path = path
        self._dpi = dpi
        self._temporary = path.with_name(f".{path.name}.incomplete")
        self._waiting: list[Image.Image] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary.unlink(missing_ok=True)

    def add(self, image_HW: np.ndarray) -> None:
        """Append a page."""
        self._waiting.append(Image.fromarray(np.ascontiguousarray(image_HW)))
        if len(self._waiting) == PDF_BATCH:
            self._flush()

    def close(self) -> None:
        """Finish the file; without pages there is none."""
        self._flush()
        if self._temporary.exists():
            fsync(self._temporary)
            self._temporary.replace(self._path)

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

    def add(self, image_HW: np.ndarray) -> None:
        """Append a page; beyond `SHEET_PAGES` it is only counted."""
        if len(self._thumbnails) == SHEET_PAGES:
            self.left_out += 1
            return
        image = Image.fromarray(np.ascontiguousarray(image_HW))
        height = max(1, round(image.height * THUMBNAIL / image.width))
        small = image.resize((THUMBNAIL, height), Image.Resampling.LANCZOS)
        self._thumbnails.append(ImageOps.expand(small, border=1, fill=128))

    def image_HW(self) -> np.ndarray:
        """uint8 grey image of the sheet."""
        columns = max(1, min(SHEET_COLUMNS, len(self._thumbnails)))
        rows = math.ceil(len(self._thumbnails) / columns)
        cell = max((image.height for image in self._thumbnails), default=0)
        sheet = Image.new("L", (GAP + columns * (THUMBNAIL + 2 + GAP), GAP + rows * (cell + GAP)), 235)
        for number, image in enumerate(self._thumbnails):
            row, column = divmod(number, columns)
            sheet.paste(image, (GAP + column * (THUMBNAIL + 2 + GAP), GAP + row * (cell + GAP)))
        return np.asarray(sheet)
