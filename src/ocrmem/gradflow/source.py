"""From running frames and tracebacks to lines of the user's source."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import torch
from torch import nn

from ocrmem.gradflow.report import SourceLine

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_CHECKPOINT = str(Path(torch.__file__).parent / "utils" / "checkpoint.py")
_CONTEXTLIB = str(Path(torch.__file__).parent / "utils" / "_contextlib.py")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the frames around an operation tell about it."""

    source: SourceLine | None
    reentrant: bool
    in_generate: bool
    in_hook: str | None


def source_line(file: str, line: int) -> SourceLine:
    """The line with its text, the path relative to the working directory where it lies below it."""
    text = linecache.getline(file, line).strip()
    path = Path(file)
    try:
        path = path.relative_to(Path.cwd())
    except ValueError:
        pass
    return SourceLine(file=str(path), line=line, text=text)


def surroundings() -> Surroundings:
    """Look outwards from the caller: the first line outside torch and ocrmem.gradflow, and what encloses it."""
    source, in_hook = None, None
    reentrant = in_generate = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if source is None and not _is_ours_or_torch(code.co_filename):
            source = source_line(code.co_filename, frame.f_lineno)
            if "/transformers/" in code.co_filename:
                in_hook = "transformers"
        if code.co_filename == _CHECKPOINT and code.co_name == "forward":
            reentrant = True
        elif code.co_name == "generate" and code.co_filename.endswith("transformers/generation/utils.py"):
            in_generate = True
        elif code.co_filename.endswith("accelerate/hooks.py"):
            in_hook = "accelerate"
        frame = frame.f_back
    return Surroundings(source=source, reentrant=reentrant, in_generate=in_generate, in_hook=in_hook)


def in_reentrant_checkpoint() -> bool:
    """Whether the caller runs inside a reentrant checkpoint."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINT and frame.f_code.co_name == "forward":
            return True
        frame = frame.f_back
    return False


def grad_switch_line() -> SourceLine | None:
    """Where grad mode is being switched: the `with` line, the call, or the function that a decorator covers."""
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
    """Where an error was raised: its innermost line outside torch, and the modules that were running, outermost first."""
    source = None
    modules: list[nn.Module] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not _is_ours_or_torch(code.co_filename):
            source = source_line(code.co_filename, traceback.tb_lineno)
        elif code.co_name == "_call_impl":
            running = traceback.tb_frame.f_locals.get("self")
            if isinstance(running, nn.Module):
                modules.append(running)
        traceback = traceback.tb_next
    return source, modules


def _is_ours_or_torch(file: str) -> bool:
    return file.startswith((_TORCH, _HERE, "<"))
