"""Every case of the zoo gets its exact verdict, broken and mended."""

import pytest
import zoo
from zoo_parts import CASES, Composite, subject

from ocrmem.gradflow.explain import CAUSES, UNKNOWN, explain

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # the programs earn them

OUTSIDE_THE_ZOO = {
    "cudnn-rnn-eval": "needs a GPU; its text is tested below",
    "ddp-finished-reduction": "comes in the second step of a real DDP run; its text is tested below",
    "rank-raised": "test_gradflow_ranks.py",
    "rank-without-memory": "test_gradflow_ranks.py",
    "rank-outside-graph": "test_gradflow_ranks.py",
    "ranks-gather-differently": "test_gradflow_ranks.py",
    "ddp-unused-parameters": "test_gradflow_ranks.py",
    "ddp-reentrant-twice": "test_gradflow_ranks.py",
    "fsdp1-mixed-flat": "test_gradflow_ranks.py",
}
BROKEN = [case for case in CASES.values() if case.cause is not None]
HARMLESS = [case for case in CASES.values() if case.cause is None]


def runnable(cases):
    return [
        pytest.param(
            case,
            id=case.name,
            marks=[] if zoo.available(case) else pytest.mark.skip(reason=f"needs {case.needs}"),
        )
        for case in cases
    ]


@pytest.mark.parametrize("case", runnable(BROKEN))
def test_a_broken_program_is_named(case):
    result = zoo.run(case)
    assert (result.explanation.cause, result.explanation.verdict) == (case.cause, case.verdict), str(result.explanation)
    assert result.explanation.exit_code == (2 if case.verdict == "undecided" else 1)
    assert result.explanation.mend
    assert result.explanation.sentence


@pytest.mark.parametrize("case", runnable(BROKEN))
def test_its_mended_twin_is_healthy(case):
    explanation = zoo.run(case, mended=True).explanation
    assert explanation.healthy, str(explanation)
    assert explanation.exit_code == 0


@pytest.mark.parametrize("case", runnable(HARMLESS))
def test_a_look_alike_is_never_called_broken(case):
    result = zoo.run(case)
    assert result.explanation.healthy, str(result.explanation)
    if case.warning is not None:
        assert case.warning in {warning.id for warning in result.explanation.warnings}


def test_the_zoo_is_as_large_as_promised():
    assert len(BROKEN) >= 35
    assert len(HARMLESS) >= 15


def test_every_cause_is_shown_by_a_program():
    ids = [cause.id for cause in CAUSES]
    shown = {case.cause for case in BROKEN}
    assert set(ids) - shown - OUTSIDE_THE_ZOO.keys() == set()
    assert shown <= set(ids)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("detach", "memory.detach()"),
        ("projection_under_no_grad", "with torch.no_grad():"),
        ("projection_under_inference_mode", "with torch.inference_mode(not mended):"),
        ("grad_mode_leaked", "torch.set_grad_enabled(False)"),
        ("reentrant_projection", "checkpoint(self.proj, features"),
        ("numpy_round_trip", "memory.detach().numpy()"),
        ("splice_result_discarded", "embeds.masked_scatter(mask"),
        ("loss_from_generate", "self.llm.generate("),
        ("inference_features", "torch.inference_mode()"),
        ("float32_memory_into_bfloat16_llm", "self.llm(inputs_embeds=embeds"),
        ("optimizer_empty", "torch.optim.AdamW("),
    ],
)
def test_the_source_line_is_the_one_to_mend(name, line):
    source = zoo.run(CASES[name]).explanation.source
    assert source is not None
    assert source.file.startswith("tests/gradflow/zoo_") or "/tests/gradflow/zoo_" in source.file
    assert line in source.text


def test_a_break_that_is_none_of_ours_says_so_and_shows_where_the_chain_ends():
    import torch

    class Vanish(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return hidden.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.zeros_like(grad)

    class Model(Composite):
        def splice(self, memory, embeds):
            return super().splice(Vanish.apply(memory), embeds)

    explanation = explain(subject(Model()).examine())
    assert (explanation.cause, explanation.verdict) == (UNKNOWN, "silent")
    assert (
        "no known cause; the chain is whole up to the loss, and what arrives through it is zero" in explanation.sentence
    )
