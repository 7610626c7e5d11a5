"""Settings from YAML files, checked by pydantic: the keys that may stand there, overrides, and errors in one line."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from graft.errors import ConfigError
from graft.method import nearest

DEFAULT_METHOD = "lora"
SHORT = {"method": "method", "template": "kind"}
"""Keys whose settings may be written as one word, and which of the settings that word is."""


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text, because it has no dot; people write it all the same."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number)]


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Listed = BeforeValidator(_listed)
"""For tuples: YAML has lists."""


def numbers(value: Any) -> Any:
    """As `Number`, inside of tuples and dicts too."""
    if isinstance(value, dict):
        return {key: numbers(each) for key, each in value.items()}
    return tuple(map(numbers, value)) if isinstance(value, tuple) else _number(value)


class Settings(BaseModel):
    """Settings that know their keys and types, and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


S = typing.TypeVar("S", bound=Settings)


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a YAML file, as they stand there.

    Args:
        path: the file.
        overrides: "key=value" with dotted keys ("train.lr=2e-4"); the value is read as YAML.

    Raises:
        ConfigError: no such file, no valid YAML, or no keys in it.
    """
    file = Path(path).expanduser()
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the YAML file of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected keys such as base, data and output, not {type(settings).__name__}")
    for each in overrides:
        override(settings, each)
    return settings


def validated(kind: type[S], settings: dict[str, Any], where: str) -> S:
    """Settings of a kind from plain ones; `where` stands in errors.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key or a wrong type.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, settings, kind)}") from None


def override(settings: dict[str, Any], text: str) -> None:
    """Put "key=value" into settings; short forms on the way become mappings."""
    key, equals, written = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text}: expected key=value, for example train.lr=2e-4")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        raise ConfigError(f"{text}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    place = settings
    for depth, name in enumerate(parents):
        inner = place.get(name)
        if isinstance(inner, str) and name in SHORT:
            inner = {SHORT[name]: inner}
        if inner is None:
            inner = {"method": DEFAULT_METHOD} if key.startswith("method.") else {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{text}: {'.'.join(parents[: depth + 1])} has no keys of its own")
        place[name] = dict(inner)
        place = place[name]
    if key == "method" and isinstance(value, str):
        value = {"method": value}
    place[last] = value


def _explain(error: ValidationError, settings: dict[str, Any], kind: type[Settings]) -> str:
    """The first complaint in one line: unknown keys first, because a typing slip often causes the others."""
    complaints = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    first = complaints[0]
    place = [str(part) for part in first["loc"]]
    more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    key = ".".join(_known_part(place, settings))
    if first["type"] == "extra_forbidden":
        parent = _fields(place[:-1], kind)
        return f"{key}: unknown key; {nearest(place[-1], parent)}{more}"
    if first["type"] == "value_error":
        return f"{first['ctx']['error']}{more}"
    if first["type"] == "missing":
        return f"{key}: missing; every run needs it{more}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}{more}"


def _known_part(place: list[str], settings: Any) -> list[str]:
    """The keys of a place without the names that pydantic adds for the branches of a union."""
    kept = []
    for part in place:
        if isinstance(settings, dict) and part in settings:
            settings = settings[part]
        elif not isinstance(settings, dict):
            break
        kept.append(part)
    return kept


def _fields(place: list[str], kind: type[Settings]) -> list[str]:
    """The keys that the settings at this place know."""
    model: type[BaseModel] = kind
    for part in place:
        field = model.model_fields.get(part)
        inner = [each for each in _members(field.annotation) if _is_settings(each)] if field else []
        if inner:
            model = inner[0]
    return list(model.model_fields)


def _members(hint: Any) -> list[Any]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if union else [hint]


def _is_settings(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)
