"""Watches one forward: every torch operation, every module call, every switch of grad mode.

Operations are seen by a `TorchFunctionMode`, modules by torch's global module hooks, which also see modules
that are not registered in the model. Nothing is changed on the model itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from ocrmem.gradflow import operations as ops
from ocrmem.gradflow.calls import CallLog
from ocrmem.gradflow.lineage import Label, Lineage, storage_address
from ocrmem.gradflow.report import Event, EventKind, SourceLine
from ocrmem.gradflow.source import grad_switch_line, in_pickling, surroundings


class Recorder(TorchFunctionMode):
    """Follows what is computed from `seeds` through one forward.

    Args:
        model: names its modules and parameters.
        seeds: the trainable tensors.
        roots: modules whose outputs descend from the seeds, whatever happens inside them.
        before_write: called with a parameter or buffer of the model before an operation writes into it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        seeds: Iterable[torch.Tensor],
        roots: Iterable[nn.Module],
        before_write: Callable[[torch.Tensor], None],
    ) -> None:
        super().__init__()
        self.lineage = Lineage(seeds)
        self.log = CallLog(model, lineage=self.lineage, roots=roots)
        self.events: list[Event] = []
        self.targets_in_loss: int | None = None
        self.loss_inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        """[N, classes] and [N] of each cross entropy, in order; references, not copies."""
        self.grad_off: SourceLine | None = None
        """Where grad mode was switched off last; None while it is on."""
        self.inference_line: SourceLine | None = None
        """Where inference mode began last."""
        self._enabled_at_start = torch.is_grad_enabled()
        self._keys: dict[tuple[Any, ...], int] = {}
        self._before_write = before_write
        self._owned = {storage_address(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._owned.pop(None, None)
        self._through_data: set[int] = set()
        self._gathered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._splices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._used: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record what runs inside."""
        with self.log.hooks(), self._inference_switches(), self:
            yield

    def all_events(self) -> tuple[Event, ...]:
        """The events, with `used` filled in for splices."""
        return tuple(
            replace(event, used=index in self._used) if event.kind == "splice" and not event.in_place else event
            for index, event in enumerate(self.events)
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if self.log.busy or name in ops.METADATA:
            if name == "untyped_storage" and not self.log.busy and in_pickling():
                self._note_pickled(args[0])
            return func(*args, **kwargs)
        if name == "_set_grad_enabled":
            self._note_grad_switch(bool(args[0]))
            return func(*args, **kwargs)
        inputs = list(ops.tensors_in((args, kwargs)))
        target = ops.write_target(name, args, kwargs)
        if target is not None:
            owned = self._owned.get(storage_address(target))
            if owned is not None:
                self._before_write(owned)
        labels = [(tensor, label) for tensor in inputs if (label := self._label(tensor)) is not None]
        if name == "cross_entropy" and len(args) >= 2:
            self._note_loss(args, kwargs)
        # Judged before the operation: one that fails has its say too.
        splice = self._note_splice(name, args, kwargs, target) if labels else None
        if labels and target is not None:
            self._note_write(target, labels, name)
        result = func(*args, **kwargs)
        self._after(name, args, labels, target, result, splice)
        return result

    def _after(
        self,
        name: str,
        args: tuple[Any, ...],
        labels: list[tuple[torch.Tensor, Label]],
        target: torch.Tensor | None,
        result: Any,
        splice: int | None,
    ) -> None:
        outputs = list(ops.tensors_in(result))
        if target is not None and all(target is not output for output in outputs):
            outputs.append(target)
        if name in ("requires_grad_", "requires_grad.__set__") and args and isinstance(args[0], torch.Tensor):
            self._note_made_leaf(name, args)
            return
        if name == "data.__get__" and not labels:
            self._through_data.update(address for out in outputs if (address := storage_address(out)) is not None)
        if name == "__getitem__" and outputs and storage_address(outputs[0]) != storage_address(args[0]):
            self._gathered[outputs[0]] = True
        if not labels:
            return
        for tensor, _ in labels:
            if tensor in self._splices and name not in ops.METADATA:
                self._used.add(self._splices[tensor])
        if not outputs:
            if name in ops.LEAVES_TORCH:
                self._add(ops.LEAVES_TORCH[name], name, labels[0][0].numel())
            return
        self._label_outputs(name, args, labels, outputs)
        if splice is not None and not self.events[splice].in_place:
            self._splices[outputs[0]] = splice

    def _label_outputs(
        self,
        name: str,
        args: tuple[Any, ...],
        labels: list[tuple[torch.Tensor, Label]],
        outputs: list[torch.Tensor],
    ) -> None:
        live = [tensor for tensor, label in labels if label.live]
        inherited = next((label.origin for _, label in labels if label.origin is not None), None)
        cut: int | None = None
        for output in outputs:
            if self.lineage.is_seed(output):
                continue
            if output.requires_grad and live:
                self.lineage.set(output, Label(True, None))
                continue
            if live and not output.requires_grad:
                if cut is None:
                    cut = self._add(self._kind_of_cut(name, output), name, max(tensor.numel() for tensor in live))
                origin = cut
            else:
                origin = inherited
            self.lineage.set(output, Label(False, origin, fixed=output.requires_grad))
        if live and outputs[0].requires_grad:
            if outputs[0].numel() == 0 and live[0].numel():
                self._add("empty", name, live[0].numel())
            if name in ops.FLAT:
                self._add("flat", name, live[0].numel())
            elif name in ("mul", "__mul__", "__rmul__", "mul_") and any(ops.is_zero_number(arg) for arg in args):
                self._add("zero-weight", name, live[0].numel())

    def _kind_of_cut(self, name: str, output: torch.Tensor) -> EventKind:
        kind = ops.kind_of_cut(name, output)
        # Inside a custom function's forward autograd is off without anyone having switched it off.
        in_custom_function = self._enabled_at_start and self.grad_off is None and not torch.is_inference_mode_enabled()
        return "no-derivative" if kind == "grad-off" and in_custom_function else kind

    def _label(self, tensor: torch.Tensor) -> Label | None:
        """The label of an input; a leaf that shares storage with a labelled tensor becomes an event of its
        own."""
        label = self.lineage.get(tensor)
        if label is None or label.live or self.lineage.knows_object(tensor):
            return label
        if tensor.is_leaf and tensor.requires_grad:
            written = label.origin is not None and self.events[label.origin].kind == "write-through-data"
            name = "Parameter" if isinstance(tensor, nn.Parameter) else "leaf"
            origin = label.origin if written else self._add("leaf", name, tensor.numel())
            label = Label(False, origin, fixed=True)
            self.lineage.set(tensor, label)
        return label

    def _note_grad_switch(self, enabled: bool) -> None:
        if enabled and (torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
            return
        if enabled:
            self.grad_off = None
        elif torch.is_grad_enabled():
            self.grad_off = grad_switch_line()

    @contextmanager
    def _inference_switches(self) -> Iterator[None]:
        """Note where inference mode begins; torch offers no override for it, so its `__enter__` is
        wrapped."""
        original = torch.inference_mode.__enter__

        @functools.wraps(original)
        def enter(context: torch.inference_mode) -> None:
            if context.mode and not torch.is_inference_mode_enabled():
                self.grad_off = self.inference_line = grad_switch_line()
            original(context)

        torch.inference_mode.__enter__ = enter  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            torch.inference_mode.__enter__ = original

    def _note_loss(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        logits, target = args[0], args[1]
        if not isinstance(target, torch.Tensor) or target.is_floating_point():
            return
        ignored = kwargs.get("ignore_index", args[4] if len(args) > 4 else -100)
        count = int((target != ignored).sum())
        self.targets_in_loss = count + (self.targets_in_loss or 0)
        if isinstance(logits, torch.Tensor):
            self.loss_inputs.append((logits.detach(), target.detach()))

    def _note_splice(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: torch.Tensor | None
    ) -> int | None:
        found = ops.masked_splice(name, args, kwargs)
        if found is None or self._label(found.source) is None:
            return None
        return self._add("splice", name, found.source.numel(), slots=found.slots, in_place=target is not None)

    def _note_write(self, target: torch.Tensor, labels: list[tuple[torch.Tensor, Label]], name: str) -> None:
        source = next((tensor for tensor, _ in labels if tensor is not target), None)
        if source is None:
            return
        address = storage_address(target)
        owned = self._owned.get(address)
        kind: EventKind | None = None
        if isinstance(owned, nn.Parameter) and not self.lineage.is_seed(owned):
            kind = "write-into-parameter"
        elif address in self._through_data:
            kind = "write-through-data"
        elif target in self._gathered:
            kind = "write-into-copy"
        if kind is not None:
            index = self._add(kind, name, source.numel(), in_place=True)
            if kind == "write-through-data":
                self.lineage.set(target, Label(False, index, fixed=True))

    def _note_pickled(self, tensor: torch.Tensor) -> None:
        if self.lineage.get(tensor) is not None and not self.lineage.is_seed(tensor):
            self._add("serialised", "pickle", tensor.numel())

    def _note_made_leaf(self, name: str, args: tuple[Any, ...]) -> None:
        tensor, value = args[0], args[1] if len(args) > 1 else True
        if not value or self.lineage.is_seed(tensor):
            return
        label = self.lineage.get(tensor)
        index = self._add("made-leaf", name, tensor.numel() if label is not None else 0, slots=tensor.dim())
        if label is not None and not label.live:
            self.lineage.set(tensor, Label(False, index if label.origin is None else label.origin, fixed=True))

    def _add(
        self, kind: EventKind, op: str, num_elements: int, *, slots: int | None = None, in_place: bool = False
    ) -> int:
        """Index of the event, a new one unless the same line did the same before."""
        around = surroundings()
        key = (kind, op, around.source, torch.is_grad_enabled(), slots)
        if key in self._keys:
            return self._keys[key]
        off = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        self.events.append(
            Event(
                kind=kind,
                op=op,
                module=self.log.innermost,
                source=around.source,
                region=around.checkpoint or (self.grad_off if off else None),
                grad_enabled=torch.is_grad_enabled(),
                inference_mode=torch.is_inference_mode_enabled(),
                reentrant=around.checkpoint is not None,
                in_generate=around.in_generate,
                in_hook=around.in_hook,
                position=self.log.begun,
                depth=self.log.depth,
                num_elements=num_elements,
                slots=slots,
                in_place=in_place,
            )
        )
        self._keys[key] = len(self.events) - 1
        return len(self.events) - 1


@functools.cache
def _name(func: Any) -> str:
    """Short name of a torch function: `cat`, `data.__get__`, `__setitem__`."""
    short = getattr(func, "__name__", str(func))
    if short in ("__get__", "__set__"):
        resolved = resolve_name(func) or short
        return resolved.removeprefix("torch.Tensor.")
    return short
