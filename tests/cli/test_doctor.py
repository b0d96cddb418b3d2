"""`ocrmem doctor` on a training config and on a script."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1).requires_grad_(False)
    def forward(self, x):
        return self.head(self.proj(x){cut}).sum()
def make():
    return Model(), torch.ones(2, 3)
"""


def doctor(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ocrmem", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT)


@pytest.mark.slow
def test_the_demo_config_is_healthy(tmp_path):
    started = time.monotonic()
    done = doctor("configs/demo.yaml", f"output_dir={tmp_path}", "--picture", tmp_path / "path.svg")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "healthy" in done.stdout
    assert (tmp_path / "path.svg").read_text().startswith(("<svg", "<?xml"))
    assert time.monotonic() - started < 120


def test_a_script_is_healthy_or_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(cut=""))
    assert doctor(f"{script}:make").returncode == 0
    script.write_text(SCRIPT.format(cut=".detach()"))
    done = doctor(f"{script}:make", "--json")
    assert done.returncode == 1
    assert "detach" in json.dumps(json.loads(done.stdout)["explanation"])


def test_what_cannot_run_says_why(tmp_path):
    done = doctor(tmp_path / "none.py:make")
    assert done.returncode == 2
    assert "is not a file" in done.stderr
    done = doctor("configs/demo.yaml", "memory.max_length=10")
    assert done.returncode == 2
    assert "max_length=10 is not above context_threshold" in done.stderr
