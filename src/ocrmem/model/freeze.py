"""Freezing a part: no parameter learns, no statistic drifts, no dropout stirs.

Freezing goes by `requires_grad=False` alone, never by `eval()`: the frozen parts stay in the mode of the whole
model, since Hugging Face runs gradient checkpointing in train mode only. What train mode would change in a frozen
part, batch statistics and dropout, is taken out here instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ocrmem.errors import FrozenPartError


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics in train and eval mode alike; same parameters and buffers by name."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, norm: _NormBase) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = norm.weight
        self.bias = norm.bias
        for name, buffer in norm.named_buffers():  # num_batches_tracked too: the state dict stays as it was
            self.register_buffer(name, buffer)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise with the stored statistics; any shape with channels on axis 1."""
        return F.batch_norm(
            hidden, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def freeze(module: nn.Module, *, part: str) -> None:
    """Make `module` unable to change, in any mode.

    Sets `requires_grad=False` on every parameter, replaces batch norms by `FrozenBatchNorm`, and refuses dropout.

    Args:
        part: the module's name in `MEMModel`, for messages.

    Raises:
        FrozenPartError: some dropout is active; the modules and their rates are named.
    """
    refuse_dropout(module, part=part)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _NormBase) and child.running_mean is not None:
                setattr(parent, name, FrozenBatchNorm(child))
    module.requires_grad_(False)


def refuse_dropout(module: nn.Module, *, part: str) -> None:
    """Raise if any submodule would drop something in train mode.

    A rate is any plain number in (0, 1] in an attribute whose name contains "drop" (`attention_dropout`,
    `drop_prob`, `layerdrop`…), and the rate of torch's own dropout layers.
    """
    active = []
    for path, child in module.named_modules():
        rates = {key: value for key, value in vars(child).items() if "drop" in key.lower()}
        if isinstance(child, nn.modules.dropout._DropoutNd):
            rates["p"] = child.p
        active += [
            f"{path or type(child).__name__}.{key}={value}"
            for key, value in rates.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
        ]
    if active:
        shown = ", ".join(active[:5]) + (f" and {len(active) - 5} more" if len(active) > 5 else "")
        raise FrozenPartError(
            f"{part} has active dropout: {shown}. A frozen part runs in train mode during training, so dropout must "
            "be 0 there; set it to 0 in the part's config (for example attention_dropout=0.0) and load it again."
        )


def check_trainable(model: nn.Module, *, proj: nn.Module) -> None:
    """Raise unless the trainable parameters of `model` are exactly those of `proj`, compared as objects."""
    wanted = {id(parameter) for parameter in proj.parameters()}
    trainable = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    extra = [name for key, name in trainable.items() if key not in wanted]
    frozen = [name for name, parameter in proj.named_parameters() if id(parameter) not in trainable]
    if extra or frozen:
        raise FrozenPartError(
            "the trainable parameters must be exactly those of proj; "
            + (f"trainable but not in proj: {', '.join(extra[:5])}. " if extra else "")
            + (f"in proj but not trainable: {', '.join(frozen[:5])}. " if frozen else "")
            + "Freeze by module object and give proj tensors of its own."
        )
