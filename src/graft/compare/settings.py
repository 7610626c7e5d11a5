"""The settings of a comparison: a YAML file, checked before anything else happens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from graft.compare.matrix_settings import MatrixSettings
from graft.errors import ConfigError
from graft.method import REGISTRY
from graft.settings import Listed, Number, Settings, read_yaml, validated
from graft.train.config import DataSettings, TrainSettings

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
"""Half decades from what full fine-tuning wants to what prompts want; the same for every method: none is favoured."""
BASE, ICL, FULL = "base", "icl", "full"


class Search(Settings):
    """How the learning rate of each method is chosen, by the evaluation rows."""

    kind: Literal["halving", "exhaustive", "none"] = "halving"
    """halving: all rates on a small budget, the best share of them on a larger one, and so on. exhaustive: every rate
    and every seed on the whole budget. none: `train.lr`."""
    lrs: Annotated[tuple[Annotated[Number, Field(gt=0)], ...], Listed] = RATES
    eta: Annotated[int, Field(ge=2)] = 3
    """One of so many rates goes on, with so many times the steps."""
    least_steps: Annotated[int, Field(ge=1)] = 10
    """Of the shortest trial."""
    metric: Literal["loss", "accuracy"] = "loss"
    """The loss tells rates apart after few steps, where the accuracy of some hundred rows is noise."""

    @model_validator(mode="after")
    def _rates_differ(self) -> Search:
        if not self.lrs or len(set(self.lrs)) != len(self.lrs):
            raise ConfigError(f"search.lrs: give different rates, at least one, not {list(self.lrs)}")
        return self


class Own(Settings):
    """What an entry may set beside its method: the same keys stand in its settings."""

    lrs: Annotated[tuple[Annotated[Number, Field(gt=0)], ...], Listed] = ()
    """None: those of the search."""
    train: dict[str, Any] = {}
    """Over the comparison's own; an `lr` is the only rate."""
    precision: Literal["auto", "fp32", "bf16", "int8", "nf4"] | None = None
    peft_compat: bool | None = None

    @model_validator(mode="after")
    def _one_way_to_say_rates(self) -> Own:
        if len(set(self.lrs)) != len(self.lrs):
            raise ConfigError(f"lrs: give different rates, not {list(self.lrs)}")
        if self.lrs and "lr" in self.train:
            raise ConfigError("lrs, train.lr: give one of them")
        return self


class Icl(Settings):
    """Few-shot in-context learning, the rival of fine-tuning."""

    shots: Annotated[int, Field(ge=1)] | Literal["fit"] = "fit"
    """Demonstrations in front of each question; "fit": as many as the context holds, at most 16."""
    template: str | dict[str, Any] | None = None
    """None: that of the data. A classification head has none that a language model could answer: name a task."""
    calibrate: bool = False


class Baselines(Settings):
    """What stands beside the methods."""

    base: bool = True
    full: bool = True
    """Full fine-tuning, where it fits."""
    icl: bool | Icl = True


class Executor(Settings):
    """Where runs happen."""

    kind: Literal["local", "ray"] = "local"
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes at once. On one machine they share its cores: more than one pays on machines with several GPUs."""
    address: str | None = None
    """Of a Ray cluster ("auto", "ray://..."); None: a local one is started. All its machines must see the output."""
    cpus: Annotated[Number, Field(ge=0)] = 1.0
    gpus: Annotated[Number, Field(ge=0)] = 0.0
    """What Ray reserves for a run."""


def _entries(value: Any) -> Any:
    """A list of names as a mapping of each to itself; `all`: every method that needs no setting."""
    if value == "all":
        import graft.methods  # noqa: F401  fills the registry

        return {name: name for name in sorted(REGISTRY) if name not in (FULL, "compose")}
    if isinstance(value, list | tuple):
        if not all(isinstance(each, str) for each in value):
            raise ConfigError("methods: a list holds names; for settings write {label: {method: name, ...}}")
        if len(set(value)) != len(value):
            raise ConfigError("methods: a name stands there twice; give labels: {label: {method: name, ...}}")
        return {name: name for name in value}
    return value


class Compare(Settings):
    """A comparison, completely."""

    title: str | None = None
    base: str
    precision: Literal["auto", "fp32", "bf16", "int8", "nf4"] = "auto"
    device: str | None = None
    methods: Annotated[dict[str, Any], BeforeValidator(_entries)]
    """Names, or label to a name or to {method: name, rank: 16, lrs: [...], train: {...}, precision: ...}, or "all"."""
    data: DataSettings
    """As of a run. `data.eval` chooses the learning rates."""
    test: str | None = None
    """The rows on which the quality is measured. None: those of `data.eval`, and the report says so."""
    test_split: str | None = None
    test_columns: dict[str, str] | None = None
    """None: as `data.eval_columns`."""
    test_limit: Annotated[int, Field(ge=1)] | None = None
    train: TrainSettings = TrainSettings()
    """As of a run, the same for all: steps, batches, schedule. `train.lr` counts with `search.kind: none` alone."""
    seeds: Annotated[Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Listed] = 3
    """How many (0, 1, ...), or which."""
    metrics: Annotated[tuple[str, ...] | None, Listed] = None
    """The first is the quality. None: what fits the rows."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    search: Search = Search()
    baselines: Baselines = Baselines()
    forgetting: str | None = None
    """A general text: how much of it each method forgets."""
    latency: bool = True
    """Whether the time of an answer is measured: of the base, with the adapter, and merged."""
    keep: Literal["adapters", "results"] = "adapters"
    """What stays of a run: its folder with the adapter, or only its numbers. Trials leave numbers alone."""
    executor: Executor = Executor()
    matrix: MatrixSettings | None = None
    """Fine-tuning against in-context learning, in and out of domain; `graft compare --matrix` runs it."""
    output: str

    @model_validator(mode="after")
    def _complete(self) -> Compare:
        if self.data.eval is None:
            raise ConfigError("data.eval: the learning rates are chosen by it; give a file or a share such as 0.1")
        if not self.methods and not self.baselines.full:
            raise ConfigError("methods: name at least one, for example methods: [lora, ia3]")
        if self.test is None and (self.test_split or self.test_columns or self.test_limit):
            raise ConfigError("test_split, test_columns, test_limit: they need test, a source of rows")
        if isinstance(self.seeds, tuple) and (not self.seeds or len(set(self.seeds)) != len(self.seeds)):
            raise ConfigError(f"seeds: give a number, or different seeds, not {list(self.seeds)}")
        for name in self.methods:
            if not name.strip() or name in (BASE, ICL):
                raise ConfigError(f"methods: {name!r} cannot be a label; {BASE} and {ICL} are the baselines'")
        given = self.methods.get(FULL, FULL)
        if self.baselines.full and (given.get("method") if isinstance(given, dict) else given) != FULL:
            raise ConfigError(f"methods: {FULL!r} is full fine-tuning's label; take another, or baselines.full=false")
        return self

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def load_compare(path: str | Path, overrides: Sequence[str] = ()) -> Compare:
    """The comparison that a YAML file describes; `overrides` are "key=value" with dotted keys.

    Raises:
        ConfigError: no such file, no valid YAML, an unknown key (with the nearest known one), or a wrong type.
    """
    return make_compare(read_yaml(path, "comparison", "base, methods, data and output", overrides), str(path))


def make_compare(settings: dict[str, Any], where: str = "compare") -> Compare:
    """A comparison from plain settings; `where` stands in errors.

    Raises:
        ConfigError: an unknown key, a missing key or a wrong type.
    """
    return validated(Compare, settings, where, "comparison")
