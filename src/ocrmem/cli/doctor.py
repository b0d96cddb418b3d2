"""`ocrmem doctor`: would this run learn, and if not, what cuts the gradient?"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    target: Annotated[
        str, typer.Argument(help="Training config (CONFIG.yaml), or your own script and function (my_script.py:make).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings that replace the config's.")
    ] = None,
    trainable: Annotated[
        list[str] | None, typer.Option(help="Module of your script that should learn; may be given several times.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Save the path from the projection to the loss as SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run one forward and backward and say whether the run can learn, and if not, why and where.

    `make()` in your script takes nothing and returns (model, batch) or (model, batch, optimizer). Exit codes: 0
    healthy, 1 cut or silent, 2 could not run.
    """
    from ocrmem.errors import OcrmemError
    from ocrmem.gradflow.doctor import could_not_run, run_doctor, run_doctor_on

    if not target.endswith((".yaml", ".yml")):
        sys.exit(run_doctor(target, json=as_json, trainable=trainable, picture=picture))

    from ocrmem.config.train import load_train_config
    from ocrmem.training.run import first_batch

    try:
        with contextlib.redirect_stdout(sys.stderr):
            trainer, batch = first_batch(load_train_config(Path(target), overrides or []))
    except OcrmemError as error:
        sys.exit(could_not_run(str(error), json=as_json))
    optimizer = trainer.create_optimizer()
    sys.exit(run_doctor_on(trainer.model.train(), batch, optimizer, trainable="proj", json=as_json, picture=picture))
