"""The zoo's confusion table: `python tests/gradflow/zoo.py` runs every case, broken and mended, and prints
it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import zoo_cuts  # noqa: F401
import zoo_errors  # noqa: F401
import zoo_harmless  # noqa: F401
import zoo_silent  # noqa: F401
from zoo_parts import CASES, Case

from ocrmem.gradflow.doctor import make_subject
from ocrmem.gradflow.explain import Explanation, explain
from ocrmem.gradflow.report import GradientReport


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case, run."""

    case: Case
    report: GradientReport
    explanation: Explanation

    @property
    def right(self) -> bool:
        """Cause, verdict and warning are as the case says."""
        warned = self.case.warning is None or self.case.warning in {w.id for w in self.explanation.warnings}
        return self.explanation.cause == self.case.cause and self.explanation.verdict == self.case.verdict and warned


def available(case: Case) -> bool:
    """Whether what the case needs is installed."""
    return case.needs is None or find_spec(case.needs) is not None


def run(case: Case, *, mended: bool = False) -> Result:
    """Build and examine one case."""
    torch.manual_seed(0)
    made = make_subject(lambda: case.make(mended=mended), target=case.name)
    report = made if isinstance(made, GradientReport) else made.examine()
    return Result(case=case, report=report, explanation=explain(report))


def main() -> int:
    """Print the table; 0 if everything is on the diagonal."""
    torch.set_num_threads(1)
    wrong = 0
    print(f"{'case':46} {'expected':34} {'named':34} {'verdict':9} {'mended':9}")
    for case in CASES.values():
        if not available(case):
            print(f"{case.name:46} skipped: needs {case.needs}")
            continue
        result, mended = run(case), run(case, mended=True)
        good = result.right and mended.explanation.healthy
        wrong += not good
        print(
            f"{case.name:46} {case.cause or 'healthy':34} {result.explanation.cause or 'healthy':34} "
            f"{result.explanation.verdict:9} "
            f"{mended.explanation.verdict:9}{'' if good else '  <-- off the diagonal'}"
        )
    broken = sum(case.cause is not None for case in CASES.values())
    print(f"{broken} broken, {len(CASES) - broken} harmless, {wrong} off the diagonal")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
