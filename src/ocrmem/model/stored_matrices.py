"""Weight matrices in a file: float32, bfloat16 at half the size, or int8 at a quarter.

int8 is symmetric, with a scale for each output row: `x.weight` int8 [rows, columns], and `x.weight_scale` float32
[rows], the name that compressed-tensors has for it (there it is [rows, 1]). A weight is its integer times its scale.
"""

from __future__ import annotations

import torch

from ocrmem.errors import ConfigError

SCALE_SUFFIX = "_scale"
INT8_MAX = 127


def rounded(weights: dict[str, torch.Tensor], matrix_dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Tensors as they are stored: those of two dimensions in `matrix_dtype`, int8 ones with their scales beside them.

    Args:
        weights: by name, whole and on the CPU.
        matrix_dtype: bfloat16 or int8; None: every tensor as it is.

    Raises:
        ConfigError: another type.
    """
    if matrix_dtype is None:
        return weights
    if matrix_dtype not in (torch.bfloat16, torch.int8):
        raise ConfigError(f"matrix_dtype={matrix_dtype}: expected torch.bfloat16, torch.int8 or None (float32).")
    stored: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        if value.ndim != 2 or not value.is_floating_point():
            stored[key] = value
        elif matrix_dtype == torch.int8:
            stored[key], stored[key + SCALE_SUFFIX] = to_int8(value)
        else:
            stored[key] = value.to(matrix_dtype)
    return stored


def to_int8(matrix_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as int8 [rows, columns] and float32 scales [rows]: the row's largest magnitude / 127, 1 for zeros.

    A weight comes back within half its row's scale, if that is no subnormal number; a row that holds NaN or an
    infinity, without any finite number.
    """
    matrix_RC = matrix_RC.float()
    scale_R = matrix_RC.abs().amax(dim=1) / INT8_MAX
    scale_R = torch.where(scale_R == 0, 1.0, scale_R)
    # The quotient passes 127 where the scale itself was rounded down, among subnormal numbers.
    steps_RC = (matrix_RC / scale_R[:, None]).round().clamp(-INT8_MAX, INT8_MAX)
    return steps_RC.to(torch.int8), scale_R


def restored(stored: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Stored tensors with their matrices in float32 again, and what is wrong with int8 ones, as text.

    A scale that belongs to no int8 matrix stays among the tensors.
    """
    weights, wrong = dict(stored), []
    for key, value in stored.items():
        if value.dtype == torch.bfloat16:
            weights[key] = value.float()
        elif value.dtype == torch.int8 and value.ndim == 2:
            scale = weights.pop(key + SCALE_SUFFIX, None)
            expected = torch.empty(value.shape[0], device="meta")
            if scale is None:
                wrong.append(f"missing {key}{SCALE_SUFFIX}, the scales of {key}, which is {form(value)}")
            elif form(scale) != form(expected):
                wrong.append(f"{key}{SCALE_SUFFIX} is {form(scale)}, expected {form(expected)}")
                scale = None
            weights[key] = value.float() if scale is None else value.float() * scale[:, None]
    return weights, wrong


def form(tensor: torch.Tensor) -> str:
    """Type and shape, for messages: `float32 [3, 4]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
