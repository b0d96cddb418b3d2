"""Operations that cut the chain, so that no gradient arrives at all.

With nothing else that requires grad the backward raises the bare RuntimeError; with a leaf elsewhere, such as
embeddings that a hook made require grad, it runs and stays silent. The cause is the same.
"""

from __future__ import annotations

from ocrmem.gradflow.cause import (
    Cause,
    Finding,
    at_event,
    at_region,
    gradient_missing,
    learns,
    memory_name,
    part_of,
    value_reaches_loss,
)
from ocrmem.gradflow.report import Event, GradientReport

SPLICE_OPS = frozenset(
    {
        *("cat", "concat", "concatenate", "stack", "where", "add", "add_", "copy_", "__setitem__"),
        *("masked_scatter", "masked_scatter_", "scatter", "scatter_", "slice_scatter"),
        *("index_put", "index_put_", "index_copy", "index_copy_"),
    }
)


def _reentrant(report: GradientReport) -> Finding | None:
    if not gradient_missing(report):
        return None
    for path in report.trainable:
        if any(call.reentrant for call in report.calls_of(path)):
            event = next((event for event in report.events if event.reentrant), None)
            return Finding(
                sentence=f"`{path}` runs inside a reentrant checkpoint none of whose inputs requires grad "
                "(frozen "
                "features do not), so the checkpoint hands on no gradient.",
                module=path,
                source=None if event is None else event.region or event.source,
            )
    return None


def _reentrant_closure(report: GradientReport) -> Finding | None:
    end = report.end
    if not gradient_missing(report) or end is None or not end.reentrant:
        return None
    return at_region(
        end,
        "memory enters a reentrant checkpoint as a keyword or from a closure; such a checkpoint follows "
        "gradients of "
        "its positional inputs only.",
    )


def _grad_off(report: GradientReport) -> Event | None:
    end = report.end
    return end if end is not None and end.kind == "grad-off" and gradient_missing(report) else None


def _enable_grad_inside(report: GradientReport) -> Finding | None:
    end = _grad_off(report)
    if end is None or not (end.inference_mode and end.grad_enabled):
        return None
    return at_region(end, "torch.enable_grad() inside torch.inference_mode() does not bring the gradient back.")


def _outermost_without_grad(report: GradientReport, path: str) -> str | None:
    """The outermost module around `path` that was entered with grad mode off."""
    for call in report.calls:
        if call.path and part_of(path, call.path) and (call.inference_mode or not call.grad_enabled):
            return call.path
    return None


def _accelerate_hook(report: GradientReport) -> Finding | None:
    end = _grad_off(report)
    if end is None or end.in_hook != "accelerate":
        return None
    # The hook switches grad mode off after its own module was entered, so that one is a level further out.
    hooked = (_outermost_without_grad(report, end.module) or end.module).rpartition(".")[0] or end.module
    return Finding(sentence=f"`{hooked}` runs inside an accelerate hook with no_grad=True.", module=hooked)


def _generate(report: GradientReport) -> Finding | None:
    end = _grad_off(report)
    if end is None or not end.in_generate:
        return None
    return at_event(end, "the loss is made of what generate() returned, and generate() runs under torch.no_grad().")


def _projection_without_grad(inference: bool):
    def find(report: GradientReport) -> Finding | None:
        end = _grad_off(report)
        if end is None or end.inference_mode is not inference:
            return None
        for path in report.trainable:
            inside = [call for call in report.calls_of(path) if call.inference_mode or not call.grad_enabled]
            if inside or part_of(end.module, path):
                mode = "torch.inference_mode()" if inference else "torch.no_grad()"
                return Finding(
                    sentence=f"`{path}` itself runs under {mode}.",
                    module=path,
                    source=end.region or end.source,
                )
        return None

    return find


def _llm_without_grad(inference: bool):
    def find(report: GradientReport) -> Finding | None:
        end = _grad_off(report)
        if end is None or end.inference_mode is not inference or not end.module:
            return None
        outermost = _outermost_without_grad(report, end.module)
        if outermost is None:
            return None
        mode = "torch.inference_mode()" if inference else "torch.no_grad()"
        return Finding(
            sentence=f"`{outermost}` runs under {mode}: a frozen LLM needs no gradient for its weights, but "
            "the "
            "gradient must pass through it.",
            module=outermost,
            source=end.region or end.source,
        )

    return find


def _splice_without_grad(report: GradientReport) -> Finding | None:
    end = _grad_off(report)
    if end is None or end.op not in SPLICE_OPS:
        return None
    return at_region(end, f"memory is put among the embeddings ({end.op}) with grad mode off.")


def _region_without_grad(report: GradientReport) -> Finding | None:
    end = _grad_off(report)
    return None if end is None else at_region(end, f"{end.op} runs with grad mode off.")


