"""Shards of the feature cache: the features of many pages in one file, written by `ocrmem encode`.

```
FOLDER/shards/PROFILE/profile.json        which encoder, weights, page settings and dtype, in words
FOLDER/shards/PROFILE/BLOCK.safetensors   features [R, E]: the rows in use of its P pages, one after the other
                                          keys uint8 [P, 32], ends int64 [P], crc32 int64 [P]
```

A shard appears whole or not at all. PROFILE is a digest of what decides the features of a text, BLOCK one of the
conversations whose pages it holds, so a name says whether the work is done. Letters besides those of `types`: R rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ocrmem.errors import ConfigError
from ocrmem.files import write_files, write_text

log = logging.getLogger(__name__)

SHARD_VERSION = 1
"""Part of every profile's digest; raise it when what a shard means changes."""
SHARDS = "shards"
"""Folder of the shards in a feature cache."""
PROFILE_FILE = "profile.json"
NUM_OPEN = 64
"""Shards that a reader keeps open; each is mapped into memory and takes one file descriptor."""


class DamagedShardError(Exception):
    """A shard cannot be used; the message says why. Caught by whoever reads: its pages are encoded again."""


@dataclass(frozen=True, kw_only=True)
class FeatureProfile:
    """What decides the features of a text, with the words for it that a person needs."""

    encoder_identity: str
    """`OCREncoder.identity()`."""
    render_identity: str
    """`render_identity(settings)`."""
    dtype: str
    """Type to which the features are rounded (`float16`)."""
    encoder: dict[str, Any]
    """The config's `encoder` section."""
    page: dict[str, Any]
    """The page settings in force."""

    @property
    def digest(self) -> str:
        """Hex digest of the identities and the dtype: the name of the profile's folder."""
        values = [SHARD_VERSION, self.encoder_identity, self.render_identity, self.dtype]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]

    def differences(self, other: FeatureProfile) -> str:
        """What `other` has otherwise, for a message: `encoder.settings.steps_per_token 16, here 12`."""
        mine, theirs = _flat(dataclasses.asdict(self)), _flat(dataclasses.asdict(other))
        named = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
        shown = [key for key in named if not key.endswith("_identity")]
        if shown:
            return "; ".join(f"{key} {theirs.get(key)!r}, here {mine.get(key)!r}" for key in shown)
        if "encoder_identity" in named:
            return "other encoder weights under the same settings"
        return "another font or version of the renderer" if named else "another version of the cache"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def crc32(features: torch.Tensor) -> int:
    """Checksum of the bytes of a tensor on the CPU."""
    return zlib.crc32(features.contiguous().view(torch.uint8).numpy().data)


def used_rows(features_VE: torch.Tensor) -> torch.Tensor:
    """The features up to the last that is not zero, on the CPU.

    Encoders give zeros for lines without ink, and most pages of a data set are a last page, half empty.
    """
    used = features_VE.any(dim=1).nonzero()
    rows = int(used[-1]) + 1 if len(used) else 0
    return features_VE[:rows].cpu().contiguous()


