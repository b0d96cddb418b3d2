"""Causes behind the backward: the gradient is there, and the optimizer does not use it."""

from __future__ import annotations

import math

from ocrmem.gradflow.cause import Cause, Finding, learns, memory_name
from ocrmem.gradflow.report import GradientReport

KEPT_BY_STEP = 0.9
"""Share of 16-bit weights that a step may leave unmoved. At AdamW's 1e-5 in bfloat16 it is 98%, and such a run brought
the loss from 5.93 to 5.91 where float32 reached 5.43."""


def _optimizer_missing(report: GradientReport) -> bool:
    return report.optimizer is not None and bool(report.optimizer.missing)


def _missing_shown(report: GradientReport) -> str:
    assert report.optimizer is not None
    missing = report.optimizer.missing
    return ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")


def _before_peft(report: GradientReport) -> Finding | None:
    if not _optimizer_missing(report) or report.optimizer is None:
        return None
    if not any("original_module" in name for name in report.optimizer.frozen):
        return None
    return Finding(
        sentence="the optimizer was built before get_peft_model(modules_to_save=...): it holds the frozen "
        "originals, "
        f"not the copies that learn ({_missing_shown(report)}).",
        module=", ".join(report.trainable),
    )


def _copied(report: GradientReport) -> Finding | None:
    facts = report.optimizer
    if facts is None or not facts.missing or not facts.foreign_same_values:
        return None
    return Finding(
        sentence=f"the optimizer holds {facts.foreign} tensors that are not in the model but equal its own "
        f"({_missing_shown(report)}): the module was deep-copied after the optimizer was built, or before.",
        module=", ".join(report.trainable),
    )


def _replaced(report: GradientReport) -> Finding | None:
    facts = report.optimizer
    if facts is None or not facts.missing or not facts.foreign_same_shape:
        return None
    return Finding(
        sentence=f"the optimizer holds {facts.foreign} tensors that are no longer in the model: its own "
        f"({_missing_shown(report)}) were replaced, as load_state_dict(assign=True) does.",
        module=", ".join(report.trainable),
    )


def _frozen_in_optimizer(report: GradientReport) -> Finding | None:
    facts = report.optimizer
    if facts is None or not facts.missing or not facts.frozen:
        return None
    return Finding(
        sentence=f"the optimizer holds {len(facts.frozen)} frozen tensors ({facts.frozen[0]}...) and not "
        f"{_missing_shown(report)}.",
        module=", ".join(report.trainable),
    )


def _incomplete(report: GradientReport) -> Finding | None:
    if not _optimizer_missing(report):
        return None
    return Finding(
        sentence=f"the optimizer does not hold {_missing_shown(report)}: it was built before they were "
        "unfrozen, or "
        "from another list.",
        module=", ".join(report.trainable),
    )


def _cleared(report: GradientReport) -> Finding | None:
    step = report.step
    if (
        step is None
        or not step.optimizer_stepped
        or step.state_at_step in ("finite", "non-finite")
        or not learns(report)
    ):
        return None
    return Finding(
        sentence="the gradient is there after the backward and gone when optimizer.step() runs: zero_grad() "
        "comes between them.",
        module=", ".join(report.trainable),
    )


def _never_stepped(report: GradientReport) -> Finding | None:
    if report.step is None or report.step.optimizer_stepped:
        return None
    return Finding(sentence="the training step never calls step() of the optimizer that was given.")


def _low_precision(report: GradientReport) -> Finding | None:
    kept = [tensor for tensor in report.tensors if tensor.kept_by_step is not None and len(tensor.shape) > 1]
    if not kept or report.optimizer is None:
        return None
    sizes = [math.prod(tensor.shape) for tensor in kept]
    share = sum((t.kept_by_step or 0.0) * size for t, size in zip(kept, sizes, strict=True)) / sum(sizes)
    if share <= KEPT_BY_STEP:
        return None
    return Finding(
        sentence=f"the weights of {memory_name(report)} are {kept[0].dtype}: at learning rate "
        f"{report.optimizer.learning_rate:g} a step rounds back to the same number for {share:.0%} of them.",
        module=", ".join(report.trainable),
    )


_OPTIMIZER = "build the optimizer last, and assert that the ids of its tensors cover the projection's."

CAUSES: tuple[Cause, ...] = (
    Cause(id="optimizer-before-peft", table="C", title="optimizer built before "
                                                       "get_peft_model(modules_to_save)",
          mend=_OPTIMIZER, find=_before_peft),
    Cause(id="optimizer-holds-copy", table="C", title="module deep-copied beside the "
                                                      "optimizer", mend=_OPTIMIZER,
          find=_copied),
    Cause(id="optimizer-holds-replaced", table="C", title="load_state_dict(assign=True) after the optimizer "
                                                          "was built",
          mend=_OPTIMIZER, find=_replaced),
    Cause(id="optimizer-holds-frozen", table="C", title="optimizer built from the wrong "
                                                        "parameters", mend=_OPTIMIZER,
          find=_frozen_in_optimizer),
    Cause(id="optimizer-incomplete", table="C", title="projection unfrozen after the optimizer was built",
          mend=_OPTIMIZER, find=_incomplete),
    Cause(id="gradient-cleared", table="C", title="zero_grad between backward and step",
          mend="zero_grad(), forward, backward(), step(), in this order.", find=_cleared),
    Cause(id="optimizer-never-steps", table="C", title="another optimizer is stepped",
          mend="call step() of the optimizer that holds the projection.", find=_never_stepped),
    Cause(id="weights-too-coarse", table="C", title="projection weights in 16 bits",
          mend="keep the projection in float32: proj.float(), and cast its output to the LLM's dtype.",
          find=_low_precision),
)  # fmt: skip
"""From special to general."""
