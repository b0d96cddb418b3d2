"""Mappings and YAML files to frozen dataclasses: every value checked, every unknown key refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from ocrmem.errors import ConfigError

T = TypeVar("T")


class SettingsLoader(yaml.SafeLoader):
    """YAML whose `1e-3` is a number, as YAML 1.2 has it; PyYAML's 1.1 wants `1.0e-3` and takes the other for text."""


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z"), list("-+.0123456789")
)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: ` Did you mean 'x'?`, or the whole list where nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."


def from_mapping(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Build dataclass `cls` from a mapping, nested dataclasses included.

    Args:
        where: name of the section, for messages (`memory`).

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a missing key or a value of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, got {values!r}.")
    _check_keys(cls, values, where)
    try:
        return pydantic.TypeAdapter(cls).validate_python(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := (first.get("ctx") or {}).get("error"), ConfigError):
            raise cause from None
        key = ".".join([where, *(str(part) for part in first["loc"])]).strip(".")
        raise ConfigError(f"{key}={first['input']!r}: {first['msg'].lower()}.") from None


def _check_keys(cls: Any, values: Mapping[str, Any], where: str) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        path = f"{where}.{key}".strip(".")
        if key not in fields:
            raise ConfigError(f"unknown setting {path!r}. {nearest(str(key), fields)}")
        nested = next(
            (hint for hint in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(hint)), None
        )
        if nested is not None:
            for part in [value] if isinstance(value, Mapping) else value if isinstance(value, list) else []:
                if isinstance(part, Mapping):
                    _check_keys(nested, part, path)


def load_yaml(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a YAML mapping and apply `a.b=value` overrides, whose values are YAML too.

    Raises:
        ConfigError: the file is missing or no mapping, or an override has no `=`.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), SettingsLoader) or {}
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist; give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config file {str(path)!r} holds {type(values).__name__}, expected a mapping of settings.")
    for override in overrides:
        _apply_override(values, override)
    return values


def apply_overrides(settings: Any, overrides: Iterable[str]) -> dict[str, Any]:
    """A settings dataclass as a mapping, with `key=value` overrides applied; check it with `from_mapping`."""
    values = dataclasses.asdict(settings)
    for override in overrides:
        _apply_override(values, override)
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value, for example training.max_steps=10.")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section.")
    try:
        # A colour such as #ff0000, which YAML takes for a comment.
        values[last] = text if text.startswith("#") else yaml.load(text, SettingsLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
