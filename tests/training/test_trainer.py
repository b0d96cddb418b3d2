"""MEMTrainer: learns, saves little, resumes exactly, survives a batch without memory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from training.worker import TinyDataset, build_trainer

from ocrmem.errors import CheckpointError, ConfigError, FrozenPartError, TrainingError
from ocrmem.training.trainer import last_checkpoint

WORKER = Path(__file__).with_name("worker.py")
GOLDEN_LOSSES = [4.652152, 4.647295, 4.576700, 4.613578, 4.673703, 4.671571, 4.565627, 4.590390]
"""Loss of each of eight steps; a refactoring must give these. Regenerate: python tests/training/worker.py RUN_DIR"""


def run(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, str(WORKER), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    losses = [float(word) for word in done.stdout.split("losses")[1].split()]
    return load_file(folder / "adapter" / "adapter.safetensors"), losses


def test_golden_loss_curve(straight):
    _, losses = straight
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=2e-4)


def test_a_batch_that_comes_again_and_again_is_learnt(tmp_path):
    """Eight steps on different samples say nothing of that: their losses differ by more than is learnt."""
    trainer = build_trainer(tmp_path, steps=40, save_strategy="no")
    trainer.train_dataset = TinyDataset(size=3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] - 0.03 > losses[10] > losses[20] + 0.03
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("kill", "step", "last_whole"),
    [
        ("--kill-at-step", 4, 2),
        ("--kill-at-step", 5, 4),
        ("--kill-while-saving", 4, 2),
        ("--kill-while-saving", 6, 4),
    ],
)
def test_a_killed_run_goes_on_exactly(straight, tmp_path, kill, step, last_whole):
    killed = run(tmp_path, kill, step)
    assert killed.returncode == -signal.SIGKILL
    assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{last_whole}"
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "adapter" / "adapter.safetensors")
    for key, value in straight[0].items():
        assert torch.equal(found[key], value), key


def test_checkpoints_hold_the_adapter_alone(tmp_path):
    trainer = build_trainer(tmp_path, steps=2)
    trainer.train()
    checkpoint = last_checkpoint(tmp_path)
    names = {path.name for path in checkpoint.iterdir()}
    assert {
        "adapter.safetensors",
        "config.json",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
    } <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "training_args.bin"}
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == len(list(trainer.model.proj.parameters()))
    assert not (tmp_path / "incomplete").exists()


def test_the_frozen_parts_do_not_change_and_the_projection_does(tmp_path):
    trainer = build_trainer(tmp_path, steps=3)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    for key, value in trainer.model.state_dict().items():
        changed = not torch.equal(value, before[key])
        assert changed == (key.startswith("proj.") and not key.endswith("embedding_rms")), key


def test_features_are_encoded_once(tmp_path):
    trainer = build_trainer(tmp_path, steps=8)
    calls = []
    trainer.model.ocr_embed.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    trainer.train()
    assert sum(calls) == 48, "8 steps of 3 samples of 2 pages, one epoch: each page once"
    again = build_trainer(tmp_path / "again", steps=8)
    again.feature_store = trainer.feature_store
    again.model.ocr_embed.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    again.train()
    assert sum(calls) == 48, "the second run reads the cache"


def test_tensorboard_by_the_usual_report_to(tmp_path):
    build_trainer(tmp_path, steps=1, report_to="tensorboard").train()
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_save_total_limit_and_best_checkpoint(tmp_path):
    trainer = build_trainer(
        tmp_path,
        steps=8,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        prediction_loss_only=True,
    )
    trainer.train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert "checkpoint-8" in kept
    assert len(kept) <= 2
    assert Path(trainer.state.best_model_checkpoint).name in kept
    best = load_file(Path(trainer.state.best_model_checkpoint) / "adapter.safetensors")
    assert torch.equal(best["linear1.weight"], trainer.model.proj.linear1.weight)


def test_two_processes_one_without_memory(tmp_path):
    done = run(tmp_path / "two", "--steps", 4, "--lonely-rank", 1, processes=2)
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "two" / "adapter" / "adapter.safetensors")
    assert any(value.any() for value in two.values())
    assert [float(loss) for loss in done.stdout.split("losses")[1].split()]


def test_gradient_checkpointing_trains_to_the_same_weights(straight, tmp_path):
    trainer = build_trainer(tmp_path, steps=8, gradient_checkpointing=True)
    trainer.train()
    for key, value in straight[0].items():
        torch.testing.assert_close(trainer.model.proj.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def poison(trainer, steps):
    """Make the gradient NaN at these steps, counted from 0."""
    return trainer.model.proj.linear2.weight.register_hook(
        lambda grad: grad * float("nan") if trainer.state.global_step in steps else grad
    )


def test_one_gradient_that_is_no_number_is_left_out(tmp_path, caplog):
    trainer = build_trainer(tmp_path, steps=6)
    hook = poison(trainer, {3})
    trainer.train()
    hook.remove()
    assert trainer.state.global_step == 6
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.proj.parameters())
    assert "not finite at step 4; its batch is left out" in caplog.text


def test_gradients_that_are_no_numbers_three_times_running_stop_the_run(tmp_path):
    trainer = build_trainer(tmp_path, steps=6)
    hook = poison(trainer, {2, 3, 4})
    with pytest.raises(TrainingError, match="gradient of the projection is not finite at step 5, nor was it at the 2"):
        trainer.train()
    hook.remove()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.proj.parameters())


def test_something_else_trainable_is_refused(tmp_path):
    trainer = build_trainer(tmp_path, steps=1)
    trainer.model.ocr_embed.conv.weight.requires_grad_(True)
    with pytest.raises(FrozenPartError, match="trainable but not in proj: ocr_embed.conv.weight"):
        type(trainer)(trainer.model, trainer.args, data_collator=trainer.data_collator)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    trainer = build_trainer(tmp_path, steps=1)
    trainer.args._n_gpu = 2
    with pytest.raises(ConfigError, match="2 GPUs are visible to one process.*torchrun --nproc-per-node 2"):
        type(trainer)(tiny_model(), trainer.args, data_collator=trainer.data_collator)


def test_a_full_disk_ends_the_run_with_a_message(tmp_path):
    import resource

    trainer = build_trainer(tmp_path, steps=4)
    trainer.train()
    before = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    more = build_trainer(tmp_path, steps=6)
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, old_limit[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be (written|saved)"):
            more.train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == before
