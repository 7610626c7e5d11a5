"""The settings of a recipe: which annotated data, through which templates, mixed, split and answered how.

`load_recipe("recipe.yaml", ["size=1000"])` gives a frozen `Recipe`; `graft.data.make.make` makes the data of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from graft.errors import ConfigError
from graft.settings import Number, Settings, read_yaml, validated

Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[Number, Field(gt=0)]
OPERATIONAL = (
    *("endpoint", "key_env", "concurrency", "retries", "backoff", "timeout", "requests_per_minute"),
    *("tokens_per_minute", "max_cost", "price_per_million", "max_failed"),
)
"""Settings of `generate` that change how answers are fetched, not what is asked: they may change between starts."""
FILTERS = ("keep_cut", "duplicates", "refusals")
"""Settings of `generate` that choose among the answers: they may change until the data is finished."""


class PromptTemplate(Settings):
    """A prompt and its answer, both with {column} placeholders."""

    prompt: str
    completion: str
    """`{answer}` is the label's word."""


class SelfInstructSettings(Settings):
    """How many new instructions a model writes after the source's, and how new they must be."""

    count: Count
    """New instructions, at most."""
    shots: Count = 8
    """Instructions that each request shows."""
    rouge: Annotated[Number, Field(gt=0, le=1)] = 0.7
    """One whose ROUGE-L with another reaches this is left out."""
    requests: Count = 200
    """Requests for instructions, at most."""


class SourceSettings(Settings):
    """One set of annotated data, and how its rows become prompts and answers."""

    data: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet), a folder, or a hub name."""
    name: str | None = None
    """How rows and reports call it; None: the file's name."""
    split: str | None = None
    columns: dict[str, str] = {}
    """Our name to the file's name, where they differ."""
    limit: Count | None = None
    """Take only the first so many rows."""
    weight: Positive | None = None
    """Its share of the mix, relative to the others' (1 where only others have one)."""
    task: Literal["sentiment", "nli", "topic"] | None = None
    """A known task's templates and words."""
    templates: Annotated[list[str | PromptTemplate], Field(min_length=1)] | None = None
    verbalizer: dict[int | str, str] | None = None
    """The word for each label."""
    per_row: Count | Literal["all"] = 1
    """How many templates each row goes through: drawn by the seed, or all."""
    system: str | None = None
    """A system message before each row; it needs `form: messages`."""
    answer: Literal["data", "endpoint"] = "data"
    """Who answers: the data's own column, or the model behind `generate`."""

    self_instruct: SelfInstructSettings | None = None
    """The rows are seeds of new instructions, which take their place."""

    @property
    def called(self) -> str:
        """Its name in rows, reports and errors."""
        return self.name or Path(self.data).stem

    @model_validator(mode="after")
    def _one_kind_of_templates(self) -> SourceSettings:
        if self.task is not None and self.templates is not None:
            raise ConfigError(f"sources {self.called}: give task or templates, not both")
        if self.verbalizer and self.task is None and self.templates is None:
            raise ConfigError(f"sources {self.called}: verbalizer needs a task or templates beside it")
        if self.answer == "endpoint" and any(isinstance(each, PromptTemplate) for each in self.templates or ()):
            raise ConfigError(f"sources {self.called}: the endpoint answers; give templates as prompts alone")
        if self.answer == "endpoint" and self.verbalizer:
            raise ConfigError(f"sources {self.called}: the endpoint answers in its own words; leave verbalizer out")
        if self.self_instruct is not None and (self.answer == "data" or self.templates or self.task):
            raise ConfigError(
                f"sources {self.called}: self_instruct needs 'answer: endpoint', and neither task nor templates"
            )
        return self


class SplitSettings(Settings):
    """Shares of training and evaluation. Rows with the same or a nearly equal question go to one side."""

    train: Share = 1.0
    eval: Share = 0.0
    group: str | None = None
    """Rows with the same value in this column go to one side too, for example a premise or a document."""

    @model_validator(mode="after")
    def _is_all(self) -> SplitSettings:
        if abs(self.train + self.eval - 1) > 1e-9 or self.train == 0:
            raise ConfigError(f"split: {self.train} and {self.eval} are not shares of 1, for example train .9, eval .1")
        return self


class AgainstSettings(Settings):
    """Data whose questions must not stand in what is made: a test set."""

    data: str
    split: str | None = None
    columns: dict[str, str] = {}


class Prices(Settings):
    """Of a million tokens, in any currency."""

    prompt: Annotated[Number, Field(ge=0)]
    completion: Annotated[Number, Field(ge=0)]


