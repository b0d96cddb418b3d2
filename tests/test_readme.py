"""The README's Python runs as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

UNTRAINED = """
from pathlib import Path
from ocrmem.config.train import load_train_config
from ocrmem.training.build import build_model
model, _ = build_model(load_train_config(Path({config!r})))
model.save_pretrained("demo/run/adapter")
"""


@pytest.mark.slow
def test_the_ten_lines_run(tmp_path):
    (tmp_path / "demo").mkdir()
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"Sentence {n} of a long talk."} for n in range(60)]
    (tmp_path / "demo" / "history.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    code = UNTRAINED.format(config=str(ROOT / "configs" / "demo.yaml")) + blocks[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"memory: \d+ turns, \d+ text tokens as \d+ memory tokens \(ratio \d\.\d\d\)", done.stdout)
    assert "trainable params: 1,438,848" in done.stdout
