"""The settings of `graft.compare.matrix`, the key `matrix` of a comparison's file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from graft.errors import ConfigError
from graft.settings import Settings, read_yaml, validated
from graft.train.config import MethodField, TrainSettings

ICL, CALIBRATED, ZERO = "icl", "icl_calibrated", "zero_shot"
"""What the approaches without training are called; a method has the name that its settings give it."""
TUNED = "tuned"


class TestSettings(Settings):
    """A set of rows that every approach is tested on."""

    source: str
    split: str | None = None
    columns: dict[str, str] = {}
    limit: Annotated[int, Field(ge=1)] | None = None
    """Test so many rows, the first that are short enough; None: all."""
    out_of_domain: bool = False


class ArmSettings(Settings):
    """A fine-tuning: a method, and how it is trained."""

    method: MethodField
    train: TrainSettings = TrainSettings(epochs=40, batch_size=16)


class MatrixSettings(Settings):
    """What `run_matrix` runs; the key `matrix` of a `compare.yaml`."""

    bases: Annotated[list[str], Field(min_length=1)]
    """One base, or several sizes."""
    precision: str = "auto"
    device: str | None = None
    train: str
    """The rows that examples are drawn from."""
    split: str | None = None
    columns: dict[str, str] = {}
    tests: Annotated[dict[str, TestSettings], Field(min_length=1)]
    template: dict[str, Any]
    """As `data.template` of a run: kind, and a task, or templates (the patterns) and a verbalizer."""
    patterns: list[int] | None = None
    """Which of the template's prompts, from 0; None: each."""
    methods: Annotated[dict[str, ArmSettings], Field(min_length=1)]
    shots: Annotated[int, Field(ge=1)] = 16
    seeds: Annotated[int, Field(ge=1)] = 10
    balanced: bool | None = None
    """As many examples of each label; None: yes."""
    calibrated: bool = True
    """In-context learning with contextual calibration beside the plain one."""
    max_shot_tokens: Annotated[int, Field(ge=1)] | None = None
    """Draw only rows that are so short in every pattern, with their answer; None: all."""
    max_question_tokens: Annotated[int, Field(ge=1)] | None = None
    """Test only rows that are so short in every pattern, with their answer; None: all."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    keep_adapters: bool = False
    """Leave the folders of the trainings; otherwise each is removed once its result is written."""

    @model_validator(mode="after")
    def _names(self) -> MatrixSettings:
        for name in self.methods:
            if name in (ICL, CALIBRATED, ZERO) or not name.replace("-", "_").isidentifier():
                raise ConfigError(f"matrix.methods.{name}: take another name, of letters, digits, - and _")
        labels = [name_of(base) for base in self.bases]
        if len(set(labels)) < len(labels):
            raise ConfigError(f"matrix.bases: two are called {Counter(labels).most_common(1)[0][0]}; name each once")
        return self


def load_matrix(path: str | Path) -> MatrixSettings:
    """The settings under the key `matrix` of a YAML file.

    Raises:
        ConfigError: no such file or key, an unknown key, or a wrong type.
    """
    found = read_yaml(path, "comparison", "matrix and output")
    if not isinstance(found.get("matrix"), dict):
        raise ConfigError(f"{path}: no key 'matrix' with settings; docs/icl.md has an example")
    return make_matrix(found["matrix"], str(path))


def make_matrix(settings: dict[str, Any], where: str = "matrix") -> MatrixSettings:
    """The settings from plain data; `where` stands in errors.

    Raises:
        ConfigError: an unknown key, a missing key or a wrong type.
    """
    return validated(MatrixSettings, settings, f"{where}: matrix", "matrix")


def name_of(base: str) -> str:
    """What a base is called in results: the last part of its name or folder."""
    return Path(base).name