class GenerateSettings(Settings):
    """Which model answers, behind any endpoint with OpenAI's interface, and within what limits."""

    endpoint: str
    """The address up to /v1, or all of it."""
    model: str
    api: Literal["chat", "completions"] = "chat"
    prompt: str | None = None
    """What the model is asked, with {column} and {prompt}, the row's own prompt; None: that prompt itself."""
    system: str | None = None
    """A system message for the model (chat); it is not written into the rows."""
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    max_tokens: Count = 512
    stop: list[str] = []
    n: Count = 1
    """Answers for each prompt, each a request of its own."""
    extra: dict[str, Any] = {}
    """Further keys of the request's body, for example {top_k: 20}."""
    key_env: str | None = None
    """The environment variable that holds the key."""
    concurrency: Count = 8
    """Requests under way at a time."""
    retries: Annotated[int, Field(ge=0)] = 5
    """After the first try."""
    backoff: Annotated[Number, Field(ge=0)] = 1.0
    """Seconds before the first retry; each further one waits twice as long, up to a minute."""
    timeout: Positive = 120.0
    """Seconds for one request, from its start to the end of its answer."""
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    max_cost: Annotated[Number, Field(ge=0)] | None = None
    price_per_million: Prices | None = None
    max_failed: Share = 0.05
    """Largest share of prompts without an answer."""
    keep_cut: bool = False
    """Keep answers that end at `max_tokens`."""
    duplicates: Literal["row", "all", "none"] = "row"
    """Which repeated answers are left out: those of one prompt, of all prompts, or none."""
    refusals: list[str] = []
    """Phrases that mark a refusal in an answer's first 200 characters; case does not count."""

    @model_validator(mode="after")
    def _makes_sense(self) -> GenerateSettings:
        address = urlsplit(self.endpoint)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ConfigError(
                f"generate.endpoint: expected an address like http://localhost:8000/v1, not {_bare(self)!r}"
            )
        if "@" in address.netloc or address.query or address.fragment:
            raise ConfigError(
                "generate.endpoint: an address without user, password or query is needed, because it is written to "
                "disk; name the variable that holds the key in generate.key_env"
            )
        if self.max_cost is not None and self.price_per_million is None:
            raise ConfigError("generate.max_cost: it needs generate.price_per_million, {prompt: ..., completion: ...}")
        if self.api == "completions" and self.system is not None:
            raise ConfigError("generate.system: api completions has no system message; write it into generate.prompt")
        for key in ("model", "messages", "prompt", "max_tokens", "stream", "n"):
            if key in self.extra:
                raise ConfigError(f"generate.extra: {key} is not for extra; use the settings of generate")
        return self


class Recipe(Settings):
    """One set of instruction data, completely."""

    sources: Annotated[list[SourceSettings], Field(min_length=1)]
    generate: GenerateSettings | None = None
    form: Literal["prompt", "messages"] = "prompt"
    """What is written: prompt and completion, or conversations."""
    size: Count | None = None
    """Rows of the mix; None: all, or with weights as many as keep their proportions."""
    repeat: bool = False
    """A source may give its rows more than once, if its weight asks for more than it has."""
    deduplicate: Literal["exact", "normalised", "near"] | None = "exact"
    near: Annotated[Number, Field(ge=0.5, le=1)] | None = 0.8
    """Texts are nearly equal from this Jaccard index of their character 5-grams on; None: only if they are equal."""
    split: SplitSettings = SplitSettings()
    against: list[str | AgainstSettings] = []
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output: str
    """The folder that is written."""

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        names = [source.called for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"sources: two are called {name!r}; give each a name of its own")
        asked = [source.called for source in self.sources if source.answer == "endpoint"]
        if asked and self.generate is None:
            raise ConfigError(
                f"generate: missing, and source {asked[0]} is answered by an endpoint; give it, or --endpoint"
            )
        if self.generate is not None and not asked:
            raise ConfigError("generate: no source has 'answer: endpoint'; say which one is answered by the model")
        for source in self.sources:
            if source.system is not None and self.form == "prompt":
                raise ConfigError(
                    f"sources {source.called}: system needs 'form: messages'; prompts have no place for it"
                )
        if self.deduplicate == "near" and self.near is None:
            raise ConfigError("deduplicate: near needs a threshold; set near, for example 0.8")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = (), endpoint: str | None = None) -> Recipe:
    """The recipe that a YAML file describes.

    Args:
        path: the file.
        overrides: "key=value" with dotted keys ("generate.max_cost=2", "sources.0.limit=10"), the value in YAML.
        endpoint: instead of `generate.endpoint`.

    Raises:
        ConfigError: no such file, no valid YAML, an unknown key (with the nearest known one), or a wrong type.
    """
    settings = read_yaml(path, "recipe", "sources and output", overrides)
    if endpoint is not None:
        if not isinstance(settings.get("generate"), dict):
            raise ConfigError(f"--endpoint: {path} has no generate section; add it, with the model's name")
        settings["generate"]["endpoint"] = endpoint
    return make_recipe(settings, str(path))


def make_recipe(settings: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain settings; `where` stands in errors.

    Raises:
        ConfigError: an unknown key, a missing key or a wrong type.
    """
    return validated(Recipe, settings, where, "recipe")


def is_recipe(path: str | Path) -> bool:
    """Whether a YAML file describes a recipe: it has `sources`, which a run has not."""
    return "sources" in read_yaml(path, "run or recipe", "base, data and output, or sources and output")


def _bare(settings: GenerateSettings) -> str:
    """The endpoint without what stands before an @, which may be a password."""
    return settings.endpoint.rpartition("@")[2]
