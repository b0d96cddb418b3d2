"""`explain`: from what was measured to one cause, its place and its mend."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ocrmem.gradflow import (
    causes_cuts,
    causes_errors,
    causes_optimizer,
    causes_parallel,
    causes_setup,
    causes_silent,
)
from ocrmem.gradflow.cause import E0, Cause, Finding, learns, moved
from ocrmem.gradflow.report import ErrorFacts, GradientReport, SourceLine

Verdict = Literal["healthy", "cut", "raises", "silent", "hangs", "undecided"]
"""healthy: it learns. cut: the bare RuntimeError. raises: another error. silent: the backward runs and
nothing, too little or the wrong thing is learnt. hangs: processes would wait for each other. undecided: this
batch cannot tell."""

UNKNOWN = "no-known-cause"
"""Cause of a broken chain that matches nothing we know."""

CAUSES: tuple[Cause, ...] = (
    *causes_parallel.CAUSES,
    *causes_errors.CAUSES,
    *causes_setup.CAUSES,
    *causes_cuts.CAUSES,
    *causes_silent.CAUSES,
    *causes_optimizer.CAUSES,
)
"""In the order in which they are tried."""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """Something that does not keep the model from learning, and is worth knowing."""

    id: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What is wrong, where, and the mend."""

    verdict: Verdict
    cause: str | None
    """Name of the cause; None if healthy."""
    sentence: str
    module: str
    """Where in the model; empty if that is not known."""
    source: SourceLine | None
    mend: str
    """One line; empty if healthy."""
    warnings: tuple[Remark, ...]

    @property
    def healthy(self) -> bool:
        """The trainable part learns from this batch."""
        return self.verdict == "healthy"

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 broken, 2 undecided."""
        return {"healthy": 0, "undecided": 2}.get(self.verdict, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if self.healthy:
            lines = [f"healthy: {self.sentence}"]
        else:
            lines = [f"{self.verdict} ({self.cause}): {self.sentence}"]
            if self.source is not None:
                lines.append(f"  at:   {self.source}" + (f"  {self.source.text}" if self.source.text else ""))
            elif self.module:
                lines.append(f"  in:   {self.module}")
            lines.append(f"  mend: {self.mend}")
        return "\n".join(lines + [f"  note: {warning.sentence}" for warning in self.warnings])


def explain(report: GradientReport) -> Explanation:
    """The cause, in one sentence, with the module, the source line where it is known, and the mend."""
    warnings = _warnings(report)
    for cause in CAUSES:
        finding = cause.find(report)
        if finding is not None:
            return _explanation(cause.id, cause.mend, finding, _verdict(report, cause), warnings)
    if learns(report) and "non-finite" not in report.states:
        return Explanation(
            verdict="healthy",
            cause=None,
            sentence=_healthy(report),
            module="",
            source=None,
            mend="",
            warnings=warnings,
        )
    mend = (
        "compare the tree of modules below with what you expect; the break lies between the last line that "
        "carries a "
        "gradient and the first that does not."
    )
    return _explanation(UNKNOWN, mend, _unknown(report), _verdict(report, None), warnings)


def find_error_cause(error: ErrorFacts) -> str | None:
    """Whether an exception's text is one that we know: the bare RuntimeError, or one of table B or E."""
    if E0 in error.message:
        return "bare"
    return "known" if causes_errors.matches_known_text(error) else None


def _explanation(
    cause: str, mend: str, finding: Finding, verdict: Verdict, warnings: tuple[Remark, ...]
) -> Explanation:
    return Explanation(
        verdict=verdict,
        cause=cause,
        sentence=finding.sentence,
        module=finding.module,
        source=finding.source,
        mend=mend,
        warnings=warnings,
    )


def _verdict(report: GradientReport, cause: Cause | None) -> Verdict:
    if cause is not None and cause.undecided:
        return "undecided"
    if report.parallel.backward_skipped or (cause is not None and cause.id == "ddp-unused-parameters"):
        return "hangs"
    if report.error is not None:
        return "cut" if E0 in report.error.message else "raises"
    if cause is not None and cause.id == "memory-cached":
        return "raises"  # in the second step
    return "silent"


def _healthy(report: GradientReport) -> str:
    arrived = sum(tensor.state != "none" for tensor in report.tensors)
    zeros = sum(tensor.state == "zero" for tensor in report.tensors)
    name = ", ".join(report.trainable) or report.model
    sentence = f"{arrived} of {len(report.tensors)} trainable tensors of {name} get a gradient"
    if zeros:
        sentence += f", {zeros} of them exactly zero, as behind weights that start at zero"
    if report.labels is not None and report.labels.in_loss is not None:
        sentence += f"; {report.labels.in_loss} tokens are learnt from"
    return sentence + "."


def _unknown(report: GradientReport) -> Finding:
    """Where the chain ends, as far as it was seen."""
    if report.error is not None and E0 not in report.error.message:
        sentence = f"the {report.error.phase} raised {report.error.type}: {report.error.message}"
        return Finding(sentence=sentence, module=report.error.module, source=report.error.source)
    if report.end is not None:
        end = report.end
        return Finding(
            sentence=f"no known cause; the chain ends at {end.op} in `{end.module or report.model}`.",
            module=end.module,
            source=end.source,
        )
    last = next((call for call in reversed(report.calls) if call.live), None)
    if last is None:
        return Finding(sentence="no known cause; no module's output leads back to the trainable tensors.")
    name = last.path or report.model
    if report.loss_live or last.path == "":
        return Finding(
            sentence="no known cause; the chain is whole up to the loss, and what arrives through it is "
            f"{' and '.join(sorted(report.states))}.",
            module=last.path,
        )
    return Finding(
        sentence=f"no known cause; the last module whose output leads back to the trainable tensors is `{name}`.",
        module=last.path,
    )


def _warnings(report: GradientReport) -> tuple[Remark, ...]:
    found: list[Remark] = []
    if learns(report):
        lucky = next((c for c in report.calls if c.inference_input and c.path in report.trainable), None)
        if lucky is not None:
            found.append(
                Remark(
                    id="inference-features-by-luck",
                    sentence=f"`{lucky.path}` gets inference tensors; it works only because their memory "
                    "layout forces a "
                    "copy. Use torch.no_grad() for the encoder.",
                )
            )
        lacking = [tensor.name for tensor in report.tensors if tensor.state == "none"]
        if lacking:
            found.append(
                Remark(
                    id="some-without-gradient",
                    sentence=f"{len(lacking)} of {len(report.tensors)} trainable tensors get no gradient "
                    "from this batch: " + ", ".join(lacking[:3]) + ("..." if len(lacking) > 3 else ""),
                )
            )
        memory = report.memory
        if moved(report) is False and memory is not None and memory.permuted and memory.calls_again:
            found.append(
                Remark(
                    id="order-does-not-matter",
                    sentence="the loss does not change when the memory tokens are permuted.",
                )
            )
    coarse = sorted({t.dtype for t in report.tensors if t.dtype in ("bfloat16", "float16")})
    if coarse and report.optimizer is None:
        found.append(
            Remark(
                id="coarse-weights",
                sentence=f"trainable weights are {coarse[0]}; small steps round back to the same number. "
                "Give the doctor "
                "the optimizer to see how many.",
            )
        )
    return tuple(found)
