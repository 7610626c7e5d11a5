"""Settings of a method as its annotations say: Python itself would take "false" for true."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from graft.errors import ConfigError


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
