"""From running frames and tracebacks to lines of the user's source."""

from __future__ import annotations

import linecache
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import torch
from torch import nn

from ocrmem.gradflow.report import SourceLine

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_PACKAGES = frozenset({"transformers", "accelerate", "peft", "trl", "deepspeed", "lightning"})
_FOLDERS = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))
_CHECKPOINT = str(Path(torch.__file__).parent / "utils" / "checkpoint.py")
_CONTEXTLIB = str(Path(torch.__file__).parent / "utils" / "_contextlib.py")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the frames around an operation tell about it."""

    source: SourceLine | None
    checkpoint: SourceLine | None
    """Where the enclosing reentrant checkpoint was called; None outside of one."""
    in_generate: bool
    in_hook: str | None


def source_line(file: str, line: int) -> SourceLine:
    """The line with its text, the path relative to the working directory where it lies below it."""
    text = linecache.getline(file, line).strip()
    path = Path(file)
    with suppress(ValueError):
        path = path.relative_to(Path.cwd())
    return SourceLine(file=str(path), line=line, text=text)


def surroundings() -> Surroundings:
    """Look outwards from the caller: the user's line, and what encloses it.

    The line is the innermost one in code that is not installed as a library; failing that, the innermost one
    outside torch.
    """
    lines: list[_Line] = []
    in_checkpoint = in_generate = False
    checkpoint, hooks = None, set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not _is_ours_or_torch(file):
            lines.append(_Line(file, frame.f_lineno, frame.f_globals.get("__name__", "")))
            if in_checkpoint and checkpoint is None:
                checkpoint = source_line(file, frame.f_lineno)
        if file == _CHECKPOINT and name == "forward":
            in_checkpoint = True
        elif name == "generate" and file.endswith("transformers/generation/utils.py"):
            in_generate = True
        elif file.endswith("accelerate/hooks.py"):
            hooks.add("accelerate")
        frame = frame.f_back
    if lines and lines[0].package == "transformers":
        hooks.add("transformers")
    return Surroundings(
        source=_preferred(lines),
        checkpoint=checkpoint,
        in_generate=in_generate,
        in_hook=min(hooks) if hooks else None,
    )


@dataclass(frozen=True)
class _Line:
    """A line of a stack, and the module that it belongs to."""

    file: str
    number: int
    module: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def is_library(self) -> bool:
        return self.package in _PACKAGES or self.file.startswith(_FOLDERS)


def _preferred(lines: list[_Line]) -> SourceLine | None:
    """Of lines, innermost first, the first in the user's own code, else the first."""
    chosen = next((line for line in lines if not line.is_library), lines[0] if lines else None)
    return None if chosen is None else source_line(chosen.file, chosen.number)


def in_reentrant_checkpoint() -> bool:
    """Whether the caller runs inside a reentrant checkpoint."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINT and frame.f_code.co_name == "forward":
            return True
        frame = frame.f_back
    return False


def in_pickling() -> bool:
    """Whether torch is taking a tensor apart for a pickle, as torch.save and process queues do."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(4):
        frame = None if frame is None else frame.f_back
        if frame is not None and frame.f_code.co_name == "_reduce_ex_internal":
            return True
    return False


def grad_switch_line() -> SourceLine | None:
    """Where grad mode is being switched: the `with` line, the call, or the function that a decorator
    covers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _CONTEXTLIB and code.co_name == "decorate_context":
            covered = getattr(frame.f_locals.get("func"), "__code__", None)
            if isinstance(covered, CodeType):
                return source_line(covered.co_filename, covered.co_firstlineno)
        elif not _is_ours_or_torch(code.co_filename):
            return source_line(code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


def error_place(traceback: TracebackType | None) -> tuple[SourceLine | None, list[nn.Module]]:
    """Where an error was raised, by the same choice of line, and the modules that were running, outermost
    first."""
    lines: list[_Line] = []
    modules: list[nn.Module] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not _is_ours_or_torch(code.co_filename):
            name = traceback.tb_frame.f_globals.get("__name__", "")
            lines.append(_Line(code.co_filename, traceback.tb_lineno, name))
        elif code.co_name == "_call_impl":
            running = traceback.tb_frame.f_locals.get("self")
            if isinstance(running, nn.Module):
                modules.append(running)
        traceback = traceback.tb_next
    return _preferred(lines[::-1]), modules


def _is_ours_or_torch(file: str) -> bool:
    return file.startswith((_TORCH, _HERE, "<"))
