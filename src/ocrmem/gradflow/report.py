"""What the probe measured: plain frozen dataclasses, ready for JSON, with no verdict in them.

`explain` reads a report and names the cause; nothing here judges.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

GradState = Literal["none", "zero", "finite", "non-finite"]
"""A trainable tensor's gradient after one backward: never arrived, exactly zero, usable, or NaN/infinite."""

Phase = Literal["build", "forward", "loss", "backward", "step", "second pass"]
"""Where an error was raised."""

Wrapper = Literal["none", "DDP", "FSDP1", "FSDP2"]
"""What spreads a model over processes."""

EventKind = Literal[
    "detach",
    "data",
    "grad-off",
    "integer",
    "copy",
    "no-derivative",
    "leaf",
    "made-leaf",
    "left-torch",
    "serialised",
    "flat",
    "zero-weight",
    "empty",
    "splice",
    "write-into-parameter",
    "write-through-data",
    "write-into-copy",
]
"""What an operation did to a tensor that was computed from the trainable parameters."""


@dataclass(frozen=True, kw_only=True)
class SourceLine:
    """A place in Python source."""

    file: str
    line: int
    text: str
    """The line itself, stripped; empty where the source cannot be read."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """One call of one module, in the order in which the calls began."""

    path: str
    """Name in the model; empty for the model itself."""
    kind: str
    """Class name."""
    depth: int
    """How many module calls enclose this one."""
    training: bool
    trainable: bool
    """It holds a trainable tensor of its own or in a child."""
    grad_enabled: bool
    """Grad mode seen on entry."""
    inference_mode: bool
    """Inference mode seen on entry."""
    reentrant: bool
    """It ran inside a reentrant checkpoint."""
    inference_input: bool
    """An input was an inference tensor, made under `torch.inference_mode()`."""
    carries: bool
    """Its output was computed from the trainable tensors, with or without a gradient."""
    requires_grad: bool | None
    """Of its first floating output; None where it has none, or raised."""
    live: bool
    """The output's graph leads back to the trainable tensors."""
    grad_fn: str | None
    shape: tuple[int, ...] | None
    dtype: str | None
    finite: bool
    """Every output value is finite."""
    registered: bool
    """It is a child of the model in PyTorch's eyes; a module kept in a plain list is not."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """An operation that cut, copied, flattened or spliced what was computed from the trainable tensors."""

    kind: EventKind
    op: str
    """PyTorch's name of the operation."""
    module: str
    """Innermost module that was running; empty for the model itself."""
    source: SourceLine | None
    region: SourceLine | None
    """Where grad mode was switched off, if it was off; inside a reentrant checkpoint, where that was
    called."""
    grad_enabled: bool
    inference_mode: bool
    reentrant: bool
    """Inside a reentrant checkpoint."""
    in_generate: bool
    """Inside transformers' `generate`."""
    in_hook: str | None
    """`accelerate` inside accelerate's device hooks, `transformers` where transformers' own code did it."""
    position: int
    """How many module calls had begun; places the event among the calls."""
    depth: int
    """How many module calls enclose it."""
    num_elements: int
    """Elements of the tensor computed from the trainable ones."""
    slots: int | None = None
    """For a masked splice: True positions, broadcast over the target."""
    in_place: bool = False
    used: bool = True
    """For an out-of-place splice: its result took part in a later operation."""


@dataclass(frozen=True, kw_only=True)
class TensorGrad:
    """A trainable tensor and what the backward brought it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    in_graph: bool | None
    """The loss's autograd graph leads to it. None: not knowable (sharded tensors), and unreliable for tensors
    used inside a reentrant checkpoint, so no verdict rests on it alone."""
    state: GradState
    norm: float | None
    zero_fraction: float | None
    all_zero_values: bool
    """The tensor itself is all zeros."""
    kept_by_step: float | None = None
    """With a torch.optim optimizer: share of values that one step at its learning rate would round back to
    what they were, for a weight in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """The output of the trainable module, and what became of it."""

    module: str
    calls: int
    """Calls of the module in the first pass."""
    calls_again: int | None
    """Calls in the second pass, on the same batch; None: no second pass was made."""
    num_tokens: int
    """Rows of its output, all calls together."""
    rms: float | None
    embedding_rms: float | None
    """Of the token embeddings looked up in the same pass; None where none of the same width was."""
    loss_change: float | None
    """Loss with the memory tokens permuted, minus the loss; None: not measured."""
    value_change: float | None
    """Where that was zero: the change with the tokens scaled and moved; None: not measured."""
    permuted: bool
    """The tokens changed places; False: there were fewer than two, so their sign was changed instead."""
    sample_moved: int | None = None
    """Sample whose logits alone moved when the first memory row was disturbed, -1 for several or none."""
    sample_expected: int | None = None
    """Sample to which the caller says the first memory row belongs."""


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """The call that took `inputs_embeds`, which is where the memory meets the text."""

    path: str
    length: int
    """Sequence positions."""
    memory_positions: int | None
    """Positions that changed when the memory was disturbed; None: not measured."""
    masked_memory_positions: int
    """Those of them with attention mask 0."""
    mask_length: int | None
    """Length of the attention mask; None: none was passed, or it need not be as long as the embeddings."""
    restarting_positions: bool
    """`position_ids` fall back somewhere after the first position, and no attention mask was passed."""
    labels_after_memory: int | None
    """Labelled positions that can see a memory token; None: not knowable."""


