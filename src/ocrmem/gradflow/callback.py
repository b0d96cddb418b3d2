"""The check inside `transformers.Trainer`: before the first step, at every loss, and now and then at the
optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import RemoveColumnsCollator

from ocrmem.errors import GradientFlowError, ProbeError
from ocrmem.gradflow.explain import Explanation, explain, find_error_cause
from ocrmem.gradflow.measure import grad_state, held_by_zero, is_deepspeed
from ocrmem.gradflow.probe import LossFunction, report_of_error, verify_gradient_flow
from ocrmem.gradflow.ranks import Ranks
from ocrmem.gradflow.report import GradientReport
from ocrmem.gradflow.restore import RandomState
from ocrmem.gradflow.target import Trainable, resolve_target, unwrap

log = logging.getLogger(__name__)

Mode = Literal["error", "warn", "off"]

ASK_ANOTHER_BATCH = frozenset({"anchored-batch", "no-memory-hidden", "splice-matched-nothing"})
"""Verdicts that a batch without memory gives in a run that is otherwise sound."""

PATIENCE = 3
"""Steps in a row without a usable gradient after which the run is stopped. A step of batches without memory,
or one that a loss scaler skips, is no reason to stop."""


class GradientFlowCallback(TrainerCallback):
    """Stops a run that cannot learn before an optimizer step is taken, and says why.

    Before training it runs one forward and backward on a batch of the training data (on further ones where
    that has no memory), and restores everything. During training it looks at one attribute of each loss: a
    loss without a graph is explained at once, with the bare RuntimeError chained. Every `every` steps it
    looks at the gradients.

    Args:
        trainable: the part that should learn, as for `verify_gradient_flow`.
        mode: `error` raises, `warn` logs, `off` does nothing.
        every: optimizer steps between two looks at the gradients; 0: never.
        num_batches: batches to try, spread over the data, until one with memory is met.
        loss_fn: as for `verify_gradient_flow`; needed where the model returns no loss.
        prepare: turns a collated batch into what the model takes, as the trainer's own `_prepare_inputs`
            does. None:
            its tensors are moved to the training device.

    Raises:
        GradientFlowError: in mode `error`, from `on_train_begin`, the forward or `on_pre_optimizer_step`.
    """

    def __init__(
        self,
        trainable: Trainable | None = None,
        *,
        mode: Mode = "error",
        every: int = 500,
        num_batches: int = 16,
        loss_fn: LossFunction | None = None,
        prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        if mode not in ("error", "warn", "off"):
            raise ProbeError(f"mode={mode!r}; expected 'error', 'warn' or 'off'.")
        self.explanation: Explanation | None = None
        """Of the check before the first step."""
        self.report: GradientReport | None = None
        self._trainable = trainable
        self._mode = mode
        self._every = every
        self._num_batches = num_batches
        self._loss_fn = loss_fn
        self._prepare = prepare
        self._tensors: list[torch.Tensor] = []
        self._bad_steps = 0
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        train_dataloader: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Check one batch, then watch."""
        if self._mode == "off" or model is None:
            return
        self._unhook()
        self._bad_steps = 0
        self._tensors = []
        if is_deepspeed(optimizer):
            self._check_deepspeed(model)
            return
        if not self.check(model, args=args, optimizer=optimizer, train_dataloader=train_dataloader):
            return
        self._tensors = list(resolve_target(unwrap(model), self._trainable).tensors.values())
        self._handle = model.register_forward_hook(self._after_forward, with_kwargs=True)

    def check(self, model: nn.Module, *, args: Any, train_dataloader: Any, optimizer: Any = None) -> bool:
        """Check batches of the training data until one has a memory; False where there is none at all.

        Under DeepSpeed, call it before the model becomes an engine: an engine's gradients come by its own backward
        alone, which moves its state on and cannot be undone.
        """
        batches = _sample_batches(train_dataloader, args=args, num_batches=self._num_batches)
        dropped = _dropped_columns(train_dataloader)
        ranks = Ranks(model)
        said: list[tuple[str | None, str]] = []
        with _randomness_kept(), _training(model):
            for batch in batches:
                prepared = _to_device(batch, args.device) if self._prepare is None else self._prepare(batch)
                self.report = verify_gradient_flow(
                    model, prepared, self._trainable, self._loss_fn, optimizer=optimizer, dropped_columns=dropped
                )
                self.explanation = explain(self.report)
                # Together, so that no process asks for another batch while the others go on.
                said = ranks.gather((self.explanation.cause, str(self.explanation)))
                if any(cause not in ASK_ANOTHER_BATCH for cause, _ in said):
                    break
        ranks.close()
        if self.explanation is None or self.report is None:
            log.warning("the gradient was not checked: the training data gave no batch.")
            return False
        for warning in self.explanation.warnings:
            log.warning("gradient check: %s", warning.sentence)
        problem = _worst(said, rank=ranks.rank)
        if problem is not None:
            self._complain(problem, self.report.exception)
        return True

    def _check_deepspeed(self, model: nn.Module) -> None:
        """What can be told of an engine: that its optimizer has the trainable tensors."""
        tensors = resolve_target(unwrap(model), self._trainable).tensors
        missing = [name for name, tensor in tensors.items() if not held_by_zero(tensor)]
        if missing:
            self._complain(
                f"silent (optimizer-incomplete): DeepSpeed's optimizer does not hold {', '.join(missing[:3])}: the "
                "engine was built before they were unfrozen, or from another list. Build it last.",
                None,
            )
        if self.explanation is None:
            log.warning(
                "the gradient was not checked: under DeepSpeed it can be only before the engine is built. Run `ocrmem "
                "doctor CONFIG` once in one process without DeepSpeed."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients at the first step, every `every` steps, and after a bad one."""
        if not self._tensors or not self._every:
            return
        if state.global_step % self._every and not self._bad_steps:
            return
        states = {grad_state(tensor.grad) for tensor in self._tensors}
        if "finite" in states:
            self._bad_steps = 0
            return
        self._bad_steps += 1
        if self._bad_steps >= PATIENCE:
            self._bad_steps = 0
            self._complain(
                f"silent: the last {PATIENCE} optimizer steps up to step {state.global_step} met no usable "
                "gradient in "
                f"any trainable tensor (they are {' and '.join(sorted(states))}). Run `ocrmem doctor` on "
                "such a batch.",
                None,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hook away."""
        self._unhook()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if not isinstance(loss, torch.Tensor) or loss.requires_grad:
            return
        self._unhook()
        explanation = explain(verify_gradient_flow(model, kwargs or args, self._trainable, self._loss_fn))
        try:
            loss.backward()
        except RuntimeError as error:
            self._complain(str(explanation), error)

    def _complain(self, message: str, cause: Exception | None) -> None:
        if self._mode == "warn":
            log.warning("this run cannot learn: %s", message)
            return
        self._unhook()
        raise GradientFlowError(f"this run cannot learn. {message}") from cause

    def _unhook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class ExplainedTrainer(Trainer):
    """`Trainer` whose errors about gradients come explained, whatever step they come in."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As Trainer's; a RuntimeError of a known kind becomes a `GradientFlowError`, the original
        chained."""
        kept = dict(inputs)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            found = find_error_cause_of(error)
            if found is None:
                raise
            if found == "bare":
                explanation = explain(verify_gradient_flow(model, self._prepare_inputs(kept)))
            else:
                explanation = explain(report_of_error(error, phase="backward"))
            raise GradientFlowError(f"this run cannot learn. {explanation}") from error


def find_error_cause_of(error: Exception) -> str | None:
    """ "bare" for the bare RuntimeError, "known" for the other texts that the doctor knows, else None."""
    facts = report_of_error(error, phase="backward").error
    return None if facts is None else find_error_cause(facts)


def _worst(said: list[tuple[str | None, str]], *, rank: int) -> str | None:
    """What is wrong on this process, or on another; None where some process learns and none is broken.

    Args:
        said: cause and explanation of every process.
    """
    broken = [number for number, (cause, _) in enumerate(said) if cause not in ASK_ANOTHER_BATCH | {None}]
    if not broken and all(cause is not None for cause, _ in said):
        broken = list(range(len(said)))
    if not broken:
        return None
    if rank in broken:
        return said[rank][1]
    return f"on rank {broken[0]}: {said[broken[0]][1]}"


def _sample_batches(dataloader: Any, *, args: Any, num_batches: int) -> Iterator[Any]:
    """Batches spread over the data, taken beside the sampler, whose state is part of an exact resume."""
    if not isinstance(dataloader, DataLoader):
        return
    dataset, collate = dataloader.dataset, dataloader.collate_fn
    size = max(1, args.per_device_train_batch_size)
    if isinstance(dataset, IterableDataset):
        items = iter(dataset)
        while len(chunk := list(islice(items, size))) and num_batches:
            num_batches -= 1
            yield collate(chunk)
        return
    length = len(dataset)  # type: ignore[arg-type]
    starts = sorted({min(k * length // num_batches, max(0, length - size)) for k in range(num_batches)})
    for start in starts if length else []:
        yield collate([dataset[index] for index in range(start, min(start + size, length))])


def _dropped_columns(dataloader: Any) -> tuple[str, ...]:
    """Keys of the data that Trainer's `remove_unused_columns` takes away before collating."""
    if not isinstance(dataloader, DataLoader) or not isinstance(dataloader.collate_fn, RemoveColumnsCollator):
        return ()
    if isinstance(dataloader.dataset, IterableDataset):
        return ()
    first = dataloader.dataset[0]
    kept = dataloader.collate_fn.signature_columns
    return tuple(key for key in first if key not in kept) if isinstance(first, Mapping) else ()


def _to_device(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@contextmanager
def _randomness_kept() -> Iterator[None]:
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Train mode, as Trainer will set it before its first step."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
