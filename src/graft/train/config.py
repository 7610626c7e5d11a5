"""The settings of one run: a YAML file, checked before anything else happens.

`load_run("run.yaml", ["train.lr=2e-4"])` gives a frozen `Run`; an unknown key is an error that names the nearest known.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from graft.errors import ConfigError
from graft.method import REGISTRY, Method, from_dict
from graft.settings import DEFAULT_METHOD, Number, Settings, number, override, read_yaml, tuples, validated


def _numbers(value: Any) -> Any:
    """As `number`, inside of tuples and dicts too."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    return tuple(map(_numbers, value)) if isinstance(value, tuple) else number(value)


def _method(value: Any) -> Method:
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        return from_dict({"method": value})
    if not isinstance(value, dict):
        raise ConfigError(f"method: expected a name or settings, not {value!r}")
    import graft.methods  # noqa: F401  fills the registry
    from graft.methods.compose import parts_from

    named = str(value.get("method")).replace("-", "_").lower()
    found = next((cls for name, cls in REGISTRY.items() if named in (name, cls.__name__.lower())), Method)
    settings = {key: _typed(found, key, each) for key, each in value.items()}
    if isinstance(settings.get("parts"), list | tuple):
        settings["parts"] = parts_from(settings["parts"], _method)
    return from_dict(settings)


def _typed(method: type[Method], key: str, value: Any) -> Any:
    """A method's setting as its annotation says; what the method does not know is left for it to refuse."""
    hint = typing.get_type_hints(method).get(key)
    if hint is None or key == "method" or (isinstance(value, dict) and "range" in value):
        return value
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))
    value = tuples(value)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        with contextlib.suppress(ValidationError):
            return adapter.validate_python(_numbers(value))
        message = error.errors()[0]["msg"]
        raise ConfigError(f"method.{key}: {message[0].lower()}{message[1:]}, not {value!r}") from None


MethodField = Annotated[
    Any,
    BeforeValidator(_method),
    PlainSerializer(lambda method: method.to_dict(), return_type=dict),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["method"]}]}),
]


class LimitSettings(Settings):
    """What the data report accepts before it refuses to train."""

    truncated: Annotated[Number, Field(ge=0, le=1)] = 0.05
    """Largest share of rows that are cut (with `data.truncate`)."""
    zero_labels: Annotated[int, Field(ge=0)] = 0
    """Most rows without a single trained token."""
    duplicates: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Largest share of training rows that repeat an earlier one."""
    leaked: Annotated[int, Field(ge=0)] = 0
    """Most evaluation rows whose question stands in training too."""


class DataSettings(Settings):
    """Where the rows come from, and how they become tokens."""

    train: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet), a folder, or a hub name."""
    eval: str | Number | None = None
    """The same for evaluation; or the share of the training rows that is held out, for example 0.1."""
    eval_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Draws the share that is held out; None: the run's seed."""
    split: str | None = None
    eval_split: str | None = None
    columns: dict[str, str] = {}
    """Our name to the file's name, where they differ."""
    eval_columns: dict[str, str] | None = None
    """The same for the evaluation file; None: as `columns`."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Take only the first so many training rows."""
    eval_limit: Annotated[int, Field(ge=1)] | None = None
    general: str | None = None
    """Text that has nothing to do with the task (.txt, or rows with `text`): what is forgotten of it is measured."""
    template: str | dict[str, Any] | None = None
    """A kind (chat, instruction, alpaca, plain) or all settings; None: chat if the tokenizer has a template."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Longest row, and longest pack, in tokens; None: what the model takes."""
    truncate: bool = False
    """Cut longer rows instead of refusing them."""
    packing: bool = False
    """Several examples in one row, blind to each other; a batch is then one pack, whatever `train.batch_size`."""
    padding_free: bool | None = None
    """The examples of a batch end to end in one row, without padding; None: where it changes nothing but the time.
    True: refuse where it cannot be; False: pad."""
    group: bool = True
    """Put examples of like length into one batch."""
    limits: LimitSettings = LimitSettings()

    @model_validator(mode="after")
    def _packs_have_no_padding(self) -> DataSettings:
        if self.packing and self.padding_free is False:
            raise ConfigError("data.padding_free: packs have no padding; leave it out, or turn data.packing off")
        return self


