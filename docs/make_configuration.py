"""Write docs/configuration.md from the settings' own docstrings; `--check` fails if it is out of date."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path

from ocrmem.config.encoder import DeepSeekOCRSettings, EncoderSettings, PPOCRSettings
from ocrmem.config.llm import LLMSettings
from ocrmem.config.memory import MemorySettings
from ocrmem.config.objectives import ObjectiveSettings, Stage
from ocrmem.config.projection import ProjectionSettings
from ocrmem.config.render import RenderSettings
from ocrmem.config.train import TRAINING_DEFAULTS, DataSettings, TrainConfig

TARGET = Path(__file__).with_name("configuration.md")
SECTIONS = {
    "(top level)": TrainConfig,
    "llm": LLMSettings,
    "encoder": EncoderSettings,
    "encoder.settings for pp-ocr": PPOCRSettings,
    "encoder.settings for deepseek-ocr": DeepSeekOCRSettings,
    "page": RenderSettings,
    "memory": MemorySettings,
    "projection": ProjectionSettings,
    "data": DataSettings,
    "objectives": ObjectiveSettings,
    "objectives.stages, one by one": Stage,
}


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field; a field without one shares the next one's."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs, waiting = {}, []
    for node in body:
        if isinstance(node, ast.AnnAssign):
            waiting.append(node.target.id)  # type: ignore[union-attr]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and waiting:
            docs[waiting[-1]] = " ".join(str(node.value.value).split())
            waiting = []
    return docs


def default_of(field: dataclasses.Field) -> str:
    """How a field's default reads in YAML."""
    if field.default is not dataclasses.MISSING:
        value = field.default
        return "null" if value is None else f"`{value!r}`".replace("'", "")
    if field.default_factory is not dataclasses.MISSING:
        return "see its section" if dataclasses.is_dataclass(field.default_factory) else "`{}`"
    required = ("output_dir", "corpora", "stages", "steps", "max_units")
    return "**required**" if field.name in required else "the encoder's preset"


def document() -> str:
    """The page."""
    lines = [
        "# Configuration",
        "",
        "What `ocrmem train CONFIG.yaml [a.b=c ...]` reads. This page is made from the settings' own docstrings by",
        "`python docs/make_configuration.py`; an unknown key is an error that names the nearest known one.",
    ]
    for name, cls in SECTIONS.items():
        docs = field_docs(cls)
        lines += ["", f"## {name}", "", "| key | default | meaning |", "| --- | --- | --- |"]
        for field in dataclasses.fields(cls):
            lines.append(
                f"| `{field.name}` | {default_of(field)} | {docs.get(field.name, '').replace('|', chr(92) + '|')} |"
            )
    lines += [
        "",
        "## training",
        "",
        "Any field of `transformers.TrainingArguments` by its own name. What ocrmem changes of their defaults:",
        "",
        *(f"- `{key}: {value}`" for key, value in TRAINING_DEFAULTS.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    text = document()
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == text else f"{TARGET} is out of date; run {sys.argv[0]}")
    TARGET.write_text(text, encoding="utf-8")
