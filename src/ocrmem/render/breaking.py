"""Where a line may break: the simple rules, vectorised, and Unicode Standard Annex 14 (by uniseg) where it matters.

Annex 14 costs some 50 µs a character in Python, so it is asked only about places that two tables cannot decide: most
lines of prose end at a space between two letters, or between two ideographs, where its answer is known.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
from uniseg.linebreak import LineBreak, line_break, line_break_boundaries

from ocrmem.render.fonts import is_wide

BREAKS = "\n\r\v\f\x85\u2028\u2029"
_CLOSING = frozenset("，。！？、；：）」』】》〉”’…—·,.!?;:)]}%")
"""Characters before which a line of East Asian text is not broken by the simple rules."""
OTHER, SPACE, HYPHEN, WIDE, CLOSE, BREAK = range(6)
"""Classes of the simple rules."""
LATER = 8
"""Added to the class of a mark that is drawn beside its base, as a box or from another font: no line begins with it. A
line may begin with a later base of a grapheme cluster, such as the second person of a family: adapters were trained on
pages where it does."""
WILD, LETTER, BLANK, IDEOGRAPH, POINT, END, JOINED, HARD, WIDE_END, ALPHA, HYPHEN_MINUS, OPEN, QUOTE = range(13)
"""Classes for Annex 14. WILD: ask it. ALPHA: letters of ASCII. LETTER: other AL, HL, NU. BLANK: the space.
IDEOGRAPH: breaks on both sides. OPEN: brackets. POINT, QUOTE: hold on to letters on both sides. END: holds on to what
is before it. WIDE_END: the same, and an ideograph may begin a line after it. JOINED: a later glyph of the same grapheme
cluster. HARD: a line break."""
CONTEXT = 1024
"""Characters that Annex 14 is shown at most; words of this length do not occur, but lines of joiners do."""


def simple_class(character: str) -> int:
    """Class of a character by the simple rules."""
    if character in BREAKS:
        return BREAK
    if character == "\t" or (unicodedata.category(character) == "Zs" and character not in "\u00a0\u202f\u2007"):
        return SPACE
    if character in "-‐–—":
        return HYPHEN
    if character in _CLOSING:
        return CLOSE
    return WIDE if is_wide(character) else OTHER


def annex_class(character: str) -> int:
    """Class of a character for Annex 14."""
    if character in BREAKS:
        return HARD
    if character == " ":
        return BLANK
    if character.isascii() and character.isalpha():
        return ALPHA
    if character == "-":
        return HYPHEN_MINUS
    if character in "([{":
        return OPEN
    if character in "'\"":
        return QUOTE
    if character in ",.;:":
        return POINT
    if character in "!?)]}":
        return END
    if character in "，。、；：！？":
        return WIDE_END
    kind = line_break(character)
    if kind in (LineBreak.AL, LineBreak.HL, LineBreak.NU):
        return LETTER
    return IDEOGRAPH if kind == LineBreak.ID and unicodedata.category(character) == "Lo" else WILD


def simple_breaks(classes_N: np.ndarray) -> np.ndarray:
    """int64 numbers of the glyphs before which a line may begin, by the simple rules."""
    pairs = classes_N[:-1] << 4 | classes_N[1:]
    decisions = np.frombuffer(pairs.tobytes().translate(SIMPLE_TABLE[:256]), dtype=np.uint8)
    return np.flatnonzero(decisions == _KNOWN) + 1


def _may_break() -> np.ndarray:
    """bool [256]: whether a line may break between two glyphs, by their classes by the simple rules."""
    before, after = np.divmod(np.arange(256), 16)
    before = before % LATER
    may = (before == SPACE) | (before == BREAK)
    may |= (before == HYPHEN) & (after == OTHER)
    may |= ((before == WIDE) | (before == CLOSE)) & (after == WIDE)
    may |= (before == WIDE) & (after != CLOSE)
    may |= (before == OTHER) & (after == WIDE)
    return may & (after < LATER)


def annex_breaks(classes_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Glyphs before which Annex 14 lets a line begin, or may let it.

    Returns:
        int64 [K] numbers of glyphs, ascending, and bool [K], whether it is known that the line may begin there.
    """
    pairs = classes_N[:-1] << 4 | classes_N[1:]
    decisions = np.frombuffer(bytearray(pairs.tobytes().translate(_DECISIONS)), dtype=np.uint8)
    # A space after a letter or a point, and a letter after it: rule 18, and no rule before it holds. Likewise a hyphen
    # between two letters.
    for decision, before in ((_SPACED, _ENDS_WORDS), (_HYPHENED, _IS_ALPHA)):
        after = np.flatnonzero(decisions == decision)
        known = before[classes_N[np.maximum(after - 1, 0)]] & (after > 0)
        decisions[after] = np.where(known, _KNOWN, _ASK)
    places = np.flatnonzero(decisions != _HOLDS)
    return places + 1, decisions[places] == _KNOWN


def _decide() -> bytes:
    """The decision for every pair of classes, as a table for `bytes.translate`."""
    before, after = np.divmod(np.arange(256), 16)
    letters = np.isin(before, (LETTER, ALPHA)), np.isin(after, (LETTER, ALPHA))
    begins = letters[1] | np.isin(after, (IDEOGRAPH, OPEN, QUOTE))
    ends = np.isin(after, (POINT, QUOTE, END))
    holds = (letters[0] | np.isin(before, (POINT, QUOTE))) & (letters[1] | ends)
    holds |= np.isin(before, (IDEOGRAPH, END)) & ends
    holds |= (letters[0] | np.isin(before, (IDEOGRAPH, WIDE_END))) & (after == WIDE_END)
    holds |= ((before == OPEN) & letters[1]) | (letters[0] & np.isin(after, (OPEN, HYPHEN_MINUS)))
    holds |= (after == BLANK) | (after == HARD)
    decisions = np.where(holds, _HOLDS, _ASK)
    decisions[(before == BLANK) & begins] = _SPACED
    decisions[(before == HYPHEN_MINUS) & (after == ALPHA)] = _HYPHENED
    decisions[((before == IDEOGRAPH) | (before == WIDE_END)) & (after == IDEOGRAPH)] = _KNOWN
    decisions[before == HARD] = _KNOWN
    decisions[after == JOINED] = _HOLDS
    return bytes(decisions.tolist())


_HOLDS, _ASK, _KNOWN, _SPACED, _HYPHENED = range(5)
_ENDS_WORDS = np.isin(np.arange(13), (LETTER, ALPHA, IDEOGRAPH, POINT, QUOTE, END, WIDE_END))
"""Classes after which a space is a place to break, whatever comes before them."""
_IS_ALPHA = np.arange(13) == ALPHA
_DECISIONS = _decide()
ANNEX_TABLE = _DECISIONS + np.pad([_ENDS_WORDS, _IS_ALPHA], ((0, 0), (0, 3))).astype(np.uint8).tobytes()
"""`annex_breaks` for the extension: the decision for each pair of classes; then for `_SPACED`, and for `_HYPHENED`, a
row of 16 flags, whether the place is known after a class."""
SIMPLE_TABLE = bytes(np.where(_may_break(), _KNOWN, _HOLDS).tolist()) + bytes(32)
"""The same for `simple_breaks`."""


@functools.lru_cache(maxsize=65536)
def annex_boundaries(text: str) -> tuple[int, ...]:
    """Offsets in `text` at which Annex 14 lets a line end, the end of the text among them."""
    return tuple(line_break_boundaries(text))