def _written(kind: str, sentence: str):
    def find(report: GradientReport) -> Finding | None:
        if learns(report) or not gradient_missing(report):
            return None
        event = next((event for event in report.events if event.kind == kind), None)
        return None if event is None else at_event(event, sentence)

    return find


def _loss_made_leaf(report: GradientReport) -> Finding | None:
    # `slots` of this kind of event is the tensor's number of dimensions: the loss has none.
    made = next((event for event in report.events_of("made-leaf") if event.slots == 0), None)
    if made is None or report.some_gradient or not gradient_missing(report):
        return None
    below = "" if report.end is None or report.end is made else f" What cut it before: {_place(report.end)}."
    return at_event(made, f"requires_grad was set on the loss itself: the backward runs, and ends there.{below}")


def _made_leaf_after_detach(report: GradientReport) -> Finding | None:
    made = next((e for e in report.events_of("made-leaf") if e.num_elements and e.slots), None)
    if made is None or not gradient_missing(report) or made.in_hook == "transformers":
        return None
    return at_event(
        made,
        "a cut tensor was given requires_grad=True: it is a new leaf, so the backward runs and ends there, "
        "before "
        f"{memory_name(report)}.",
    )


def _ends_with(kind: str, sentence: str, *, ops: frozenset[str] | None = None):
    def find(report: GradientReport) -> Finding | None:
        end = report.end
        if end is None or end.kind != kind or not gradient_missing(report) or (ops and end.op not in ops):
            return None
        return at_event(end, sentence.format(op=end.op.removesuffix(".__get__")))

    return find


def _no_derivative(report: GradientReport) -> Finding | None:
    end = report.end
    if end is None or end.kind != "no-derivative" or not gradient_missing(report):
        return None
    if not end.grad_enabled:
        return at_event(end, f"a custom autograd function ({end.op} in it) gives an output without a gradient.")
    return at_event(end, f"{end.op} gives an output without a gradient.")


def _left(kind: str, ops: frozenset[str] | None, sentence: str):
    def find(report: GradientReport) -> Finding | None:
        if not gradient_missing(report) or report.loss_carries or value_reaches_loss(report) is False:
            return None
        for event in report.events:
            if event.kind == kind and (ops is None or event.op in ops):
                return at_event(event, sentence.format(op=event.op))
        return None

    return find


def _never_spliced(report: GradientReport) -> bool:
    return (
        gradient_missing(report)
        and report.memory is not None
        and report.memory.calls > 0
        and not report.loss_carries
        and not value_reaches_loss(report)
    )


def _result_discarded(report: GradientReport) -> Finding | None:
    lost = next((e for e in report.events_of("splice") if not e.used and not e.in_place), None)
    if lost is None or not _never_spliced(report):
        return None
    return at_event(
        lost,
        f"the result of {lost.op} is thrown away: it returns a new tensor and leaves the old one as it was.",
    )


def _into_copy(report: GradientReport) -> Finding | None:
    event = next(iter(report.events_of("write-into-copy")), None)
    if event is None or not _never_spliced(report):
        return None
    return at_event(
        event, "memory is written into a copy: embeds[mask] makes one, and the embeddings stay as they were."
    )


def _memory_unused(report: GradientReport) -> Finding | None:
    if not _never_spliced(report):
        return None
    return Finding(
        sentence=f"{memory_name(report)} ran, but nothing of its output reaches the loss: it is never spliced in.",
        module=", ".join(report.trainable),
    )


def _place(event: Event) -> str:
    return f"{event.op} at {event.source}" if event.source is not None else event.op


_OUTSIDE = "freeze with requires_grad_(False) only, and take the block away."
_KEEP = "keep the tensor as it is; to show or store a copy, detach that copy alone."

