"""Strict loading of safetensors checkpoints, single or sharded, by their own tensor names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ocrmem.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"


def find_shards(folder: Path) -> dict[str, Path]:
    """Where each tensor of a checkpoint folder (or single file) lies.

    Raises:
        CheckpointError: there are no safetensors, or a file of them is missing or truncated.
    """
    index = folder / INDEX_NAME
    if folder.is_file():
        files: Iterable[Path] = [folder]
    elif index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{str(index)!r} is no safetensors index ({error!r}); fetch the checkpoint again."
            ) from error
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    found = {name: path for path in files for name in _names(path)}
    if not found:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} has no safetensors; give the folder of the original checkpoint, which holds "
            f"*.safetensors and perhaps {INDEX_NAME}."
        )
    return found


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(path)!r} is missing, truncated or no safetensors ({error}); fetch it again."
        ) from error


@torch.no_grad()
def load_strictly(module: nn.Module, folder: Path, *, prefix: str, unused: Iterable[str] = ()) -> None:
    """Copy the tensors under `prefix` into the parameters and buffers of `module`, keeping its dtype and device.

    Args:
        folder: checkpoint folder or file.
        prefix: of the checkpoint's names (`model.sam_model.`); tensors outside it are not looked at.
        unused: names under the prefix that the checkpoint may hold and the module does not.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; all are named.
    """
    places = {name.removeprefix(prefix): path for name, path in find_shards(folder).items() if name.startswith(prefix)}
    wanted = module.state_dict()
    wrong = [f"missing {prefix}{name}" for name in wanted.keys() - places.keys()]
    wrong += [f"unexpected {prefix}{name}" for name in places.keys() - wanted.keys() - set(unused)]
    _refuse(wrong, folder)
    for path in set(places.values()):
        with safe_open(path, framework="pt") as file:
            for name, target in wanted.items():
                if places[name] != path:
                    continue
                shape = list(file.get_slice(prefix + name).get_shape())
                if shape != list(target.shape):
                    wrong.append(f"{prefix}{name} is {shape}, expected {list(target.shape)}")
                elif not wrong:
                    target.copy_(file.get_tensor(prefix + name))
    _refuse(wrong, folder)


def _refuse(wrong: list[str], folder: Path) -> None:
    if wrong:
        shown = "; ".join(sorted(wrong)[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        raise CheckpointError(
            f"checkpoint {str(folder)!r} does not fit the encoder: {shown}. Give the original "
            "DeepSeek-OCR checkpoint, whole."
        )
