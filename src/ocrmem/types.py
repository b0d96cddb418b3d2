"""The shape legend and the dataclasses that cross the walls between packages.

Shape letters, used as suffixes of tensors and arrays that cross a function (`features_PVE`):

    B  samples in a batch          V  memory tokens per page
    S  sequence positions          E  feature width of the OCR encoder
    P  pages in a batch            D  embedding width of the LLM
    H  page height in pixels       W  page width in pixels
    N  glyphs drawn on a page
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `content` is plain text, already joined if it came as text parts."""

    role: Role
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """Messages in order, oldest first, and where they came from (`file.jsonl:12`) for error messages."""

    messages: tuple[Message, ...]
    source: str = "conversation"


@dataclass(frozen=True, eq=False)
class Page:
    """One rendered page and what is written where on it.

    A page is the unit of everything that follows: it is encoded alone, cached by content, and never changes once
    full.
    """

    image_HW: np.ndarray
    """uint8 grey values, row by row."""
    text_start: int
    """First character of the source text that this page holds."""
    text_end: int
    """One past the last character that this page holds; the next page starts here."""
    num_lines: int
    """Lines in use; those below are background."""
    glyph_offsets_N: np.ndarray
    """int64: for each drawn glyph, the offset of its first character in the source text."""
    glyph_boxes_N4: np.ndarray
    """int32: left, top, right, bottom of each drawn glyph's cell in pixels, right and bottom exclusive."""


TokenSpans = list[list[tuple[int, int]]]
"""For each memory token of a page, the half-open ranges of source characters that it covers, in reading order."""
