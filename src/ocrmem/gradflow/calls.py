"""The module calls of one forward, by torch's global module hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from ocrmem.gradflow import operations as ops
from ocrmem.gradflow.lineage import Label, Lineage
from ocrmem.gradflow.report import ModuleCall
from ocrmem.gradflow.source import in_reentrant_checkpoint


@dataclass
class HostCall:
    """What was passed to the call that took `inputs_embeds`."""

    path: str
    pads_masks: bool
    """It is a transformers model, which fills a short attention mask up."""
    embeds_BSD: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    labels: torch.Tensor | None
    has_cache: bool


@dataclass
class _Open:
    """A call that has begun."""

    module: nn.Module
    path: str
    index: int
    grad_enabled: bool
    inference_mode: bool
    reentrant: bool
    inference_input: bool


@dataclass
class _Done:
    call: ModuleCall
    finite: torch.Tensor | None = field(repr=False, default=None)


class CallLog:
    """Records module calls while its hooks are installed."""

    def __init__(self, model: nn.Module, *, lineage: Lineage, roots: Iterable[nn.Module]) -> None:
        self.busy = False
        self.host: HostCall | None = None
        self.memory: list[tuple[str, torch.Tensor]] = []
        """Path and output, detached, of every call of a trainable module, in order."""
        self.embedding_square_means: dict[int, torch.Tensor] = {}
        """Mean square of the token embeddings looked up, by width."""
        self.unregistered: dict[str, nn.Module] = {}
        self._model = model
        self._lineage = lineage
        self._roots = set(roots)
        self._names = {module: name for name, module in model.named_modules()}
        self._trainable = {module: _learns(module) for module in model.modules()}
        self._open: list[_Open] = []
        self._done: dict[int, _Done] = {}
        self._count = 0

    @property
    def innermost(self) -> str:
        """Path of the module that runs now."""
        return self._open[-1].path if self._open else ""

    @property
    def begun(self) -> int:
        """Calls begun so far."""
        return self._count

    @property
    def depth(self) -> int:
        """Calls that run now."""
        return len(self._open)

    def calls(self) -> tuple[ModuleCall, ...]:
        """All calls, in the order in which they began."""
        done = [self._done[index] for index in sorted(self._done)]
        return tuple(replace(entry.call, finite=entry.finite is None or bool(entry.finite)) for entry in done)

    def path_of(self, module: nn.Module) -> str:
        """Name of a module; one that the model does not register is looked for in lists and dictionaries."""
        if module not in self._names:
            self._names[module] = self._find_unregistered(module)
            if any(True for _ in module.parameters()):
                self.unregistered[self._names[module]] = module
        return self._names[module]

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Install the global hooks, and take them away whatever happens."""
        registered = set(self._names)
        self._registered = registered
        handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            while self._open:  # calls that an exception left open
                self._close(self._open.pop(), (), {}, None)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        was_busy, self.busy = self.busy, True
        self._open.append(
            _Open(
                module=module,
                path=self.path_of(module),
                index=self._count,
                grad_enabled=torch.is_grad_enabled(),
                inference_mode=torch.is_inference_mode_enabled(),
                reentrant=module in self._roots and in_reentrant_checkpoint(),
                inference_input=any(tensor.is_inference() for tensor in ops.tensors_in(args)),
            )
        )
        self._count += 1
        self.busy = was_busy

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        was_busy, self.busy = self.busy, True
        try:
            while self._open:
                entry = self._open.pop()
                if entry.module is module:
                    self._close(entry, args, kwargs, output)
                    break
                self._close(entry, (), {}, None)  # it raised, and the model caught that
        finally:
            self.busy = was_busy

    def _close(self, entry: _Open, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        module = entry.module
        values = output.values() if isinstance(output, Mapping) else output
        tensors = list(ops.tensors_in(list(values) if isinstance(output, Mapping) else output))
        tensor = next((t for t in tensors if t.is_floating_point() or t.is_complex()), None)
        if module in self._roots and tensor is not None:
            if self._lineage.get(tensor) is None:
                self._lineage.set(tensor, Label(live=tensor.requires_grad, origin=None))
            self.memory.append((entry.path, tensor.detach()))
        if isinstance(module, nn.Embedding) and tensor is not None:
            self.embedding_square_means[tensor.shape[-1]] = tensor.detach().float().square().mean()
        embeds = kwargs.get("inputs_embeds")
        if isinstance(embeds, torch.Tensor):
            self.host = _host_call(entry, embeds, kwargs)
        labels = [label for t in tensors if (label := self._lineage.get(t)) is not None]
        finite = None
        if tensor is not None and not tensor.is_meta:
            with torch.no_grad():
                finite = torch.isfinite(tensor.detach()).all()
        self._done[entry.index] = _Done(
            ModuleCall(
                path=entry.path,
                kind=type(module).__name__,
                depth=len(self._open),
                training=module.training,
                trainable=self._trainable[module] if module in self._trainable else _learns(module),
                grad_enabled=entry.grad_enabled,
                inference_mode=entry.inference_mode,
                reentrant=entry.reentrant,
                inference_input=entry.inference_input,
                carries=bool(labels),
                requires_grad=None if tensor is None else tensor.requires_grad,
                live=any(label.live for label in labels),
                grad_fn=None if tensor is None or tensor.grad_fn is None else tensor.grad_fn.name(),
                shape=None if tensor is None else tuple(tensor.shape),
                dtype=None if tensor is None else str(tensor.dtype).removeprefix("torch."),
                finite=True,
                registered=module in self._registered,
            ),
            finite,
        )

    def _find_unregistered(self, module: nn.Module) -> str:
        for parent in self._model.modules():
            prefix = self._names.get(parent, "")
            for key, value in vars(parent).items():
                items = enumerate(value) if isinstance(value, (list, tuple)) else ()
                items = value.items() if isinstance(value, dict) and not key.startswith("_") else items
                for index, item in items:
                    if item is module:
                        return f"{prefix}.{key}[{index!r}]".lstrip(".")
        return f"<{type(module).__name__}>"


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _host_call(entry: _Open, embeds_BSD: torch.Tensor, kwargs: Mapping[str, Any]) -> HostCall:
    def tensor(key: str) -> torch.Tensor | None:
        value = kwargs.get(key)
        return value.detach() if isinstance(value, torch.Tensor) else None

    return HostCall(
        path=entry.path,
        pads_masks=any(base.__name__ in ("PreTrainedModel", "PeftModel") for base in type(entry.module).__mro__),
        embeds_BSD=embeds_BSD.detach().clone(),
        attention_mask=tensor("attention_mask"),
        position_ids=tensor("position_ids"),
        labels=tensor("labels"),
        has_cache=kwargs.get("past_key_values") is not None,
    )