class ShardFolder:
    """The shards of one profile: where they are written.

    Args:
        cache: the feature cache.
        profile: what the features are made with.
    """

    def __init__(self, cache: Path, profile: FeatureProfile) -> None:
        self.profile = profile
        self.folder = Path(cache) / SHARDS / profile.digest

    def path(self, block: str) -> Path:
        """Where the shard of a block is kept."""
        return self.folder / f"{block}.safetensors"

    def prepare(self) -> None:
        """Make the folder and say in it what its features were made with."""
        if not (self.folder / PROFILE_FILE).exists():
            write_text(self.folder / PROFILE_FILE, json.dumps(dataclasses.asdict(self.profile), indent=1) + "\n")

    def state(self, block: str) -> int | None:
        """Pages of a block that is done, read and compared with its checksums; None where it has to be encoded.

        A damaged shard is a warning.
        """
        path = self.path(block)
        if not path.exists():
            return None
        try:
            shard = Shard(path)
            for page in range(len(shard.keys_P32)):
                shard.features(page)
        except DamagedShardError as error:
            log.warning("shard %s is damaged (%s); it is encoded again", path, error)
            return None
        return len(shard.keys_P32)

    def write(self, block: str, keys: Sequence[str], features: Sequence[torch.Tensor], *, width: int) -> int:
        """Write the shard of a block, whole or not at all; its bytes.

        Args:
            keys: P page keys.
            features: of each page, the rows in use, all of one dtype.
            width: E, for a block without pages.
        """
        dtype = getattr(torch, self.profile.dtype)
        tensors = {
            "features": torch.cat([torch.zeros(0, width, dtype=dtype), *features]),
            "keys": torch.from_numpy(_key_bytes(keys)),
            "ends": torch.tensor([len(rows) for rows in features], dtype=torch.int64).cumsum(0),
            "crc32": torch.tensor([crc32(rows) for rows in features], dtype=torch.int64),
        }
        # One entry: several would come in another order every time, and the files would differ.
        data = save(tensors, metadata={"profile": self.profile.digest})
        path = self.path(block)
        write_files(path.parent, {path.name: lambda temporary: temporary.write_bytes(data)})
        return len(data)

    def others(self) -> list[FeatureProfile]:
        """The other profiles that have shards in the same cache."""
        found = []
        for path in sorted(self.folder.parent.glob(f"*/{PROFILE_FILE}")):
            if path.parent == self.folder or next(path.parent.glob("*.safetensors"), None) is None:
                continue
            try:
                found.append(FeatureProfile(**json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s cannot be read (%s); the shards beside it are left alone", path, error)
        return found

    def left_over(self) -> list[Path]:
        """Halves of shards that killed processes left behind. Ask only while nobody writes."""
        return sorted(self.folder.glob(".*.tmp"))

    def count(self) -> int:
        """Shards of the profile."""
        return sum(1 for _ in self.folder.glob("*.safetensors"))


def _key_bytes(keys: Sequence[str]) -> np.ndarray:
    return np.frombuffer(b"".join(bytes.fromhex(key) for key in keys), dtype=np.uint8).reshape(-1, 32).copy()


class Shard:
    """One shard, opened for reading.

    Raises:
        DamagedShardError: it is cut short, no safetensors file, or its parts contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.keys_P32 = self._file.get_tensor("keys").numpy()
            self._ends = self._file.get_tensor("ends").tolist()
            self._crc32 = self._file.get_tensor("crc32").tolist()
            rows = self._file.get_slice("features").get_shape()[0]
            profile = (self._file.metadata() or {}).get("profile")
        except FileNotFoundError as error:
            raise DamagedShardError("it has gone") from error
        except (OSError, SafetensorError, KeyError, IndexError) as error:
            raise DamagedShardError(str(error)) from error
        pages = len(self._ends)
        if self.keys_P32.shape != (pages, 32) or len(self._crc32) != pages or rows != (self._ends or [0])[-1]:
            raise DamagedShardError("its parts are of different lengths")
        if profile != path.parent.name:
            raise DamagedShardError(f"it was made under another profile, {profile}")

    def features(self, page: int) -> torch.Tensor:
        """The rows in use [rows, E] of a page.

        Raises:
            DamagedShardError: they are not what was written.
        """
        start, end = self._ends[page - 1] if page else 0, self._ends[page]
        try:
            rows = self._file.get_slice("features")[start:end]
        except (OSError, SafetensorError) as error:
            raise DamagedShardError(str(error)) from error
        if crc32(rows) != self._crc32[page]:
            raise DamagedShardError(f"the checksum of its page {page} is wrong")
        return rows


class ShardReader:
    """Finds pages in all shards of a feature cache, whatever their profile: a page's key tells profiles apart.

    The keys are read once, when the first page is asked for: 16 bytes of memory a page.

    Args:
        cache: the feature cache.
    """

    def __init__(self, cache: Path) -> None:
        self.folder = Path(cache) / SHARDS
        self._index: tuple[list[Path], np.ndarray, np.ndarray, np.ndarray] | None = None
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._damaged: set[int] = set()

    def find(self, key: str) -> torch.Tensor | None:
        """The rows in use [rows, E] of a page; None where no shard has it, or the shard that has it is damaged."""
        for number, page in self._places(bytes.fromhex(key)):
            try:
                shard = self._shard(number)
                if shard.keys_P32[page].tobytes().hex() == key:
                    return shard.features(page)
            except DamagedShardError as error:
                self._damage(number, str(error))
        return None

    def _places(self, key: bytes) -> Iterator[tuple[int, int]]:
        """Shard and page of every key that begins with the same 64 bits."""
        paths, heads_N, shards_N, pages_N = self._read_index()
        head = np.frombuffer(key[:8], dtype=">u8")[0] if paths else 0
        first = int(np.searchsorted(heads_N, head))
        while first < len(heads_N) and heads_N[first] == head:
            if int(shards_N[first]) not in self._damaged:
                yield int(shards_N[first]), int(pages_N[first])
            first += 1

    def _read_index(self) -> tuple[list[Path], np.ndarray, np.ndarray, np.ndarray]:
        if self._index is not None:
            return self._index
        paths = sorted(self.folder.glob("*/*.safetensors"))
        heads, shards, pages = [], [], []
        for number, path in enumerate(paths):
            try:
                keys_P32 = Shard(path).keys_P32
            except DamagedShardError as error:
                self._damage(number, str(error), path)
                continue
            heads.append(keys_P32[:, :8].copy().view(">u8")[:, 0].astype(np.uint64))
            shards.append(np.full(len(keys_P32), number, dtype=np.uint32))
            pages.append(np.arange(len(keys_P32), dtype=np.uint32))
        all_heads = np.concatenate([np.zeros(0, dtype=np.uint64), *heads])
        order = np.argsort(all_heads, kind="stable")
        all_shards = np.concatenate([np.zeros(0, dtype=np.uint32), *shards])[order]
        all_pages = np.concatenate([np.zeros(0, dtype=np.uint32), *pages])[order]
        self._index = (paths, all_heads[order], all_shards, all_pages)
        return self._index

    def _shard(self, number: int) -> Shard:
        shard = self._open.pop(number, None)
        if shard is None:
            shard = Shard(self._read_index()[0][number])
            while len(self._open) >= NUM_OPEN:
                self._open.popitem(last=False)
        self._open[number] = shard
        return shard

    def _damage(self, number: int, reason: str, path: Path | None = None) -> None:
        self._damaged.add(number)
        path = path or self._read_index()[0][number]
        log.warning(
            "shard %s is damaged (%s); its pages are encoded again when they are met, and the next `ocrmem encode` "
            "writes it anew",
            path,
            reason,
        )


def refuse_file(folder: Path) -> None:
    """Raise a `ConfigError` where a feature cache should be and a file is."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"feature cache {str(folder)!r} is a file; give the path of a folder, new or existing.")
