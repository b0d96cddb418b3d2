"""Two real processes: every scenario ends with the same, right verdict on both, and none of them hangs."""

import dataclasses

import pytest
import zoo
import zoo_ranks
from zoo_parts import CASES

from ocrmem.gradflow.explain import explain
from ocrmem.gradflow.report import RankFacts


@pytest.mark.parametrize("name", zoo_ranks.SCENARIOS)
def test_both_ranks_name_the_cause(rank_results, name):
    wanted = zoo_ranks.SCENARIOS[name]
    for result in rank_results:
        assert (result[name]["cause"], result[name]["verdict"]) == (wanted.cause, wanted.verdict), result[name][
            "sentence"
        ]


def test_the_sentence_names_the_rank(rank_results):
    assert "rank 1 has no memory in its batch" in rank_results[0]["ddp_projection_only"]["sentence"]
    assert (
        "rank 0 is at proj; rank 1 is at llm.model.layers.0" in rank_results[1]["fsdp2_anchor_at_the_loss"]["sentence"]
    )


def test_an_error_on_another_rank_is_passed_on():
    report = zoo.run(CASES["eval_everywhere"]).report
    fine = RankFacts(
        rank=0,
        memory_calls=1,
        loss_requires_grad=True,
        reached=("proj.first.weight",),
        error=None,
        anchored=False,
    )
    failed = dataclasses.replace(fine, rank=1, reached=(), loss_requires_grad=False, error="ValueError: no")
    parallel = dataclasses.replace(report.parallel, ranks=(fine, failed), backward_skipped=True)
    explanation = explain(dataclasses.replace(report, parallel=parallel))
    assert (explanation.cause, explanation.verdict) == ("rank-raised", "hangs")
    assert "rank 1 raised: ValueError: no; the others would wait for it" in explanation.sentence