@dataclass(frozen=True, kw_only=True)
class LabelFacts:
    """How many tokens are learnt from."""

    given: int
    """Labels other than -100 in the batch."""
    after_shift: int
    """Those left when position 0, which nothing predicts, is dropped."""
    in_loss: int | None
    """Targets that the loss really counted; None: no cross entropy was seen."""
    pre_shifted: bool
    """Labels are moved one to the left of `input_ids`, and the model shifts them once more."""


@dataclass(frozen=True, kw_only=True)
class OptimizerFacts:
    """Which of the trainable tensors an optimizer holds."""

    kind: str
    num_tensors: int
    missing: tuple[str, ...]
    """Trainable tensors that it does not hold."""
    frozen: tuple[str, ...]
    """Tensors of the model that it holds although they need no gradient."""
    foreign: int
    """Tensors that it holds and the model does not."""
    foreign_same_values: int
    """Those of them equal in shape and value to a missing one: left behind by a copy."""
    foreign_same_shape: int
    """Those of them equal in shape to a missing one."""
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What the caller's own training step did; undone afterwards."""

    optimizer_stepped: bool
    state_at_step: GradState
    """The best gradient among the trainable tensors when `optimizer.step()` was called."""


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """One process of a distributed run."""

    rank: int
    memory_calls: int
    loss_requires_grad: bool
    reached: tuple[str, ...]
    """Trainable tensors that its loss reaches."""
    error: str | None
    anchored: bool
    """The trainable module entered its loss at weight 0 only."""


@dataclass(frozen=True, kw_only=True)
class ParallelFacts:
    """How the model is spread over processes."""

    wrapper: Wrapper = "none"
    rank: int = 0
    """This process."""
    find_unused_parameters: bool | None = None
    ranks: tuple[RankFacts, ...] = ()
    backward_skipped: bool = False
    """The ranks differ, so that a backward would have hung."""
    collectives_differ: tuple[str, ...] | None = None
    """For each rank the sharded module that it was about to gather, where these were not the same."""


@dataclass(frozen=True, kw_only=True)
class ErrorFacts:
    """An exception on the way."""

    phase: Phase
    type: str
    message: str
    source: SourceLine | None
    module: str
    """Innermost module that was running."""
    in_trainable: bool
    """Raised inside the trainable module."""


@dataclass(frozen=True, kw_only=True)
class GradientReport:
    """Everything that one forward and backward showed."""

    model: str
    """Class name."""
    training: dict[str, bool] = field(default_factory=dict)
    """Train mode of the model (key "") and of its children."""
    grad_enabled_at_start: bool = True
    inference_mode_at_start: bool = False
    grad_mode_leak: SourceLine | None = None
    """The forward switched grad mode off and did not switch it on again, here."""
    trainable: tuple[str, ...] = ()
    """Modules that should learn."""
    named: bool = False
    """The caller named them; otherwise they were taken from `requires_grad`."""
    calls: tuple[ModuleCall, ...] = ()
    events: tuple[Event, ...] = ()
    chain_end: int | None = None
    """Index of the event after which the value that became the loss had no gradient left."""
    loss: float | None = None
    loss_requires_grad: bool = False
    loss_grad_fn: str | None = None
    loss_carries: bool = False
    """The loss was computed from the trainable tensors, with or without a gradient."""
    loss_live: bool = False
    """The loss's graph leads back to them."""
    backward_ran: bool = False
    tensors: tuple[TensorGrad, ...] = ()
    """Every trainable tensor."""
    inference_line: SourceLine | None = None
    """Where `torch.inference_mode()` was entered last during the forward."""
    inference_parameters: tuple[str, ...] = ()
    """Parameters that were made under `torch.inference_mode()`."""
    frozen_with_grad: tuple[str, ...] = ()
    """Tensors outside `trainable` that received a gradient."""
    underflow_scale: float | None = None
    """Loss scale at which gradients that were all zero became non-zero; None: not tried, or none did."""
    dropped_columns: tuple[str, ...] = ()
    """Keys that the data had and the batch has not."""
    memory: MemoryFacts | None = None
    host: HostFacts | None = None
    labels: LabelFacts | None = None
    optimizer: OptimizerFacts | None = None
    step: StepFacts | None = None
    parallel: ParallelFacts = field(default_factory=ParallelFacts)
    error: ErrorFacts | None = None
    exception: Exception | None = field(default=None, repr=False, compare=False)
    """The exception itself, for chaining; without its traceback, which would keep the whole graph alive."""

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers; NaN and infinity, which JSON lacks, become None."""
        facts = dataclasses.asdict(dataclasses.replace(self, exception=None))
        del facts["exception"]
        return _finite(facts)

    @property
    def some_gradient(self) -> bool:
        """At least one trainable tensor got a finite gradient that is not all zeros."""
        return any(tensor.state == "finite" for tensor in self.tensors)

    @property
    def states(self) -> set[GradState]:
        """The kinds of gradient among the trainable tensors."""
        return {tensor.state for tensor in self.tensors}

    @property
    def end(self) -> Event | None:
        """The event at which the chain ends, if one was seen."""
        return None if self.chain_end is None else self.events[self.chain_end]

    def calls_of(self, path: str) -> list[ModuleCall]:
        """Calls of the module at `path`."""
        return [call for call in self.calls if call.path == path]

    def events_of(self, *kinds: EventKind) -> list[Event]:
        """Events of some kinds, in order."""
        return [event for event in self.events if event.kind in kinds]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
