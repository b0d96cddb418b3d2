"""Two gloo processes on the CPU, however they share the model: what one process gives, and checkpoints for any."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ocrmem.training.trainer import last_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
FSDP2 = {f"FSDP_{name}": value for name, value in (
    ("VERSION", "2"), ("AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"), ("RESHARD_AFTER_FORWARD", "true"),
    ("STATE_DICT_TYPE", "FULL_STATE_DICT"), ("CPU_RAM_EFFICIENT_LOADING", "false"),
)} | {"ACCELERATE_USE_FSDP": "true"}  # fmt: skip
"""What `accelerate launch` makes of configs/accelerate/fsdp2.yaml."""
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def run(folder: Path, *arguments: object, processes: int, wrapper: str = "none") -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        arguments = (*arguments, "--wrapper", wrapper)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= FSDP2 if wrapper == "fsdp2" and processes > 1 else {}
    return subprocess.run(
        [*launcher, str(WORKER), str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


def losses(done: subprocess.CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(word) for word in done.stdout.split("losses")[1].split()[:2]]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


PLAIN_STEPS = ("--steps", 2, "--sgd")
"""Steps at rate 1 without momentum: the weights move by the gradient itself. The second step's last sample, which is
the second process's whole batch, has no memory."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return losses(run(folder, *PLAIN_STEPS, "--batch-size", 2, processes=1)), adapter(folder)


@pytest.mark.parametrize(
    "wrapper",
    ["none", "fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_two_processes_learn_what_one_learns(alone, tmp_path, wrapper):
    done = run(tmp_path, *PLAIN_STEPS, "--batch-size", 1, processes=2, wrapper=wrapper)
    assert losses(done) == pytest.approx(alone[0], abs=1e-5)
    assert ("the run is DDP" in done.stderr) is False
    for name, value in adapter(tmp_path).items():
        torch.testing.assert_close(value, alone[1][name], rtol=0, atol=1e-5)
    names = {path.name for path in last_checkpoint(tmp_path).rglob("*")}
    assert {"adapter.safetensors", "optimizer.pt", "scheduler.pt"} <= names
    assert not [name for name in names if name.startswith(("model", "pytorch_model", "global_step", "optimizer_"))]


@pytest.mark.parametrize(
    "wrapper", ["fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]
)
def test_a_run_goes_on_on_two_one_and_two_processes(tmp_path, wrapper):
    """AdamW's state moves with it: the weights are those of an undisturbed run in one process. The projection has all
    that it can have, its reader's table too, which is in no checkpoint."""
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    common = ("--read-tokens", 2, "--steps", 6, "--batch-size")
    assert run(straight, *common, 2, processes=1).returncode == 0
    for steps, processes in ((2, 2), (4, 1), (6, 2)):
        # The schedule of all pieces is that of the whole run, so each but the last is cut short.
        stop = ["--stop-after", steps] if steps < 6 else []
        done = run(moved, *common, 2 // processes, *stop, processes=processes, wrapper=wrapper)
        assert done.returncode == 0, done.stderr[-3000:]
        assert last_checkpoint(moved).name == f"checkpoint-{steps}"
    for name, value in adapter(moved).items():
        torch.testing.assert_close(value, adapter(straight)[name], rtol=0, atol=2e-5)


def test_a_killed_rank_ends_the_run_and_the_last_checkpoint_loads(tmp_path):
    arguments = ("--steps", 6, "--batch-size", 1)
    done = run(tmp_path, *arguments, "--kill-at-step", 3, "--kill-rank", 1, processes=2)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL) received" in done.stderr
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert load_file(tmp_path / "checkpoint-2" / "adapter.safetensors")
    done = run(tmp_path, *arguments, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert last_checkpoint(tmp_path).name == "checkpoint-6"


def test_fsdp_that_becomes_ddp_is_said(tmp_path, monkeypatch, caplog):
    from training.worker import build_trainer

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    build_trainer(tmp_path, steps=1)
    assert "the launcher asks for FSDP, but accelerate shards on accelerators only" in caplog.text


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_launch_config_is_accelerates(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    values = yaml.safe_load(path.read_text())
    if "deepspeed_config" in values:
        assert (ROOT / values["deepspeed_config"]["deepspeed_config_file"]).exists()
    assert f"--config_file {path.relative_to(ROOT)}" in path.read_text()
