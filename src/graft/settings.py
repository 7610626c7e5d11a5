"""Settings as their annotations say (Python itself would take "false" for true), and YAML files of them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from graft.errors import ConfigError


def number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text, because it has no dot; people write it all the same."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(number)]


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Listed = BeforeValidator(_listed)
"""For tuples: YAML has lists."""


class Settings(BaseModel):
    """A part of a YAML file: frozen, without conversions, and no key that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


S = typing.TypeVar("S", bound=Settings)
DEFAULT_METHOD = "lora"
SHORT = {"method": "method", "template": "kind"}
"""Keys whose settings may be written as one word, and which of the settings that word is."""
KINDS = {"methods": ("comparison", "graft compare"), "sources": ("recipe", "graft data")}
"""Keys that tell what a YAML file is, and the verb that reads it."""


def read_yaml(path: str | Path, what: str, keys: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a YAML file; `what` it is and which `keys` it should have stand in errors.

    Args:
        overrides: "key=value" with dotted keys ("train.lr=2e-4"); the value is read as YAML.

    Raises:
        ConfigError: no such file, no valid YAML, or no keys.
    """
    file = Path(path).expanduser()
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the YAML file of a {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        found = "nothing: the file is empty" if settings is None else type(settings).__name__
        raise ConfigError(f"{path}: expected keys such as {keys}, not {found}")
    for key, (other, verb) in KINDS.items():
        if key in settings and other not in what:
            raise ConfigError(f"{path}: with the key {key!r} it is a {other}, for `{verb}`, and not a {what}")
    for each in overrides:
        override(settings, each)
    return settings


def validated(kind: type[S], settings: dict[str, Any], where: str, what: str) -> S:
    """Settings of a kind from plain ones; `where` they stand and `what` they describe are said in errors.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key or a wrong type.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, settings, kind, what)}") from None


def override(settings: dict[str, Any], text: str) -> None:
    """Put "key=value" into settings: dotted keys, numbers for the places of a list; short forms become mappings."""
    key, equals, written = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text}: expected key=value, for example train.lr=2e-4")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        raise ConfigError(f"{text}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    place: Any = settings
    for depth, name in enumerate(parents):
        at = _at(place, name, text)
        inner = place[at] if isinstance(place, list) else place.get(name)
        if isinstance(inner, str) and name in SHORT:
            inner = {SHORT[name]: inner}
        if inner is None:
            inner = {"method": DEFAULT_METHOD} if key.startswith("method.") else {}
        if not isinstance(inner, dict | list):
            raise ConfigError(f"{text}: {'.'.join(parents[: depth + 1])} has no keys of its own")
        place[at] = inner.copy()
        place = place[at]
    if key == "method" and isinstance(value, str):
        value = {"method": value}
    place[_at(place, last, text)] = value


def _at(place: Any, name: str, text: str) -> Any:
    """The key, or the number in a list."""
    if not isinstance(place, list):
        return name
    if not name.isdecimal() or int(name) >= len(place):
        raise ConfigError(f"{text}: there is no {name!r} to change; the {len(place)} entries count from 0")
    return int(name)


def nearest(word: str, known: Any) -> str:
    """'did you mean X?' or the list of what there is, for an error message."""
    names = sorted(str(item) for item in known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def explain(error: ValidationError, settings: dict[str, Any], model: type[BaseModel], what: str) -> str:
    """The first complaint in one line: unknown keys first, because a typing slip often causes the others.

    Args:
        settings: what was validated.
        model: against what.
        what: the thing that needs the keys: a run, a recipe.
    """
    complaints = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    first = complaints[0]
    place = [str(part) for part in first["loc"]]
    more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    key = ".".join(_known_part(place, settings))
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(place[-1], _fields(place[:-1], model))}{more}"
    if first["type"] == "value_error":
        return f"{first['ctx']['error']}{more}"
    if first["type"] == "missing":
        return f"{key}: missing; every {what} needs it{more}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}{more}"


def flat(settings: Any, key: str = "", *, lists: bool = True) -> dict[str, Any]:
    """Nested settings by dotted keys; of lists, by numbers, unless a list is to stay whole."""
    if lists and isinstance(settings, list | tuple):
        settings = {str(number): each for number, each in enumerate(settings)} or []
    if not isinstance(settings, dict) or not settings:
        return {key: settings}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{key}.{name}" if key else str(name), lists=lists)
    return found


def _known_part(place: list[str], settings: Any) -> list[str]:
    """The keys of a place without the names that pydantic adds for the branches of a union."""
    kept = []
    for part in place:
        if isinstance(settings, dict) and part in settings:
            settings = settings[part]
        elif isinstance(settings, Sequence) and part.isdecimal() and int(part) < len(settings):
            settings = settings[int(part)]
        elif not isinstance(settings, dict):
            break
        kept.append(part)
    return kept


def _fields(place: list[str], model: Any) -> list[str]:
    """The keys that the settings at this place know."""
    for part in place:
        if part in getattr(model, "model_fields", {}):
            model = model.model_fields[part].annotation
        while not hasattr(model, "model_fields"):  # a list of settings, or settings or None
            model = next((inner for inner in typing.get_args(model) if inner is not type(None)), BaseModel)
    return list(model.model_fields)


def check_types(settings: Any) -> None:
    """Check every field of a dataclass instance against its annotation, without converting anything.

    Raises:
        ConfigError: a value of another type; an int is a float.
    """
    for name, adapter in _adapters(settings.__class__).items():
        value = getattr(settings, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{type(settings).__name__}: {name} must be a finite number, not {value}")
        try:
            adapter.validate_python(tuples(value))
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            where = f"{type(settings).__name__}: {name}"
            raise ConfigError(f"{where}: {message[0].lower()}{message[1:]}, not {value!r}") from None


def tuples(value: Any) -> Any:
    """Lists as the tuples that they stand for, as JSON and YAML have them."""
    if isinstance(value, dict):
        return {key: tuples(each) for key, each in value.items()}
    return tuple(tuples(each) for each in value) if isinstance(value, list | tuple) else value


@functools.cache
def _adapters(cls: Any) -> dict[str, TypeAdapter[Any]]:
    hints = typing.get_type_hints(cls)
    config = ConfigDict(arbitrary_types_allowed=True, strict=True)
    return {field.name: TypeAdapter(hints[field.name], config=config) for field in dataclasses.fields(cls)}
