"""MEMTrainer: `transformers.Trainer` for a projection between frozen parts.

What it adds to Trainer: pages become features through the cache before the step; checkpoints hold the adapter alone
and appear whole or not at all; a run that could not learn is refused before it starts.
"""

from __future__ import annotations

import copy
import gc
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from ocrmem.errors import CheckpointError, ConfigError, TrainingError
from ocrmem.files import fsync
from ocrmem.gradflow.callback import ExplainedTrainer, GradientFlowCallback
from ocrmem.memory.features import FeatureStore, encode_pages
from ocrmem.model.adapter import load_projection
from ocrmem.model.freeze import check_trainable
from ocrmem.model.mem_model import MEMModel
from ocrmem.training.hardware import check_memory, out_of_memory
from ocrmem.training.sharded import (
    asked_for_deepspeed,
    asked_for_fsdp,
    full_optimizer_state,
    full_weights,
    load_optimizer_state,
    load_weights,
)

log = logging.getLogger(__name__)

MAX_SKIPPED = 2
"""Steps in a row whose gradient may be no number before the run ends."""
INCOMPLETE = "incomplete"
"""Folder inside the run's in which a checkpoint is written before it is moved to its place."""


class StopOnNonFinite(TrainerCallback):
    """Keeps gradients that are no numbers from the optimizer: such a step changes nothing but the optimizer's own
    momentum, with a warning, and `MAX_SKIPPED` + 1 of them in a row end the run.

    Trainer itself goes on: it logs such losses as 0.0, and AdamW turns every weight into NaN for good.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._asked: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: MEMModel,
        **_: Any,
    ) -> None:
        """Check all gradients of the projection; one small reduction a step.

        On a GPU the answer is read at the next step, so that the host need not wait for this one to end.
        """
        if args.fp16:  # its gradient scaler meets infinite gradients on purpose, and skips them
            return
        self._read()
        grads = [parameter.grad for parameter in model.proj.parameters() if parameter.grad is not None]
        if not grads:
            return
        finite = torch.isfinite(torch.nn.utils.get_total_norm(grads))
        for grad in grads:
            grad.masked_fill_(~finite, 0.0)
        event = None
        if finite.is_cuda:
            answer = finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            answer = finite
        self._asked = (state.global_step + 1, answer, event)
        if event is None:
            self._read()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Read the last answer."""
        self._read()

    def _read(self) -> None:
        if self._asked is None:
            return
        step, finite, event = self._asked
        self._asked = None
        if event is not None:
            event.synchronize()
        if bool(finite):
            self.skipped = 0
            return
        self.skipped += 1
        if self.skipped > MAX_SKIPPED:
            raise TrainingError(
                f"the gradient of the projection is not finite at step {step}, nor was it at the {MAX_SKIPPED} steps "
                "before, so the run was stopped; none of them changed a weight. Start the same command again to go on "
                "from the last checkpoint, with a lower training.learning_rate, llm.dtype=float32, or "
                "llm.attn_implementation=eager; batches must be padded on the right."
            )
        log.warning("the gradient of the projection is not finite at step %d; its batch is left out", step)