class TrainSettings(Settings):
    """How the adapter is trained. `every` settings count optimizer steps."""

    lr: Annotated[Number, Field(gt=0)] = 2e-4
    epochs: Annotated[Number, Field(gt=0)] = 1.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; overrides `epochs`."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples in one forward on one device; not used with `data.packing`."""
    eval_batch_size: Annotated[int, Field(ge=1)] | None = None
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches in one optimizer step."""
    warmup: Annotated[Number, Field(ge=0)] = 0.03
    """Below 1 a share of all steps, else a number of steps, fewer than all."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Never on vectors (biases, norms, gates)."""
    clip: Annotated[Number, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    log_every: Annotated[int, Field(ge=1)] = 10
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """None: once an epoch. The end is always evaluated."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """None: as often as evaluation."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Checkpoints that are kept, beside the best."""
    keep_best: Literal["loss", "accuracy"] | None = None
    """The adapter of the best evaluation is kept, not the last; accuracy is for classifiers."""
    gradient_checkpointing: bool = False
    trunk_cache: bool | None = None
    """Keep what frozen blocks below the adapter make of each text; None: where that saves time and changes no result.
    True: also where they have dropout, which is then off there."""
    compile: bool = False
    """torch.compile on the blocks, in training steps; the first one waits for the compiler."""
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: as the base is; bf16: autocast over an fp32 base, where the device has bf16."""
    max_forgetting: Annotated[Number, Field(gt=0)] | None = None
    """The largest KL to the base on `data.general`, in nats a token."""
    on_forgetting: Literal["stop", "regularise"] = "stop"
    """At the bound: end, or hold the outputs on the training batches to the base's; the adapter of the last evaluation
    within the bound is kept."""


class Run(Settings):
    """One training, completely. `method` is a Graft method; all else is plain data."""

    base: str
    """A folder, a hub name, or "embedded"."""
    precision: Literal["auto", "fp32", "bf16", "int8", "nf4"] = "auto"
    """The base's; see `load_base`. fp16 is for inference alone."""
    device: str | None = None
    method: MethodField = Field(default=DEFAULT_METHOD, validate_default=True)
    """A method's name, or {method: lora, rank: 16, ...}."""
    peft_compat: bool = False
    name: str = "default"
    """The adapter's name, for rows that name none."""
    data: DataSettings
    train: TrainSettings = TrainSettings()
    output: str
    """The run's folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _forgetting_is_measured(self) -> Run:
        if self.data.general is not None and self.data.eval is None:
            raise ConfigError("data.general: it is measured at each evaluation; give data.eval, or leave it out")
        if self.train.max_forgetting is not None and self.data.general is None:
            raise ConfigError("train.max_forgetting: it needs data.general, a file of text to measure it on")
        if self.train.max_forgetting is None and self.train.on_forgetting != "stop":
            raise ConfigError("train.on_forgetting: there is no bound; give train.max_forgetting, or leave it out")
        return self

    @model_validator(mode="after")
    def _evaluation_has_rows(self) -> Run:
        if self.data.eval is None:
            for part, settings in (("data", self.data), ("train", self.train)):
                for key in type(settings).model_fields:
                    if key.startswith("eval_") and getattr(settings, key) is not None:
                        raise ConfigError(
                            f"{part}.{key}: it needs data.eval, a file or a share such as 0.1; or leave it out"
                        )
        elif not isinstance(self.data.eval, str):
            for key in ("eval_split", "eval_columns"):
                if getattr(self.data, key) is not None:
                    raise ConfigError(
                        f"data.{key}: data.eval is a share of the training rows, which are read by data."
                        f"{key.removeprefix('eval_')}; leave {key} out, or give data.eval a source of its own"
                    )
        return self


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """The run that a YAML file describes.

    Args:
        path: the file.
        overrides: "key=value" with dotted keys ("train.lr=2e-4"); the value is read as YAML.

    Raises:
        ConfigError: no such file, no valid YAML, an unknown key (with the nearest known one), or a wrong type.
    """
    return make_run(read_yaml(path, "run", "base, data and output", overrides), str(path))


def settings_of(settings: dict[str, Any], overrides: Sequence[str], where: str = "run") -> Run:
    """As `load_run`, from what a YAML file would hold."""
    for each in overrides:
        override(settings, each)
    return make_run(settings, where)


def make_run(settings: dict[str, Any], where: str = "run") -> Run:
    """A run from plain settings; `where` stands in errors.

    Raises:
        ConfigError: an unknown key, a missing key or a wrong type.
    """
    return validated(Run, settings, where, "run")


def schema() -> dict[str, Any]:
    """The JSON schema of a run's YAML, for editors."""
    import graft.methods  # noqa: F401  fills the registry

    found = Run.model_json_schema()
    found["properties"]["method"]["anyOf"] = [
        {"enum": sorted(REGISTRY)},
        {"type": "object", "required": ["method"], "properties": {"method": {"enum": sorted(REGISTRY)}}},
    ]
    return found
