"""The settings of one run: a YAML file, checked before anything else happens.

`load_run("run.yaml", ["train.lr=2e-4"])` gives a frozen `Run`; an unknown key is an error that names the nearest known.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
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
from graft.method import REGISTRY, Method, from_dict, nearest
from graft.settings import tuples

DEFAULT_METHOD = "lora"


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text, because it has no dot; people write it all the same."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _numbers(value: Any) -> Any:
    """As `_number`, inside of tuples and dicts too."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    return tuple(map(_numbers, value)) if isinstance(value, tuple) else _number(value)


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


Number = Annotated[float, BeforeValidator(_number)]
MethodField = Annotated[
    Any,
    BeforeValidator(_method),
    PlainSerializer(lambda method: method.to_dict(), return_type=dict),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["method"]}]}),
]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LimitSettings(_Settings):
    """What the data report accepts before it refuses to train."""

    truncated: Annotated[Number, Field(ge=0, le=1)] = 0.05
    """Largest share of rows that are cut (with `data.truncate`)."""
    zero_labels: Annotated[int, Field(ge=0)] = 0
    """Most rows without a single trained token."""
    duplicates: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Largest share of training rows that repeat an earlier one."""
    leaked: Annotated[int, Field(ge=0)] = 0
    """Most evaluation rows whose question stands in training too."""


class DataSettings(_Settings):
    """Where the rows come from, and how they become tokens."""

    train: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet), a folder, or a hub name."""
    eval: str | Number | None = None
    """The same for evaluation; or the share of the training rows that is held out, for example 0.1."""
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
    """Several examples in one row, blind to each other; `train.batch_size` then counts packs."""
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


class TrainSettings(_Settings):
    """How the adapter is trained. `every` settings count optimizer steps."""

    lr: Annotated[Number, Field(gt=0)] = 2e-4
    epochs: Annotated[Number, Field(gt=0)] = 1.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; overrides `epochs`."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples (packs with `data.packing`) in one forward on one device."""
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


class Run(_Settings):
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
    for override in overrides:
        _override(settings, override)
    return make_run(settings, str(path))


def make_run(settings: dict[str, Any], where: str = "run") -> Run:
    """A run from plain settings; `where` stands in errors.

    Raises:
        ConfigError: an unknown key, a missing key or a wrong type.
    """
    try:
        return Run.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, settings)}") from None


def schema() -> dict[str, Any]:
    """The JSON schema of a run's YAML, for editors."""
    import graft.methods  # noqa: F401  fills the registry

    found = Run.model_json_schema()
    found["properties"]["method"]["anyOf"] = [
        {"enum": sorted(REGISTRY)},
        {"type": "object", "required": ["method"], "properties": {"method": {"enum": sorted(REGISTRY)}}},
    ]
    return found


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override}: expected key=value, for example train.lr=2e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{override}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    place = settings
    for depth, name in enumerate(parents):
        inner = place.get(name)
        if isinstance(inner, str) and name in ("method", "template"):
            inner = {"method" if name == "method" else "kind": inner}  # the short form of both
        if inner is None:
            inner = {"method": DEFAULT_METHOD} if key.startswith("method.") else {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{override}: {'.'.join(parents[: depth + 1])} has no keys of its own")
        place[name] = dict(inner)
        place = place[name]
    if key == "method" and isinstance(value, str):
        value = {"method": value}
    place[last] = value


def _explain(error: ValidationError, settings: dict[str, Any]) -> str:
    """The first complaint in one line: unknown keys first, because a typing slip often causes the others."""
    complaints = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    first = complaints[0]
    place = [str(part) for part in first["loc"]]
    more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    key = ".".join(_known_part(place, settings))
    if first["type"] == "extra_forbidden":
        parent = _fields(place[:-1])
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


def _fields(place: list[str]) -> list[str]:
    """The keys that the settings at this place know."""
    model: Any = Run
    for part in place:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
