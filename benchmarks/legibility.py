"""What PP-OCR's own head reads of a page: densities, fonts, and ways to set roles apart.

    python benchmarks/legibility.py

Writes benchmarks/results/legibility.json and the plot docs/render/legibility.png. It is `ocrmem tune-page` three times:

    ocrmem tune-page --try cell_width=7,8,9,10,11,12
    ocrmem tune-page --try roles=text,rule,inverse --text chat
    ocrmem tune-page --try layout=simple,unicode
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from importlib import metadata
from pathlib import Path

from ocrmem.config.encoder import EncoderSettings
from ocrmem.evaluation.legibility import load_text, tune, write_plot

GRIDS = {
    "density": (("english", "chinese"), {"cell_width": [7, 8, 9, 10, 11, 12]}),
    "roles": (("chat",), {"roles": ["text", "rule", "inverse"]}),
    "layout": (("english", "chinese"), {"layout": ["simple", "unicode"]}),
}


def main() -> None:
    """Measure every grid and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/legibility.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/render/legibility.png"))
    parser.add_argument("--pages", type=int, default=8)
    parser.add_argument("--only", choices=GRIDS, nargs="*", default=list(GRIDS))
    options = parser.parse_args()
    found = {}
    for name in options.only:
        names, grid = GRIDS[name]
        texts = {text: load_text(text) for text in names}
        results = []
        for part in tune(EncoderSettings(name="pp-ocr"), texts, grid, max_pages=options.pages):
            results += part
            for row in part:
                print(name, dict(row.settings), row.text, f"{row.recovered:.2%}", file=sys.stderr)
        found[name] = [
            {
                key: round(value, 5) if isinstance(value, float) else value
                for key, value in dataclasses.asdict(r).items()
            }
            for r in results
        ]
        if name == "density":
            options.plot.parent.mkdir(parents=True, exist_ok=True)
            write_plot(results, options.plot)
    document = {
        "command": "python benchmarks/legibility.py",
        "device": "2 cores",
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "numpy", "pillow", "rapidfuzz")
        },
        "pages_of_each_text": options.pages,
        **found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
