"""Trains the tiny model; run by the tests as a process of its own, alone or under torchrun.

python worker.py RUN_DIR [--steps N] [--kill-at-step K] [--kill-while-saving K] [--lonely-rank R] [--checkpointing]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import tiny_batch, tiny_model

if importlib.util.find_spec("deepspeed"):
    import deepspeed  # before a process group is made, or it holds that for good
    import deepspeed.ops

    # Gloo alone. DeepSpeed would compile collectives over shared memory when they are first used, which takes a minute
    # and more; a process that is stopped meanwhile leaves a lock behind, at which every later one waits for good.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

from ocrmem.data.collator import MEMCollator
from ocrmem.memory.features import FeatureStore
from ocrmem.training.trainer import MEMTrainer, last_checkpoint, leave_process_group

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"


class Stop(TrainerCallback):
    """Ends training in good order after a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


class TinyDataset(Dataset):
    """Samples as `MEMDataset` gives them; those in `lonely` have no memory."""

    def __init__(self, size: int = 24, lonely: frozenset[int] = frozenset()) -> None:
        self.items = []
        for index in range(size):
            batch = tiny_batch(((),) if index in lonely else ((21, 7),), text=(6,), reply=4, seed=index)
            num_pages = 0 if index in lonely else 2
            item = {
                "input_ids": batch["input_ids"][0],
                "labels": batch["labels"][0],
                "pages": batch.get("pages", torch.zeros(0, 15, 28, dtype=torch.uint8)),
                "page_keys": [f"{index:02d}{page}".ljust(64, "0") for page in range(num_pages)],
                "page_num_tokens": batch.get("page_num_tokens", torch.zeros(0, dtype=torch.int64)),
            }
            self.items.append(item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return dict(self.items[index])


class Kill(TrainerCallback):
    """Ends the process as an out-of-memory killer would, at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def shard_on_the_cpu() -> None:
    """Let accelerate shard with FSDP2 on the CPU too, as it does on GPUs; by itself it makes a DDP run of it."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    make = AcceleratorState.__init__

    def with_fsdp(self, *arguments, fsdp_plugin=None, **keywords):
        fresh = "fsdp_plugin" not in AcceleratorState._shared_state
        make(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
        if fresh and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def kill_while_saving(trainer: MEMTrainer, step: int) -> None:
    """End the process in the middle of the checkpoint of that step: weights written, optimizer state not."""
    save = trainer._save_optimizer_and_scheduler

    def die(output_dir):
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(output_dir)

    trainer._save_optimizer_and_scheduler = die


def build_trainer(
    run_dir: Path, *, steps: int, lonely: frozenset[int] = frozenset(), read_tokens: int = 0, **overrides
) -> MEMTrainer:
    """The trainer that all tests of this folder use."""
    torch.use_deterministic_algorithms(True)
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 3,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
        **overrides,
    }
    set_seed(11)
    model = tiny_model(kind="attention", read_tokens=read_tokens)
    return MEMTrainer(
        model,
        TrainingArguments(output_dir=str(run_dir), **settings),
        train_dataset=TinyDataset(lonely=lonely),
        eval_dataset=TinyDataset(size=4),
        data_collator=MEMCollator(0),
        feature_store=FeatureStore(run_dir / "features"),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kill-at-step", type=int)
    parser.add_argument("--kill-while-saving", type=int)
    parser.add_argument("--lonely-rank", type=int)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--wrapper", choices=["none", "fsdp2", "zero2", "zero3"], default="none")
    parser.add_argument("--read-tokens", type=int, default=0, help="the projection reads so many tokens of a piece")
    parser.add_argument("--sgd", action="store_true", help="plain steps, from whose weights gradients can be told")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--kill-rank", type=int, help="only this rank is killed")
    options = parser.parse_args()
    overrides = {"gradient_checkpointing": True} if options.checkpointing else {}
    overrides["read_tokens"] = options.read_tokens
    lonely = frozenset()
    if "RANK" in os.environ:
        overrides["ddp_backend"] = "gloo"
    if options.batch_size is not None:
        overrides |= {
            "per_device_train_batch_size": options.batch_size,
            "train_sampling_strategy": "sequential",
        }
    if options.sgd:
        overrides |= {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        overrides["logging_steps"], lonely = 1, frozenset({3})
    if options.wrapper == "fsdp2":
        shard_on_the_cpu()
    elif options.wrapper != "none":
        overrides["deepspeed"] = str(CONFIGS / f"deepspeed_{options.wrapper}.json")
    if options.lonely_rank is not None:
        overrides |= {
            "ddp_backend": "gloo",
            "train_sampling_strategy": "sequential",
            "per_device_train_batch_size": 1,
        }
        lonely = frozenset(range(options.lonely_rank, 24, 2))
    trainer = build_trainer(options.run_dir, steps=options.steps, lonely=lonely, **overrides)
    if options.kill_at_step is not None and options.kill_rank in (None, trainer.args.process_index):
        trainer.add_callback(Kill(options.kill_at_step))
    if options.kill_while_saving is not None:
        kill_while_saving(trainer, options.kill_while_saving)
    if options.stop_after is not None:
        trainer.add_callback(Stop(options.stop_after))
    checkpoint = last_checkpoint(options.run_dir)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = {f"proj.{name}": value for name, value in trainer.full_weights().items()}
    if trainer.args.should_save:
        trainer.model.save_pretrained(options.run_dir / "adapter", state_dict=weights)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print("losses", *(f"{loss:.6f}" for loss in losses))
    del trainer
    leave_process_group()
    threads = [path.joinpath("comm").read_text().strip() for path in Path("/proc/self/task").glob("*")]
    outlives = [name for name in threads if "gloo" in name]
    assert not outlives or options.wrapper != "none", "a thread of gloo outlives the process group"  # engines hold it


if __name__ == "__main__":
    main()