CAUSES: tuple[Cause, ...] = (
    Cause(id="loss-made-leaf", table="C", title="loss.requires_grad_(True)",
          mend="take that line away and mend what cut the loss.", find=_loss_made_leaf),
    Cause(id="reentrant-checkpoint", table="A", title="reentrant checkpoint around the projection",
          mend="checkpoint with use_reentrant=False.", find=_reentrant),
    Cause(id="reentrant-checkpoint-closure", table="A",
          title="memory enters a reentrant checkpoint by keyword or closure",
          mend="checkpoint with use_reentrant=False.", find=_reentrant_closure),
    Cause(id="written-into-parameter", table="A", title="memory written into embedding.weight under no_grad",
          mend="splice into the looked-up embeddings, out of place, and leave the weight alone.",
          find=_written("write-into-parameter", "memory is written into a frozen parameter; a parameter "
                                                "keeps the values, not the graph.")),
    Cause(id="written-through-data", table="C", title="memory written through .data",
          mend="splice out of place (torch.cat, masked_scatter) instead of through .data.",
          find=_written("write-through-data", "memory is written through .data, which autograd does not "
                                              "see.")),
    Cause(id="enable-grad-in-inference-mode", table="A", title="enable_grad() inside inference_mode()",
          mend="use torch.no_grad() outside instead; enable_grad() works inside "
               "that.", find=_enable_grad_inside),
    Cause(id="accelerate-hook-no-grad", table="A", title="accelerate hook with no_grad=True",
          mend="add the hook with no_grad=False, or dispatch the model without it for "
               "training.", find=_accelerate_hook),
    Cause(id="loss-from-generate", table="A", title="loss from generate()",
          mend="call the model itself with labels for the loss.", find=_generate),
    Cause(id="projection-under-inference-mode", table="A", title="projection under inference_mode",
          mend="move the projection out of the block; a clone afterwards does not help.",
          find=_projection_without_grad(True)),
    Cause(id="projection-under-no-grad", table="A", title="projection under no_grad",
          mend="move the projection out of the block; the frozen encoder may stay in it.",
          find=_projection_without_grad(False)),
    Cause(id="llm-under-inference-mode", table="A", title="LLM under inference_mode", mend=_OUTSIDE,
          find=_llm_without_grad(True)),
    Cause(id="llm-under-no-grad", table="A", title="LLM under "
                                                   "no_grad", mend=_OUTSIDE, find=_llm_without_grad(False)),
    Cause(id="splice-under-no-grad", table="A", title="splice inside no_grad",
          mend="splice outside the block; looking the text embeddings up inside it is "
               "fine.", find=_splice_without_grad),
    Cause(id="operation-under-no-grad", table="A", title="another operation with grad mode "
                                                         "off", mend=_OUTSIDE,
          find=_region_without_grad),
    Cause(id="detached-then-made-leaf", table="C", title=".detach().requires_grad_(True)",
          mend="take both calls away: the tensor requires grad by itself when the projection does.",
          find=_made_leaf_after_detach),
    Cause(id="wrapped-in-parameter", table="C", title="nn.Parameter(memory)",
          mend="use the projection's output itself; nn.Parameter starts a new graph.",
          find=_ends_with("leaf", "memory is wrapped in nn.Parameter or alike, which is a new leaf (first "
                                  "used here): the backward ends there.")),
    Cause(id="numpy-round-trip", table="A", title="memory through numpy",
          mend="stay in torch between the projection and the loss.",
          find=_left("left-torch", frozenset({"numpy", "__array__", "__dlpack__"}), "memory leaves torch by "
                                                                                    "{op}(), where no "
                                                                                    "gradient can follow.")),
    Cause(id="python-numbers", table="A", title="memory through .item() or .tolist()",
          mend="stay in torch between the projection and the loss.",
          find=_left("left-torch", None, "memory leaves torch as Python numbers by {op}().")),
    Cause(id="memory-serialised", table="C", title="torch.save and torch.load of projected memory",
          mend="store the encoder's features, and project them in every step.",
          find=_left("serialised", None, "projected memory is written to a file and read back; what is read "
                                         "is a new leaf.")),
    Cause(id="detach", table="A", title=".detach()", mend=_KEEP,
          find=_ends_with("detach", "{op}() cuts the memory off.")),
    Cause(id="data-attribute", table="A", title=".data", mend=_KEEP,
          find=_ends_with("data", ".data cuts the memory off, as .detach() does.")),
    Cause(id="copied-by-torch-tensor", table="A", title="torch.tensor(memory)",
          mend="use the tensor itself, or torch.as_tensor.",
          find=_ends_with("copy", "torch.{op} copies the values and leaves the graph behind.")),
    Cause(id="cast-to-integer", table="A", title=".long() and other integer casts", mend="keep it floating "
                                                                                         "point.",
          find=_ends_with("integer", "{op}() turns the memory into integers, which have no gradient.",
                          ops=frozenset({"long", "int", "short", "byte", "char", "bool", "to", "type"}))),
    Cause(id="nearest-token", table="A", title="quantisation to the nearest token",
          mend="use the memory itself, or a straight-through estimator: x + (quantised - x).detach().",
          find=_ends_with("integer", "{op}() picks indices: what is looked up with them does not descend "
                                     "from the memory.")),
    Cause(id="operation-without-derivative", table="A", title="an operation without a derivative",
          mend="replace the operation by one that autograd supports.",
          find=_no_derivative),
    Cause(id="splice-result-discarded", table="A", title="result of masked_scatter thrown away",
          mend="embeds = embeds.masked_scatter(mask, memory).", find=_result_discarded),
    Cause(id="splice-into-copy", table="A", title="embeds[mask].copy_(memory)",
          mend="embeds = embeds.masked_scatter(mask[..., None], memory).", find=_into_copy),
    Cause(id="memory-never-spliced", table="A", title="projection run but never spliced",
          mend="put its output among the embeddings that the LLM gets, and count that every token found a "
               "place.",
          find=_memory_unused),
)  # fmt: skip
"""From special to general."""
