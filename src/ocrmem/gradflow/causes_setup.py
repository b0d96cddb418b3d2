"""Causes that lie before the first operation: nothing to train, or no memory to train on."""

from __future__ import annotations

from ocrmem.gradflow.cause import Cause, Finding, gradient_missing, memory_name
from ocrmem.gradflow.report import Event, GradientReport


def _grad_mode_leaked(report: GradientReport) -> Finding | None:
    if report.loss_requires_grad or not gradient_missing(report):
        return None
    if not report.grad_enabled_at_start:
        mode = "inference mode was on" if report.inference_mode_at_start else "grad mode was off"
        return Finding(sentence=f"{mode} before the forward began; something switched it and did not switch it back.")
    if report.grad_mode_leak is not None:
        return Finding(
            sentence="the forward switches grad mode off and never on again, so every later step is cut too.",
            source=report.grad_mode_leak,
        )
    return None


def _not_registered(report: GradientReport) -> Finding | None:
    hidden = next((call for call in report.calls if not call.registered and call.trainable), None)
    if hidden is None:
        return None
    lost = not report.tensors or (report.optimizer is not None and bool(report.optimizer.missing))
    if not lost or any(call.registered and call.path in report.trainable for call in report.calls):
        return None
    return Finding(
        sentence=f"`{hidden.path}` runs and could learn, but the model does not register it (it is kept in "
        "a plain list "
        "or dictionary), so model.parameters() does not hold its weights.",
        module=hidden.path,
    )


def _peft_froze(report: GradientReport) -> Finding | None:
    if not _frozen(report) or not any("lora_" in name for name in report.frozen_with_grad):
        return None
    return Finding(
        sentence=f"peft froze {memory_name(report)} together with everything else; only the LoRA weights learn.",
        module=", ".join(report.trainable),
    )


def _frozen(report: GradientReport) -> bool:
    return report.named and bool(report.tensors) and not any(tensor.requires_grad for tensor in report.tensors)


def _projection_frozen(report: GradientReport) -> Finding | None:
    if not _frozen(report):
        return None
    return Finding(
        sentence=f"all {len(report.tensors)} tensors of {memory_name(report)} have requires_grad=False: a "
        "freezing loop "
        "over the whole model, or a helper that freezes it, took them along.",
        module=", ".join(report.trainable),
    )


def _nothing_trainable(report: GradientReport) -> Finding | None:
    other_error = report.error is not None and not gradient_missing(report) and report.loss_requires_grad
    if report.tensors or other_error:
        return None
    if not report.calls:
        return None
    return Finding(
        sentence=f"no parameter of {report.model} requires grad, so there is nothing to train.",
    )


def _not_called(report: GradientReport) -> bool:
    return report.memory is not None and report.memory.calls == 0 and gradient_missing(report)


def _columns_dropped(report: GradientReport) -> Finding | None:
    if not _not_called(report) or not report.dropped_columns:
        return None
    return Finding(
        sentence=f"the data has {', '.join(report.dropped_columns)}, the batch has not: Trainer removes what "
        f"forward does not name, so {memory_name(report)} never ran.",
        module=", ".join(report.trainable),
    )


def _hidden_by_leaf(report: GradientReport) -> Event | None:
    return next((event for event in report.events_of("made-leaf") if event.in_hook == "transformers"), None)


def _no_memory_hidden(report: GradientReport) -> Finding | None:
    if not _not_called(report) or not report.backward_ran:
        return None
    if _hidden_by_leaf(report) is None:
        return None
    return Finding(
        sentence=f"the batch holds no memory: {memory_name(report)} never ran. The backward runs all the "
        "same, because "
        "enable_input_require_grads (which activation_checkpointing_enable calls) gave the text embeddings "
        "a gradient.",
        module=", ".join(report.trainable),
    )


def _no_memory(report: GradientReport) -> Finding | None:
    if not _not_called(report):
        return None
    return Finding(
        sentence=f"the batch holds no memory: {memory_name(report)} never ran in this forward.",
        module=", ".join(report.trainable),
    )


_UNFREEZE = "freeze the frozen parts by module, unfreeze the projection last, and assert the trainable names."
_COUNT = "count memory tokens while building batches; skip batches without any, or anchor with + 0 * proj(dummy).sum()."

CAUSES: tuple[Cause, ...] = (
    Cause(id="grad-mode-leaked", table="A", title="grad mode switched off and left off",
          mend="use the with-form, torch.no_grad() or torch.set_grad_enabled(False), so that it ends.",
          find=_grad_mode_leaked),
    Cause(id="module-not-registered", table="C", title="projection kept in a plain list",
          mend="keep it in an attribute of its own or in nn.ModuleList, and build the optimizer afterwards.",
          find=_not_registered),
    Cause(id="peft-froze-projection", table="C", title="get_peft_model without modules_to_save",
          mend="pass the projection's name in modules_to_save, or unfreeze it after "
               "get_peft_model.", find=_peft_froze),
    Cause(id="projection-frozen", table="A", title="projection frozen by a blanket loop or helper",
          mend=_UNFREEZE, find=_projection_frozen),
    Cause(id="nothing-trainable", table="A", title="no parameter requires "
                                                   "grad", mend=_UNFREEZE, find=_nothing_trainable),
    Cause(id="columns-dropped", table="A", title="Trainer's remove_unused_columns dropped the images",
          mend="set remove_unused_columns=False in TrainingArguments.", find=_columns_dropped),
    Cause(id="no-memory-hidden", table="C", title="no memory in the batch, hidden by "
                                                  "enable_input_require_grads",
          mend=_COUNT, find=_no_memory_hidden),
    Cause(id="no-memory-in-batch", table="A", title="no memory in the batch", mend=_COUNT, find=_no_memory),
)  # fmt: skip
"""From special to general."""
