"""Real wheels for a real pip, in a folder that stands in for the package index."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from ocrmem.assets.registry import Asset

MEMBER = "ocrmem_test_asset/data.bin"


def tiny_asset(content: bytes, **changes) -> Asset:
    """An asset whose pinned file is `content`."""
    values = {
        "name": "tiny",
        "description": "a test file",
        "package": "ocrmem-test-asset",
        "version": "1.0",
        "member": MEMBER,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "license": "CC0-1.0",
        "license_text": "nowhere",
        "attribution": "made by the test",
    }
    return Asset(**{**values, **changes})


def write_wheel(index: Path, content: bytes, *, member: str = MEMBER, stored: bool = False) -> Path:
    """A wheel `ocrmem-test-asset==1.0` that holds `content` at `member`."""
    index.mkdir(exist_ok=True)
    info = "ocrmem_test_asset-1.0.dist-info"
    path = index / "ocrmem_test_asset-1.0-py3-none-any.whl"
    kind = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ocrmem-test-asset\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"{member},,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def start(script: str) -> subprocess.Popen[str]:
    """Run a Python script in a process of its own, with this process's environment and import path."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    command = [sys.executable, "-u", "-c", script]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
