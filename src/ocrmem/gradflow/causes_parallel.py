"""Causes that only several processes can have together."""

from __future__ import annotations

from ocrmem.gradflow.cause import Cause, Finding
from ocrmem.gradflow.report import GradientReport, RankFacts


def _collectives(report: GradientReport) -> Finding | None:
    places = report.parallel.collectives_differ
    if places is None:
        return None
    shown = "; ".join(f"rank {rank} is at {place}" for rank, place in enumerate(places))
    return Finding(
        sentence=f"the processes gather different sharded modules at the same time and would wait for ever: {shown}.",
        module=next((place for place in places if not place.startswith("(")), ""),
    )


def _split(report: GradientReport) -> tuple[list[RankFacts], list[RankFacts]]:
    ranks = report.parallel.ranks
    return [fact for fact in ranks if fact.reached], [fact for fact in ranks if not fact.reached]


def _shown(facts: list[RankFacts]) -> str:
    return ("rank " if len(facts) == 1 else "ranks ") + ", ".join(str(fact.rank) for fact in facts)


def _rank_raised(report: GradientReport) -> Finding | None:
    failed = [fact for fact in report.parallel.ranks if fact.error is not None]
    if not report.parallel.backward_skipped or not failed or report.error is not None:
        return None
    return Finding(sentence=f"{_shown(failed)} raised: {failed[0].error}; the others would wait for it.")


def _outside_graph(report: GradientReport) -> Finding | None:
    having, lacking = _split(report)
    if not report.parallel.backward_skipped or not having or not lacking:
        return None
    if not all(fact.loss_requires_grad for fact in lacking):
        return None
    return Finding(
        sentence=f"on {_shown(lacking)} no tensor that {report.parallel.wrapper} reduces is in the loss's "
        "graph (the loss "
        f"requires grad for another reason), so {_shown(having)} would wait for a gradient that never comes.",
        module=", ".join(report.trainable),
    )


def _rank_without_memory(report: GradientReport) -> Finding | None:
    having, lacking = _split(report)
    if not report.parallel.backward_skipped or not having or not lacking:
        return None
    return Finding(
        sentence=f"{_shown(lacking)} has no memory in its batch: its backward fails, and {_shown(having)} "
        "would wait for "
        "its gradient until the timeout.",
        module=", ".join(report.trainable),
    )


def _unused(report: GradientReport) -> Finding | None:
    if report.parallel.find_unused_parameters is not False or len(report.parallel.ranks) < 2:
        return None
    reached = {fact.reached for fact in report.parallel.ranks}
    if len(reached) < 2 or not all(reached):
        return None
    most = max(report.parallel.ranks, key=lambda fact: len(fact.reached))
    lacking = [fact for fact in report.parallel.ranks if set(fact.reached) != set(most.reached)]
    lost = sorted(set(most.reached) - set(lacking[0].reached))
    return Finding(
        sentence=f"on {_shown(lacking)} the loss does not reach {lost[0]}; with "
        "find_unused_parameters=False DDP waits for "
        "it, and the next step fails on one process and hangs on the other.",
        module=", ".join(report.trainable),
    )


_ANCHOR = "anchor a batch without memory: loss + 0 * proj(dummy).sum(); under FSDP add it to inputs_embeds instead."

CAUSES: tuple[Cause, ...] = (
    Cause(id="ranks-gather-differently", table="E", title="FSDP2: the processes run different modules",
          mend="run the projection on every rank and in the same place: inputs_embeds + 0 * "
               "proj(encoder(dummy)).sum().",
          find=_collectives),
    Cause(id="rank-raised", table="E", title="one process failed", mend="mend that process's error first.",
          find=_rank_raised),
    Cause(id="rank-outside-graph", table="E", title="DDP with an input-grad hook, one rank without memory",
          mend=_ANCHOR, find=_outside_graph),
    Cause(id="rank-without-memory", table="E", title="DDP, one rank without memory", mend=_ANCHOR,
          find=_rank_without_memory),
    Cause(id="ddp-unused-parameters", table="E", title="DDP, a rank that uses fewer trainable tensors",
          mend="pass find_unused_parameters=True, or anchor: loss + 0 * proj(dummy).sum().", find=_unused),
)  # fmt: skip
