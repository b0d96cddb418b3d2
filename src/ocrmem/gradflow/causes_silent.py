"""Causes under which the backward runs and nothing, too little or the wrong thing is learnt."""

from __future__ import annotations

import math

from ocrmem.gradflow.cause import (
    Cause,
    Finding,
    at_event,
    gradient_zero,
    learns,
    memory_name,
)
from ocrmem.gradflow.report import GradientReport

LOUD_MEMORY = 100.0
"""Memory of this many times the embeddings' RMS learns badly: an initialisation 100 times too large stopped
at loss 3.7 in 150 steps where the ordinary one reached 0.06. A default nn.Linear gives up to about 30, and
learns."""


def _no_labels(report: GradientReport) -> Finding | None:
    labels = report.labels
    if labels is None or labels.given or labels.in_loss or report.some_gradient:
        return None
    return Finding(
        sentence="no position of the batch is labelled: all labels are -100, or the answer was truncated away."
    )


def _lost_to_shift(report: GradientReport) -> Finding | None:
    labels = report.labels
    if labels is None or not labels.given or labels.after_shift or labels.in_loss or report.some_gradient:
        return None
    return Finding(
        sentence=f"the only labelled position of each sample is position 0 ({labels.given} labels); the "
        "shift drops it, "
        "since nothing comes before it that could predict it.",
    )


def _pre_shifted(report: GradientReport) -> Finding | None:
    if report.labels is None or not report.labels.pre_shifted:
        return None
    return Finding(
        sentence="labels are already moved one to the left, and the model moves them once more: it learns "
        "the token after the next."
    )


def _matched_nothing(report: GradientReport) -> Finding | None:
    empty = next((event for event in report.events_of("splice") if event.slots == 0), None)
    if empty is None or not gradient_zero(report):
        return None
    return at_event(
        empty,
        f"the mask of {empty.op} is all False: the batch has no placeholder of the id that is looked for.",
    )


def _empty_memory(report: GradientReport) -> Finding | None:
    if report.memory is None or learns(report) or not gradient_zero(report):
        return None
    event = next(iter(report.events_of("empty")), None)
    if report.memory.calls and not report.memory.num_tokens:
        return Finding(
            sentence=f"{memory_name(report)} ran on no tokens at all; cat with an empty memory changes nothing.",
            module=report.memory.module,
        )
    return None if event is None else at_event(event, "nothing of the memory is left here: the slice is empty.")


def _rounded(report: GradientReport) -> Finding | None:
    flat = next(iter(report.events_of("flat")), None)
    if flat is None or not gradient_zero(report):
        return None
    return at_event(flat, f"{flat.op}() has derivative zero everywhere.")


def _masked(report: GradientReport) -> Finding | None:
    host = report.host
    if host is None or not gradient_zero(report) or not host.memory_positions:
        return None
    if host.masked_memory_positions < host.memory_positions:
        return None
    return Finding(
        sentence=f"attention_mask is 0 at all {host.memory_positions} memory positions, so nothing attends to them.",
        module=host.path,
    )


def _packed(report: GradientReport) -> Finding | None:
    host = report.host
    if host is None or not gradient_zero(report) or not host.restarting_positions:
        return None
    return Finding(
        sentence="position_ids start again after the memory and there is no attention mask: transformers "
        "reads that as "
        "two packed sequences, and the text does not see the memory.",
        module=host.path,
    )


def _after_labels(report: GradientReport) -> Finding | None:
    host = report.host
    if host is None or not gradient_zero(report) or not host.memory_positions or host.labels_after_memory != 0:
        return None
    return Finding(
        sentence="the memory comes after every labelled position, where causal attention does not look.",
        module=host.path,
    )


def _underflow(report: GradientReport) -> Finding | None:
    if report.underflow_scale is None:
        return None
    return Finding(
        sentence="the gradient underflows to zero in float16: with the loss times "
        f"{report.underflow_scale:.0f} it is there.",
        module=", ".join(report.trainable),
    )


def _anchored(report: GradientReport) -> Finding | None:
    event = next(iter(report.events_of("zero-weight")), None)
    if event is None or not gradient_zero(report) or (report.host is not None and report.host.memory_positions):
        return None
    return at_event(event, f"{memory_name(report)} enters this batch's loss at weight 0 only: the batch has no memory.")


def _zero_init(report: GradientReport) -> Finding | None:
    zeros = [tensor for tensor in report.tensors if len(tensor.shape) > 1 and tensor.all_zero_values]
    matrices = [tensor for tensor in report.tensors if len(tensor.shape) > 1]
    if len(zeros) < 2 or len(zeros) < len(matrices) or not report.backward_ran or report.error is not None:
        return None
    if any(tensor.state != "zero" for tensor in zeros):
        return None
    return Finding(
        sentence=f"all {len(zeros)} weight matrices of {memory_name(report)} are zero, so each keeps the "
        "other's gradient "
        "at zero and only the last bias learns.",
        module=", ".join(report.trainable),
    )


def _cached(report: GradientReport) -> Finding | None:
    memory = report.memory
    if memory is None or not memory.calls or memory.calls_again != 0:
        return None
    return Finding(
        sentence=f"{memory_name(report)} runs in the first forward and not in the second: its output is "
        "kept, and the "
        "second backward would go through a graph that the first one freed.",
        module=memory.module,
    )


