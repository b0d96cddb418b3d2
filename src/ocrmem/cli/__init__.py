"""The `ocrmem` command: one thin file per verb.

Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 an error that the message explains, 2 a
wrong command line.
"""

from __future__ import annotations

import errno
import logging
import os
import sys

import typer

from ocrmem import __version__
from ocrmem.cli import bench, chat, doctor, encode, eval, fetch, params, render, store, train, tune_page
from ocrmem.errors import OcrmemError, message_of

app = typer.Typer(
    name="ocrmem",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A compressed visual memory for frozen language models: render, encode, project, splice.",
)
app.command("params")(params.command)
app.command("fetch")(fetch.command)
app.command("render")(render.command)
app.command("encode")(encode.command)
app.command("train")(train.command)
app.command("eval")(eval.command)
app.command("chat")(chat.command)
app.add_typer(store.app, name="store")
app.command("doctor")(doctor.command)
app.command("tune-page")(tune_page.command)
app.command("bench")(bench.command)


@app.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Say on stderr what is being done."),
) -> None:
    """Options of every verb."""
    if version:
        print(__version__)
        raise typer.Exit
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
        stream=sys.stderr,
    )


def main() -> None:
    """Entry point: our own errors, and those of the user's files and disk, become one line on stderr."""
    try:
        app()
    except OcrmemError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        path = error.filename2 or error.filename
        if path is None and error.errno != errno.ENOSPC:
            raise  # not about a file of the user's
        where = "" if path is None else f"{str(path)!r}: "
        print(f"error: {where}{error.strerror}. Check the path, its rights and the room on its disk.", file=sys.stderr)
        sys.exit(1)
