"""Causes that show as an exception of their own, told apart by its text and by what was running."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from ocrmem.gradflow.cause import Cause, Finding, at_error
from ocrmem.gradflow.report import ErrorFacts, GradientReport, SourceLine

_PATTERNS: list[re.Pattern[str]] = []
_Says = Callable[[ErrorFacts, GradientReport], str | None]


def _matching(
    pattern: str, sentence: str | _Says, *, where: Callable[[GradientReport], SourceLine | None] | None = None
) -> Callable[[GradientReport], Finding | None]:
    """A finder for errors whose text matches; `sentence` may look at the report and decline with None."""
    compiled = re.compile(pattern, re.IGNORECASE | re.DOTALL)
    _PATTERNS.append(compiled)

    def find(report: GradientReport) -> Finding | None:
        error = report.error
        if error is None or not compiled.search(error.message):
            return None
        said = sentence if isinstance(sentence, str) else sentence(error, report)
        if said is None:
            return None
        found = at_error(error, said)
        place = None if where is None else where(report)
        return found if place is None else replace(found, source=place)

    return find


_SAVED = r"Inference tensors cannot be saved for backward"
_TWICE = r"Trying to backward through the graph a second time"
_DTYPES = (
    r"(mat1 and mat2|m1 and m2|self and mat2|input and weight).{0,20}(must|to) have the same dtype"
    r"|expected scalar type .* but found|should be the same"
)


def _inference_weights(error: ErrorFacts, report: GradientReport) -> str | None:
    if not report.inference_parameters:
        return None
    return (
        f"{len(report.inference_parameters)} parameters, the first {report.inference_parameters[0]!r}, were "
        "made under "
        "torch.inference_mode(), so autograd may not save them for the backward."
    )


def _twice_by_reentrant(error: ErrorFacts, report: GradientReport) -> str | None:
    if not any(event.reentrant for event in report.events):
        return None
    return (
        "several reentrant checkpoints read the same memory from a closure; each runs a backward of its own "
        "through "
        "it, and the first one frees the graph."
    )


def _projection_input(error: ErrorFacts, report: GradientReport) -> str | None:
    if not error.in_trainable:
        return None
    return f"the features that enter {error.module!r} have another dtype than its weights ({_dtypes(error)})."


def _dtypes(error: ErrorFacts) -> str:
    return error.message.splitlines()[0][-80:].strip()


CAUSES: tuple[Cause, ...] = (
    Cause(
        id="inference-weights", table="B", title="the LLM was built or loaded under torch.inference_mode()",
        mend="load the model outside inference_mode (torch.no_grad() is fine).",
        find=_matching(_SAVED, _inference_weights),
    ),
    Cause(
        id="inference-features", table="B", title="encoder under torch.inference_mode(), projection outside",
        mend="use torch.no_grad() for the encoder, or features.clone() outside the inference_mode block.",
        find=_matching(
            _SAVED,
            "a tensor made under torch.inference_mode() enters a part that learns; autograd may not save it "
            "for the "
            "backward. A clone inside the block, .detach() and .float() stay inference tensors.",
            where=lambda report: report.inference_line,
        ),
    ),
    Cause(
        id="requires-grad-on-inference-tensor", table="B", title="requires_grad_() on an inference tensor",
        mend="clone the tensor outside inference_mode first, or use torch.no_grad() instead.",
        find=_matching(
            r"Setting requires_grad=True on inference tensor",
            "requires_grad was set on a tensor that was made under torch.inference_mode().",
        ),
    ),
    Cause(
        id="write-into-inference-tensor", table="B", title="in-place splice into inference-mode embeddings",
        mend="look the embeddings up under torch.no_grad(), or splice with torch.cat / masked_scatter out "
             "of place.",
        find=_matching(
            r"Inplace update to inference tensor",
            "memory is written in place into embeddings that were made under torch.inference_mode().",
        ),
    ),
    Cause(
        id="in-place-splice-on-leaf", table="B",
        title="in-place splice after enable_input_require_grads() or activation_checkpointing_enable()",
        mend="splice out of place (torch.cat, masked_scatter), or write into embeds.clone().",
        find=_matching(
            r"leaf Variable that requires grad is being used in an in-place operation",
            "memory is written in place into embeddings that a hook (enable_input_require_grads, or "
            "activation_checkpointing_enable, which calls it) made a leaf that requires grad.",
        ),
    ),
    Cause(
        id="numpy-on-grad-tensor", table="B", title=".numpy() on a tensor that requires grad",
        mend="stay in torch: obeying the message (.detach().numpy()) would cut the gradient.",
        find=_matching(r"Can't call numpy\(\) on Tensor that requires grad", "the memory is taken to numpy, "
                                                                             "where no gradient can follow."),
    ),
    Cause(
        id="reentrant-layers-share-memory", table="B", title="two reentrant checkpoints share memory by "
                                                             "closure",
        mend="checkpoint with use_reentrant=False.",
        find=_matching(_TWICE, _twice_by_reentrant),
    ),
    Cause(
        id="memory-cached", table="B", title="projected memory cached across steps",
        mend="cache the encoder's features and run the projection in every step.",
        find=_matching(
            _TWICE,
            "a graph is used for a second backward: projected memory was kept from an earlier step, whose "
            "backward "
            "freed it.",
        ),
    ),
    Cause(
        id="projection-in-worker", table="B", title="projection in a DataLoader worker",
        mend="let the workers return features, and run the projection in the main process.",
        find=_matching(
            r"Cowardly refusing to serialize non-leaf tensor",
            "projected memory is sent between processes; a graph cannot be sent along.",
        ),
    ),
    Cause(
        id="splice-dtype", table="B", title="masked_scatter of float32 memory into 16-bit embeddings",
        mend="cast at the splice: memory.to(embeds.dtype); the cast carries the gradient.",
        find=_matching(
            r"masked_scatter: expected self and source to have same dtypes"
            r"|Index put requires the source and destination dtypes match",
            "memory and embeddings have different dtypes at the splice.",
        ),
    ),
    Cause(
        id="more-slots-than-memory", table="B", title="more placeholders than memory tokens",
        mend="count placeholders and memory tokens for each sample and compare before the splice.",
        find=_matching(
            r"Number of elements of source < number of ones in mask"
            r"|shape mismatch: value tensor of shape .* cannot be broadcast to indexing result",
            "the text has more placeholders than there are memory tokens.",
        ),
    ),
    Cause(
        id="features-dtype", table="B", title="16-bit features into a float32 projection",
        mend="proj(features.float()), and keep the projection's weights in float32.",
        find=_matching(_DTYPES, _projection_input),
    ),
    Cause(
        id="memory-dtype", table="B", title="float32 memory into a 16-bit LLM",
        mend="cast after the projection: proj(features.float()).to(llm.dtype).",
        find=_matching(
            _DTYPES,
            lambda error, _: f"memory enters {error.module!r} in another dtype than its weights "
                             f"({_dtypes(error)}).",
        ),
    ),
    Cause(
        id="labels-not-extended", table="B", title="labels not extended by the memory's positions",
        mend="put -100 in front of the labels, once for each memory token.",
        find=_matching(
            r"Expected input batch_size \(\d+\) to match target batch_size \(\d+\)",
            lambda error, _: f"labels and logits differ in length ({_dtypes(error)}): the memory's "
                             "positions have no labels.",
        ),
    ),
    Cause(
        id="optimizer-empty", table="B", title="optimizer built from an empty list of parameters",
        mend="unfreeze the projection before the optimizer is built, and pass a list rather than a used-up "
             "generator.",
        find=_matching(r"optimizer got an empty parameter list", "the optimizer was given no parameters: "
                                                                 "nothing was trainable, or a generator was "
                                                                 "used up."),
    ),
    Cause(
        id="modules-to-save-suffix", table="B", title='modules_to_save=["proj"] matches q_proj',
        mend='give the projection a name that no other module ends with, such as "mem_projector".',
        find=_matching(r"modules_to_save cannot be applied to modules of type", "peft matches "
                                                                                "modules_to_save by the end "
                                                                                "of a name, and other "
                                                                                "modules end with it too "
                                                                                "(q_proj, k_proj...)."),
    ),
    Cause(
        id="cudnn-rnn-eval", table="B", title="eval() on a cuDNN RNN",
        mend="keep the RNN in train mode with dropout 0, or set torch.backends.cudnn.enabled = False around "
             "it.",
        find=_matching(r"cudnn RNN backward can only be called in training mode", "a cuDNN RNN is in eval "
                                                                                  "mode; it is the one kind "
                                                                                  "of module that eval() "
                                                                                  "keeps from a backward."),
    ),
    Cause(
        id="fsdp1-mixed-flat", table="E", title="FSDP1 with use_orig_params=False over frozen and trainable "
                                                "tensors",
        mend="pass use_orig_params=True, or use FSDP2 (fully_shard).",
        find=_matching(r"Must flatten tensors with uniform `?requires_grad", "FSDP1 flattens frozen and "
                                                                             "trainable tensors into one, "
                                                                             "which cannot be half "
                                                                             "trainable."),
    ),
    Cause(
        id="ddp-reentrant-twice", table="E", title="reentrant checkpoint under DDP",
        mend="checkpoint with use_reentrant=False.",
        find=_matching(
            r"Expected to mark a variable ready only once",
            "the projection runs under a reentrant checkpoint, whose inner backward tells DDP about a "
            "gradient that DDP counts already.",
        ),
    ),
    Cause(
        id="ddp-finished-reduction", table="E", title="DDP waits for gradients of the step before",
        mend="let every trainable tensor enter every loss (anchor: + 0 * proj(dummy).sum()), or pass "
             "find_unused_parameters=True.",
        find=_matching(r"Expected to have finished reduction in the prior iteration", "in the step before, "
                                                                                      "some trainable "
                                                                                      "tensor got no "
                                                                                      "gradient on this "
                                                                                      "process, and DDP "
                                                                                      "still waits for it."),
    ),
)  # fmt: skip
"""In order: where one text has two causes, the one that asks for more evidence comes first."""


def matches_known_text(error: ErrorFacts) -> bool:
    """Whether an error's text belongs to a known cause."""
    return any(pattern.search(error.message) for pattern in _PATTERNS)