def _fewer_slots(report: GradientReport) -> Finding | None:
    for event in report.events_of("splice"):
        if (
            event.op.startswith("masked_scatter")
            and event.slots
            and event.slots < event.num_elements
            and learns(report)
        ):
            return at_event(
                event,
                f"the text has room for {event.slots} of the memory's {event.num_elements} values: the rest "
                "is dropped, "
                "and every later sample gets the wrong ones.",
            )
    return None


def _short_mask(report: GradientReport) -> Finding | None:
    host = report.host
    if host is None or host.mask_length is None or host.mask_length >= host.length or report.error is not None:
        return None
    return Finding(
        sentence=f"attention_mask has {host.mask_length} columns, the embeddings have {host.length} "
        "positions: it is "
        "filled up on the right, and the last positions are hidden.",
        module=host.path,
    )


def _wrong_pairing(report: GradientReport) -> Finding | None:
    memory = report.memory
    if memory is None or memory.sample_moved is None or memory.sample_moved == memory.sample_expected:
        return None
    moved = "several samples or none" if memory.sample_moved < 0 else f"sample {memory.sample_moved}"
    return Finding(
        sentence=f"the first memory row belongs to sample {memory.sample_expected}, but changing it changes {moved}.",
        module=memory.module,
    )


def _not_finite(report: GradientReport) -> Finding | None:
    if report.error is not None or not report.backward_ran:
        return None
    loss_bad = report.loss is not None and not math.isfinite(report.loss)
    if not loss_bad and "non-finite" not in report.states:
        return None
    bad = [call for call in report.calls if not call.finite]
    # The call with the fewest calls inside it that are bad too, and the first of these in time.
    first = next((c for i, c in enumerate(bad) if i + 1 == len(bad) or bad[i + 1].depth <= c.depth), None)
    where = "in the backward" if first is None else f"in the output of `{first.path or report.model}`"
    return Finding(sentence=f"NaN or infinity appears first {where}.", module="" if first is None else first.path)


def _too_loud(report: GradientReport) -> Finding | None:
    memory = report.memory
    if memory is None or memory.rms is None or not memory.embedding_rms or not report.backward_ran:
        return None
    ratio = memory.rms / memory.embedding_rms
    if ratio <= LOUD_MEMORY:
        return None
    return Finding(
        sentence=f"memory tokens have {ratio:.0f} times the RMS of the text embeddings ({memory.rms:.3g} "
        "against "
        f"{memory.embedding_rms:.3g}).",
        module=memory.module,
    )


_LABELS = "count labelled tokens after the shift, and drop samples without any."

CAUSES: tuple[Cause, ...] = (
    Cause(id="labels-lost-to-shift", table="C", title="only position 0 is "
                                                      "labelled", mend=_LABELS, find=_lost_to_shift),
    Cause(id="no-labels", table="C", title="all labels are -100, or the answer is "
                                           "truncated", mend=_LABELS, find=_no_labels),
    Cause(id="splice-matched-nothing", table="C", title="all-False mask, such as a wrong placeholder id",
          mend="assert that the number of placeholders equals the number of memory "
               "tokens.", find=_matched_nothing),
    Cause(id="memory-empty", table="C", title="memory of length zero",
          mend="assert that every sample's memory has the tokens that its placeholders ask "
               "for.", find=_empty_memory),
    Cause(id="rounded", table="C", title=".round() and other flat operations",
          mend="leave it out, or use a straight-through estimator: x + (x.round() - "
               "x).detach().", find=_rounded),
    Cause(id="memory-masked", table="C", title="attention mask 0 on memory",
          mend="put 1 into the mask for every memory token.", find=_masked),
    Cause(id="packed-positions", table="C", title="position_ids restart at the text, without a mask",
          mend="pass an attention mask, or let position_ids go on counting.", find=_packed),
    Cause(id="memory-after-labels", table="C", title="memory after the labels",
          mend="put the memory in front of the text that it should help to predict.", find=_after_labels),
    Cause(id="fp16-underflow", table="C", title="float16 underflow",
          mend="scale the loss (torch.amp.GradScaler), or use bfloat16.", find=_underflow),
    Cause(id="anchored-batch", table="-", title="a batch without memory, anchored at weight "
                                                "0", undecided=True,
          mend="nothing need be mended in a mixed run; give the doctor a batch with memory to learn whether "
               "it learns.",
          find=_anchored),
    Cause(id="projection-zero-init", table="C", title="both layers initialised to zero",
          mend="initialise at most the last layer to zero.", find=_zero_init),
    Cause(id="memory-cached", table="B", title="projected memory cached across steps",
          mend="cache the encoder's features and run the projection in every step.", find=_cached),
    Cause(id="fewer-slots-than-memory", table="C", title="fewer placeholders than memory tokens",
          mend="assert equality for each sample before the splice.", find=_fewer_slots),
    Cause(id="attention-mask-too-short", table="C", title="attention mask not extended by the memory",
          mend="put one 1 in front of the mask for each memory token.", find=_short_mask),
    Cause(id="labels-pre-shifted", table="C", title="labels shifted before the model shifts them",
          mend="pass labels that line up with input_ids.", find=_pre_shifted),
    Cause(id="wrong-pairing", table="C", title="memory paired with the wrong sample",
          mend="carry the sample's index with every page, and test by permuting memories on held-out data.",
          find=_wrong_pairing),
    Cause(id="not-finite", table="-", title="NaN or infinity",
          mend="look at the inputs of that module; lower the learning rate or the precision's "
               "demands.", find=_not_finite),
    Cause(id="memory-too-loud", table="C", title="memory far larger than the embeddings",
          mend="scale the projection's output to the embeddings' RMS.", find=_too_loud),
)  # fmt: skip
"""From special to general."""
