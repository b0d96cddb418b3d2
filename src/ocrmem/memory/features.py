"""Features of pages, computed once and kept by content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ocrmem.encoders.base import OCREncoder
from ocrmem.errors import CheckpointError, ConfigError
from ocrmem.files import write_files
from ocrmem.memory.shards import ShardReader, crc32, refuse_file, used_rows

log = logging.getLogger(__name__)

KEY_VERSION = 1
"""Part of every key; raise it when what a stored file means changes."""


def page_key(page_text: str, *, encoder_identity: str, render_identity: str, dtype: torch.dtype) -> str:
    """Hex SHA-256 of everything that decides a page's features.

    Args:
        page_text: the text that the page holds, from its first to its last character.
        encoder_identity: `OCREncoder.identity()`.
        render_identity: `render_identity(settings)`.
        dtype: type to which the features are rounded.
    """
    header = json.dumps([KEY_VERSION, encoder_identity, render_identity, str(dtype).removeprefix("torch.")])
    # Lone surrogates are content, and have no UTF-8 form without surrogatepass.
    return hashlib.sha256(header.encode() + b"\n" + page_text.encode("utf-8", "surrogatepass")).hexdigest()


class FeatureStore:
    """A folder of features: one safetensors file for each page that was encoded when it was met, in 256 subfolders,
    and the shards of pages that `ocrmem encode` wrote ahead (`memory.shards`). A page is looked up in both.

    Any number of processes may read and write it at once: a file appears whole or not at all, and two writers
    of one key write the same content. A file that is damaged is removed and its page encoded again. Where the
    disk is full, features are no longer kept, with a warning: they are derived data, and the run goes on.

    Args:
        folder: created when the first features are written.

    Raises:
        ConfigError: `folder` is a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        refuse_file(self.folder)
        self._writable = True
        self._shards = ShardReader(self.folder)

    def path(self, key: str) -> Path:
        """Where the features of a key are kept."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str, *, tokens_per_page: int, feature_width: int, dtype: torch.dtype) -> torch.Tensor | None:
        """features_VE of one page, on the CPU; None where they are not kept, or were damaged."""
        features_VE = self._shards.find(key)
        if features_VE is None:
            features_VE = self._single(key)
        if features_VE is None:
            return None
        rows, width = features_VE.shape if features_VE.ndim == 2 else (-1, -1)
        if features_VE.dtype != dtype or width != feature_width or not 0 <= rows <= tokens_per_page:
            return self._discard(self.path(key), f"it holds {features_VE.dtype} of shape {tuple(features_VE.shape)}")
        if rows == tokens_per_page:
            return features_VE
        full_VE = features_VE.new_zeros(tokens_per_page, feature_width)
        full_VE[:rows] = features_VE
        return full_VE

    def _single(self, key: str) -> torch.Tensor | None:
        """The rows in use of a page that has a file of its own."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                features_VE = file.get_tensor("features")
                metadata = file.metadata() or {}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            return self._discard(path, str(error))
        if metadata.get("crc32") != str(crc32(features_VE)):
            return self._discard(path, "its checksum is wrong")
        return features_VE

    def put(self, key: str, features_VE: torch.Tensor) -> None:
        """Keep the features of one page. A folder that cannot be written is a warning, given once."""
        if not self._writable:
            return
        features_VE = used_rows(features_VE)
        data = save({"features": features_VE}, metadata={"crc32": str(crc32(features_VE))})
        try:
            write_files(self.path(key).parent, {self.path(key).name: lambda temporary: temporary.write_bytes(data)})
        except OSError as error:
            self._writable = False
            log.warning(
                "features are no longer cached: %s cannot be written (%s). The run goes on without; free "
                "some space or give another feature_cache to have them kept.",
                self.folder,
                error.strerror or error,
            )

    def _discard(self, path: Path, reason: str) -> None:
        log.warning("cached features %s are damaged (%s); they are removed and computed again", path, reason)
        path.unlink(missing_ok=True)


def encode_pages(
    encoder: OCREncoder,
    pages_PHW: torch.Tensor,
    keys: Sequence[str],
    *,
    store: FeatureStore | None,
    dtype: torch.dtype,
    device: torch.device | None = None,
    batch_size: int = 16,
) -> torch.Tensor:
    """Features of pages, from the store where they are kept, else from the encoder, and then kept.

    Fresh features are rounded to `dtype` as kept ones are, so both give the same loss. Pages of the same key
    are encoded once. There is no gradient: nothing before the features learns.

    Args:
        pages_PHW: uint8, as the encoder takes them.
        keys: P keys, by `page_key` with the same `dtype`.
        store: None: nothing is kept.
        dtype: type of the result.
        device: where the result goes, and where the encoder is; None: where the pages are.
        batch_size: pages that the encoder is given at once.

    Returns:
        features_PVE.

    Raises:
        ConfigError: a feature is too large for `dtype`.
        CheckpointError: the encoder gave values that are no finite numbers.
    """
    assert len(keys) == pages_PHW.shape[0], f"{len(keys)} keys for {pages_PHW.shape[0]} pages"
    device = pages_PHW.device if device is None else device
    shape = (encoder.tokens_per_page, encoder.feature_width)
    found: dict[str, torch.Tensor] = {}
    missing: dict[str, int] = {}
    for index, key in enumerate(keys):
        if key in found or key in missing:
            continue
        kept_VE = None
        if store is not None:
            kept_VE = store.get(key, tokens_per_page=shape[0], feature_width=shape[1], dtype=dtype)
        if kept_VE is None:
            missing[key] = index
        else:
            found[key] = kept_VE.to(device)
    todo = list(missing.items())
    for begin in range(0, len(todo), batch_size):
        part = todo[begin : begin + batch_size]
        indices = [index for _, index in part]
        run = slice(indices[0], indices[-1] + 1)  # of neighbours, as mostly: they need no copy
        pages = pages_PHW[run if len(indices) == run.stop - run.start else indices].to(device)
        # Not inference_mode: no tensor of its kind may get out, since no backward can save one.
        with torch.no_grad():
            fresh_PVE = round_features(encoder(pages), dtype, encoder.name)
        for (key, _), fresh_VE in zip(part, fresh_PVE, strict=True):
            found[key] = fresh_VE
            if store is not None:
                store.put(key, fresh_VE)
    if not keys:
        return torch.zeros(0, *shape, dtype=dtype, device=device)
    return torch.stack([found[key] for key in keys])


def round_features(features_PVE: torch.Tensor, dtype: torch.dtype, encoder_name: str) -> torch.Tensor:
    """Features in the type in which they are kept.

    Raises:
        ConfigError: one is too large for it.
        CheckpointError: one is no finite number.
    """
    if not bool(torch.isfinite(features_PVE).all()):
        raise CheckpointError(
            f"encoder {encoder_name!r} gave features that are not finite numbers: its weights are damaged, "
            "or its dtype is too narrow for them. Fetch the weights again, or give the encoder dtype: "
            "float32."
        )
    rounded_PVE = features_PVE.to(dtype)
    if not bool(torch.isfinite(rounded_PVE).all()):
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"a feature of encoder {encoder_name!r} is {float(features_PVE.abs().max()):.4g}, too large for "
            f"feature_dtype={name!r}, which ends at {torch.finfo(dtype).max:.4g}. Set memory.feature_dtype "
            "to bfloat16 or float32."
        )
    return rounded_PVE
