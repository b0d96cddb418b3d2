"""A visible box with a code point in it, for characters that no font has."""

from __future__ import annotations

import numpy as np

# Hexadecimal digits of 3 × 5 pixels, each row as three bits.
_DIGITS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 3, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
    "A": (2, 5, 7, 5, 5),
    "B": (6, 5, 6, 5, 6),
    "C": (3, 4, 4, 4, 3),
    "D": (6, 5, 5, 5, 6),
    "E": (7, 4, 6, 4, 7),
    "F": (7, 4, 6, 4, 4),
}


def hex_box(code: int, *, height: int) -> np.ndarray:
    """Coverage [h, w] of a box with the code point in hexadecimal, at most `height` pixels high.

    Four digits stand in two rows where there is room (Unicode's own convention), else in one.
    """
    digits = f"{code:04X}"
    num_rows = 2 if height >= 15 else 1
    scale = max(1, (height - 3) // (6 * num_rows) if height >= 9 else 1)
    scale = min(scale, 2)
    per_row = -(-len(digits) // num_rows)
    rows = [digits[i : i + per_row].rjust(per_row, "0") for i in range(0, len(digits), per_row)]
    inner = np.zeros((6 * num_rows + 1, 4 * per_row + 1), dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, digit in enumerate(row):
            bits = np.array([[bits >> shift & 1 for shift in (2, 1, 0)] for bits in _DIGITS[digit]], dtype=np.uint8)
            inner[1 + 6 * y : 6 + 6 * y, 1 + 4 * x : 4 + 4 * x] = bits * 255
    inner = inner.repeat(scale, axis=0).repeat(scale, axis=1)
    return np.pad(inner, 1, constant_values=255)[:height]