class MEMTrainer(ExplainedTrainer):
    """Trains `model.proj`; everything else about it is `transformers.Trainer`.

    Args:
        model: the model, its frozen parts frozen.
        args: the usual training arguments. `remove_unused_columns` is taken as False, since the pages of a sample
            are no column of `forward` by name alone.
        data_collator: a `MEMCollator`.
        feature_store: cache of encoder features; None: every page is encoded each time it is met.
        gradient_check: before the first step, run one batch forward and backward: `error` stops a run that cannot
            learn, with the cause, `warn` only says so, `off` does nothing.

    Raises:
        TrainingError: while training, the gradient is not finite.
        ConfigError: several GPUs in one process, which would split a batch's pages wrongly.
        FrozenPartError: something other than the projection would learn, or the projection would not.
    """

    model: MEMModel
    learns_to_read = False
    """Whether batches have the pages' letters, from which alone a projection learns to read; it reads as it does
    otherwise."""

    def __init__(
        self,
        model: MEMModel,
        args: TrainingArguments,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        feature_store: FeatureStore | None = None,
        gradient_check: Literal["error", "warn", "off"] = "error",
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} GPUs are visible to one process; torch's DataParallel cannot split a batch of pages. "
                f"Launch one process for each: `torchrun --nproc-per-node {args.n_gpu} -m ocrmem train CONFIG`, or "
                "show the process one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        reading = model.proj.reading_parameters()
        for parameter in reading:
            parameter.requires_grad_(True)  # where another trainer left it alone
        check_trainable(model, proj=model.proj)
        for parameter in reading:
            parameter.requires_grad_(self.learns_to_read)
        if not asked_for_deepspeed():  # whose stage is known below, and which moves no weight before it is
            check_memory(model, args.device, shares=args.world_size if asked_for_fsdp() else 1)
        args = copy.copy(args)
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            callbacks=[StopOnNonFinite(), *(callbacks or [])],
        )
        if self.is_deepspeed_enabled:
            plugin: Any = self.accelerator.state.deepspeed_plugin
            check_memory(model, args.device, shares=args.world_size if plugin.zero_stage == 3 else 1)
        if asked_for_fsdp() and not self.is_fsdp_enabled:
            log.warning(
                "the launcher asks for FSDP, but accelerate shards on accelerators only; on %s every process holds the "
                "whole model and the run is DDP. The result is the same; launch with the DDP config to not read this.",
                args.device,
            )
        if self.is_fsdp_enabled:
            # It runs before the step, outside the model's forward, in which alone FSDP gathers weights.
            plugin = self.accelerator.state.fsdp_plugin
            plugin.ignored_modules = [model.ocr_embed]
            model.ocr_embed.to(args.device)  # pyright: ignore[reportCallIssue]
        self.gradient_flow = GradientFlowCallback(
            "proj", mode=gradient_check, prepare=self.check_inputs, loss_fn=self.check_loss
        )
        self._gradient_check = gradient_check
        self.add_callback(self.gradient_flow)
        self.feature_store = feature_store
        self._feature_dtype = getattr(torch, model.config.memory_settings.feature_dtype)

    def check_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the gradient check runs the model on, of a batch."""
        return self._prepare_inputs(inputs)

    def check_loss(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """What the gradient check goes back from: the loss, and that of reading, if the batch has its text."""
        reading_loss = outputs.get("reading_loss")
        return outputs.loss if reading_loss is None else outputs.loss + reading_loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's, without a group that has no parameters: DeepSpeed's optimizers leave it out, and then a checkpoint
        of theirs fits no other run."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's, with a message that says what to change where a step does not fit into memory."""
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            step = self.state.global_step + 1
            raise TrainingError(out_of_memory(self.model, inputs, error=error, step=step)) from error

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device, its pages replaced by their features."""
        keys = inputs.pop("page_keys", None)
        pages_PHW = inputs.pop("pages", None)
        inputs = super()._prepare_inputs(inputs)
        if pages_PHW is not None:
            inputs["features"] = encode_pages(
                self.model.ocr_embed,
                pages_PHW,
                keys,
                store=self.feature_store,
                dtype=self._feature_dtype,
                device=self.args.device,
            )
        return inputs

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter folder, its weights gathered from all processes; every process calls this."""
        weights = self.full_weights()
        if self.args.should_save:
            self._save(output_dir, state_dict={f"proj.{name}": value for name, value in weights.items()})

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The projection's state, whole, on the CPU, however the processes share it; every process calls this."""
        return full_weights(self.model.proj)

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer's state whole, so that any number of processes can go on from it."""
        if not self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = full_optimizer_state(self.optimizer, self.model.proj)
        schedule: Any = self.lr_scheduler
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Whatever number of processes wrote it."""
        if not self._is_sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        try:
            state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            saved = torch.load(folder / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the optimizer's state in {checkpoint!r} cannot be read: {error}. Remove it to go on from "
                "the one before."
            ) from error
        load_optimizer_state(self.optimizer, self.model.proj, state)
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(saved)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Trainer's; DeepSpeed's own checkpoints, which belong to one number of processes, are not asked for."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._gradient_check != "off":
            self._check_before_engine(train_dataloader)
        # The encoder runs before the step, and on some processes not at all (cached pages, no memory): weights of it
        # that were spread over the processes would be waited for.
        # It stays a plain attribute of the model, which is no part of the engine.
        encoder = self.model.ocr_embed
        encoder.to(self.args.device)  # pyright: ignore[reportCallIssue]
        self.model._modules.pop("ocr_embed", None)
        vars(self.model)["ocr_embed"] = encoder
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _check_before_engine(self, train_dataloader: Any) -> None:
        """The gradient check under DeepSpeed, while every process has the whole model."""
        try:
            self.model.to(self.args.device)  # pyright: ignore[reportArgumentType] - a device, whatever the decorator says
            self.gradient_flow.check(self.model, args=self.args, train_dataloader=train_dataloader)
        except torch.OutOfMemoryError:  # a model that only fits when it is spread; said by the callback
            self.model.to("cpu")  # pyright: ignore[reportArgumentType]
            torch.cuda.empty_cache()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter folder: no frozen weights, no pickled arguments."""
        folder = output_dir or self.args.output_dir
        assert folder is not None, "TrainingArguments fills it in"
        self.model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, then move it to its place: a kill at any moment leaves whole checkpoints only."""
        run_dir = Path(str(self.args.output_dir))
        aside = run_dir / INCOMPLETE
        self._on_main(lambda: shutil.rmtree(aside, ignore_errors=True))
        self.args.output_dir = str(aside)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):  # torch.save's disk error
                raise
            raise CheckpointError(
                f"checkpoint at step {self.state.global_step} could not be written to {str(run_dir)!r}: {error}. "
                "Earlier checkpoints are untouched; free some space and start the same command again to go on."
            ) from error
        finally:
            self.args.output_dir = str(run_dir)
        self._on_main(lambda: self._move_checkpoint(aside, run_dir))

    def _move_checkpoint(self, aside: Path, run_dir: Path) -> None:
        name = f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{self.state.best_global_step}")
            self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
        for path in (aside / name).rglob("*"):
            fsync(path)
        shutil.rmtree(run_dir / name, ignore_errors=True)
        (aside / name).rename(run_dir / name)
        fsync(run_dir)
        shutil.rmtree(aside, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _on_main(self, action: Callable[[], object]) -> None:
        """Run `action` on the writing process, with every process waiting before and after."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            action()
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load the projection of a checkpoint."""
        load_projection(self.model, Path(resume_from_checkpoint), put=load_weights)

    def _load_best_model(self) -> None:
        """Load the projection of the best checkpoint."""
        if self.state.best_model_checkpoint is not None:
            load_projection(self.model, Path(self.state.best_model_checkpoint), put=load_weights)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    if not run_dir.is_dir():
        return None
    found = get_last_checkpoint(str(run_dir))
    return None if found is None else Path(found)


def leave_process_group() -> None:
    """End this process's part in torch.distributed; for the end of a program that has let go of its trainer.

    A model wrapped in DistributedDataParallel holds the process group, and a trainer sits in reference cycles, so
    `destroy_process_group` alone leaves gloo's threads running. One that lets go of a tensor while Python shuts down
    aborts the process: "terminate called without an active exception". Collecting the trainer ends them first. Where
    somebody else holds the group (DeepSpeed, imported later than the group was made, has it in default arguments),
    they get the time to let go. They get it before as well: a thread that lets go of its last tensor waits for the GIL
    with a lock in hand for which the end of the group waits, and the collector would hold the GIL meanwhile.
    """
    if torch.distributed.is_initialized():
        time.sleep(0.1)  # without the GIL
        torch.distributed.destroy_process_group()
        gc.collect()
        time.sleep(0.1)  # without the GIL
