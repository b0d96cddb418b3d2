"""A real PostgreSQL server of one's own, in a temporary folder, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`; None where there is no server."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


@contextlib.contextmanager
def server() -> Iterator[str]:
    """URL of an empty database. PostgreSQL refuses to run as root, so root starts it as `nobody`."""
    folder = binaries()
    assert folder is not None
    root = Path(tempfile.mkdtemp(prefix="ocrmem-postgres-"))
    as_user = {}
    if os.geteuid() == 0:
        as_user = {"user": "nobody", "group": "nogroup"}
        shutil.chown(root, "nobody")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = root / "data"
    try:
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": root, **as_user}
        command = [folder / "initdb", "-D", data, "-U", "ocrmem", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(command, **quiet)
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={root}"
        control = [folder / "pg_ctl", "-D", data, "-l", root / "log", "-w"]
        subprocess.run([*control, "-o", options, "start"], **quiet)
        try:
            yield f"postgresql://ocrmem@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(root, ignore_errors=True)
