"""Says what cuts a gradient, where, and the mend; works on any `torch.nn.Module`.

report = verify_gradient_flow(model, batch, trainable="proj")
print(explain(report))
"""

from typing import TYPE_CHECKING, Any

from ocrmem.gradflow.doctor import Subject, run_doctor, run_doctor_on
from ocrmem.gradflow.explain import Explanation, explain
from ocrmem.gradflow.probe import verify_gradient_flow
from ocrmem.gradflow.report import GradientReport
from ocrmem.gradflow.svg import draw_path
from ocrmem.gradflow.tree import path_tree

if TYPE_CHECKING:
    from ocrmem.gradflow.callback import ExplainedTrainer, GradientFlowCallback

__all__ = [
    "ExplainedTrainer",
    "Explanation",
    "GradientFlowCallback",
    "GradientReport",
    "Subject",
    "draw_path",
    "explain",
    "path_tree",
    "run_doctor",
    "run_doctor_on",
    "verify_gradient_flow",
]


def __getattr__(name: str) -> Any:
    """Import what needs transformers only when it is asked for."""
    if name in ("ExplainedTrainer", "GradientFlowCallback"):
        from ocrmem.gradflow import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
