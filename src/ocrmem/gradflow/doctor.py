"""The doctor: from a script's `make()` to a verdict on the screen and an exit code."""

from __future__ import annotations

import importlib.util
import json as jsonlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ocrmem.errors import OcrmemError, ProbeError
from ocrmem.files import write_text
from ocrmem.gradflow.explain import explain, find_error_cause
from ocrmem.gradflow.probe import LossFunction, report_of_error, verify_gradient_flow
from ocrmem.gradflow.report import GradientReport
from ocrmem.gradflow.source import error_place
from ocrmem.gradflow.svg import draw_path
from ocrmem.gradflow.target import Trainable
from ocrmem.gradflow.tree import path_tree

COULD_NOT_RUN = 2
"""Exit code where no verdict was reached."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the doctor examines; the arguments of `verify_gradient_flow`."""

    model: nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer | None = None
    trainable: Trainable | None = None
    loss_fn: LossFunction | None = None
    step: Callable[[], object] | None = None
    memory_samples: Sequence[int] | None = None
    dropped_columns: Sequence[str] = field(default=())

    def examine(self) -> GradientReport:
        """Run the probe."""
        return verify_gradient_flow(
            self.model,
            self.batch,
            self.trainable,
            self.loss_fn,
            optimizer=self.optimizer,
            step=self.step,
            memory_samples=self.memory_samples,
            dropped_columns=self.dropped_columns,
        )


def run_doctor(
    target: str,
    json: bool = False,
    *,
    trainable: Sequence[str] | None = None,
    picture: Path | None = None,
) -> int:
    """Examine what a script makes.

    Args:
        target: `my_script.py:make`; `make()` takes nothing and returns (model, batch), (model, batch,
            optimizer), or a `Subject`.
        json: print one JSON object instead of text.
        trainable: names of the modules that should learn; None: what `make` says, or what requires grad.
        picture: where to save the path as SVG; None: no picture.

    Returns:
        0 healthy; 1 cut, silent, or failing for a known cause; 2 no verdict was reached.
    """
    try:
        make = load_make(target)
        subject = make_subject(make, target=target)
        if isinstance(subject, GradientReport):
            return show(subject, json=json, picture=picture)
        if trainable is not None:
            subject = Subject(**{**vars(subject), "trainable": tuple(trainable)})
        return show(subject.examine(), json=json, picture=picture)
    except OcrmemError as error:
        return could_not_run(str(error), json=json)


def run_doctor_on(
    model: nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    trainable: Trainable | None = None,
    loss_fn: LossFunction | None = None,
    json: bool = False,
    picture: Path | None = None,
) -> int:
    """Examine a model at hand; output and exit code as for `run_doctor`."""
    subject = Subject(model=model, batch=batch, optimizer=optimizer, trainable=trainable, loss_fn=loss_fn)
    try:
        return show(subject.examine(), json=json, picture=picture)
    except OcrmemError as error:
        return could_not_run(str(error), json=json)


def show(report: GradientReport, *, json: bool = False, picture: Path | None = None) -> int:
    """Print the verdict and the path, save the picture, return the exit code."""
    explanation = explain(report)
    if picture is not None:
        write_text(picture, draw_path(report, explanation))
    if json:
        shown = {"explanation": explanation.to_json(), "report": report.to_json()}
        print(jsonlib.dumps(shown, allow_nan=False))
    else:
        print(path_tree(report, explanation))
        print()
        print(explanation)
        if picture is not None:
            print(f"\npicture: {picture}")
    return explanation.exit_code


def could_not_run(message: str, *, json: bool) -> int:
    """Say why there is no verdict."""
    if json:
        print(jsonlib.dumps({"error": message}))
    else:
        print(f"could not run: {message}", file=sys.stderr)
    return COULD_NOT_RUN


def load_make(target: str) -> Callable[[], Any]:
    """Import `my_script.py` and return its function.

    Raises:
        ProbeError: the target has another form, the file does not exist, does not import, or has no such
            function.
    """
    file, separator, name = target.rpartition(":")
    if not separator or not file.endswith(".py") or not name.isidentifier():
        raise ProbeError(f"the target is {target!r}; expected a Python file and a function in it: my_script.py:make")
    path = Path(file)
    if not path.is_file():
        raise ProbeError(f"{file!r} is not a file (looked in {Path.cwd()}). Give the path of the script.")
    module = _import(path)
    make = vars(module).get(name)
    if not callable(make):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        shown = ", ".join(functions[:8]) or "none"
        raise ProbeError(f"{file!r} has no function {name!r}; it has: {shown}.")
    return make


def make_subject(make: Callable[[], Any], *, target: str) -> Subject | GradientReport:
    """Call `make()`; an error of a known kind in it becomes a report that `explain` understands.

    Raises:
        ProbeError: `make` raised something else, or returned something else.
    """
    try:
        made = make()
    except OcrmemError:
        raise
    except Exception as error:
        source, _ = error_place(error.__traceback__)
        report = report_of_error(error, phase="build")
        if report.error is not None and find_error_cause(report.error) is not None:
            return report
        at = "" if source is None else f" at {source} (`{source.text}`)"
        raise ProbeError(f"{target} raised {type(error).__name__}{at}: {error}. Make it run first.") from error
    if isinstance(made, Subject):
        return made
    if isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module):
        return Subject(model=made[0], batch=made[1], optimizer=made[2] if len(made) == 3 else None)
    shown = f"{len(made)} values" if isinstance(made, tuple) else type(made).__name__
    raise ProbeError(
        f"{target} returned {shown}; expected (model, batch), (model, batch, optimizer), or an "
        "ocrmem.gradflow.Subject, with a torch.nn.Module as the model."
    )


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ProbeError(f"{str(path)!r} cannot be imported as Python; give a .py file.")
    module = importlib.util.module_from_spec(spec)
    with _beside(path):
        sys.modules.setdefault(path.stem, module)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            source, _ = error_place(error.__traceback__)
            at = "" if source is None else f" at {source}"
            raise ProbeError(
                f"{str(path)!r} does not import: {type(error).__name__}{at}: {error}. Make `python {path}` "
                "run first, "
                "and keep the training itself under `if __name__ == '__main__':`."
            ) from error
        finally:
            if sys.modules.get(path.stem) is module:
                del sys.modules[path.stem]
    return module


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let a script import its neighbours, as `python my_script.py` does."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
