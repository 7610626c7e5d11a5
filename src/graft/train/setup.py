"""From a `Run` to what trains: rows to examples, the base, its adapters. Nothing is written here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from graft import base, interface, roles
from graft.adapt import attach
from graft.bank import bank_of
from graft.data.collate import check_ends, check_packing, pad_id, truncate
from graft.data.report import Limits, Report, report
from graft.data.rows import Row, hold_out, load_rows
from graft.data.template import Example, Template
from graft.errors import ConfigError, DataError
from graft.evaluate.general import documents
from graft.ids import IGNORED
from graft.train.config import Run
from graft.train.forgetting import check as check_forgetting
from graft.train.schedule import Schedule

log = logging.getLogger("graft")

LENGTH = 1024
"""The longest row where neither the run nor the model says one, and the longest pack where the run does not."""


NOT_CAUSAL = (*base.HEADS, "ForPreTraining")
"""Endings of the classes that see a whole row at once."""


@dataclass(frozen=True)
class Data:
    """The examples of a run, cut as they are trained, and what is known about them."""

    train: list[Example]
    evaluation: list[Example] | None
    template: Template
    report: Report
    hashes: dict[str, str]
    """sha256 of each source."""
    names: tuple[str, ...]
    """The adapters that the rows name, or the run's own."""
    max_length: int


@dataclass(frozen=True)
class Opened:
    """What a caller has at hand of a run that it knows to fit the machine.

    Attributes:
        data: what `read_data` gives for the run.
        model: the base without the run's adapters, which stay attached; None: it is loaded.
        last_alone: evaluate at the end and not before the first step, unless there is a bound to hold from the start.
    """

    data: Data
    model: PreTrainedModel | None = None
    last_alone: bool = False


def check_settings(
    run: Run, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, *, here: bool = True
) -> None:
    """Refuse what the settings and the base's config alone can tell: no row and no weight is read.

    Args:
        here: whether the run will be on this machine, which must then have its device and what its precision needs.

    Raises:
        ConfigError, SiteError: as `open_model` later.
    """
    if here:
        base.check(run.precision, run.device)
    template = template_for(run, tokenizer, config)
    try:
        model = base.skeleton(config, 2 if template.mode == "classification" else None)
    except Exception:  # whatever a model's own code cannot do without weights; `load_base` says what is wrong
        return
    try:
        attach(model, run.method.with_tokenizer(tokenizer), run.name, peft_compat=run.peft_compat)
    except ConfigError:
        if run.precision in ("int8", "nf4"):  # a method may want what this plain skeleton is not
            return
        raise
    except NotImplementedError:  # a start that needs weights
        return
    check_forgetting(run, model)
    _check_slots(template, [run.name], model)
    _free_positions([run.name], model)


def read_data(run: Run, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Data:
    """Load, render, tokenize and measure the rows of a run; limits are not checked yet.

    Raises:
        DataError, ConfigError: see `load_rows`, `Template` and `check_ends`; or a row names an adapter that no training
            row names.
    """
    settings = run.data
    rows, held = rows_of(run)
    named = any(row.adapter is not None for row in rows)
    if named:
        rows, held = _named(rows, run.name), held and _named(held, run.name)
    names = tuple(sorted({row.adapter or run.name for row in rows}))
    for row in held or ():
        if (row.adapter or run.name) not in names:
            raise DataError(f"{row.where}: no training row has the adapter {row.adapter!r}")
    template = template_for(run, tokenizer, config).fit(rows, tokenizer)
    context = base.context_length(config, tokenizer)
    context = context and int(context * run.method.stretch(config))
    max_length = settings.max_length or context or LENGTH
    if settings.packing and settings.max_length is None:
        max_length = min(max_length, LENGTH)
    if context is not None and max_length > context:
        raise ConfigError(f"data.max_length: {max_length} is more than the {context} tokens that the model takes")
    mode = template.mode
    if settings.general is not None:
        documents(settings.general)  # what cannot be read is refused before anything is loaded
    labels = {row.label for row in rows}
    if mode == "classification" and len(labels) < 2:
        raise DataError(f"{rows[0].source}: every row has the label {labels.pop()!r}; give rows with two or more")
    train = template.examples(rows, tokenizer)
    evaluation = None if held is None else template.examples(held, tokenizer)
    found = report(train, evaluation, tokenizer, max_length=max_length, mode=mode)

    def cut(examples: list[Example]) -> list[Example]:
        return [truncate(example, max_length, mode) for example in examples]

    train, evaluation = cut(train), None if evaluation is None else cut(evaluation)
    if mode == "classification":
        check_ends([*train, *(evaluation or ())], tokenizer, config)
    return Data(
        train=train,
        evaluation=None if evaluation is None else sorted(evaluation, key=length, reverse=True),
        template=template,
        report=found,
        hashes=_hashes(run, rows, held),
        names=names,
        max_length=max_length,
    )


def check_data(run: Run, data: Data) -> None:
    """Refuse data over the run's limits.

    Raises:
        DataError: it names the rows and the key to change.
    """
    data.report.check(Limits(truncate=run.data.truncate, **run.data.limits.model_dump()))


def open_model(
    run: Run, data: Data, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The base, loaded unless it is given, with a fresh adapter for each name in the data.

    Raises:
        ConfigError, SiteError: see `load_base` and `attach`; or the model cannot do what the run asks.
    """
    classify = data.template.mode == "classification"
    if model is None:
        labels = len(data.template.label_names) if classify else None
        model = base.load_base(run.base, precision=run.precision, device=run.device, num_labels=labels)
    if classify and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_id(tokenizer)  # decoders find the last token of a row by it
    method = run.method.with_tokenizer(tokenizer)
    for name in data.names:
        attach(model, method, name, peft_compat=run.peft_compat)
    if run.data.packing:
        check_packing(model)
    _check_new(run, data, model)
    _check_slots(data.template, data.names, model)
    _check_room(data, model)
    return model


def schedule_of(run: Run, data: Data) -> Schedule:
    """Which examples each batch has."""
    settings = run.train
    return Schedule(
        [length(example) for example in data.train],
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=run.seed,
        group=run.data.group,
        pack=data.max_length if run.data.packing else None,
        sides=[sides(example, data.template.mode) for example in data.train],
    )


def padding_free(run: Run, data: Data, model: PreTrainedModel, tried: PreTrainedModel | None = None) -> bool:
    """Whether the examples of a batch stand end to end in one row; where they could but do not, the log says why.

    Args:
        tried: a smaller model of the same class, where `model` has no numbers to try packing with.

    Raises:
        ConfigError: `data.padding_free` is true, and this model or method cannot.
    """
    asked = run.data.padding_free
    if run.data.packing:
        return interface.makes_no_mask(model)
    reason = None if asked is False else needs_rows(run, data, model, tried)
    if reason is None:
        return asked is not False
    if asked:
        raise ConfigError(f"data.padding_free: {reason}; leave it out")
    log.info("batches are padded: %s", reason)
    return False


def length(example: Example) -> int:
    """Tokens of an example; of an encoder-decoder's the longer side."""
    return max(len(example.input_ids), len(example.labels))


def sides(example: Example, mode: str) -> tuple[int, ...]:
    """Tokens of an example; of an encoder-decoder those of its input and of its target."""
    return (len(example.input_ids), len(example.labels)) if mode == "seq2seq" else (len(example.input_ids),)


def needs_rows(run: Run, data: Data, model: PreTrainedModel, tried: PreTrainedModel | None = None) -> str | None:
    """Why examples must not stand in one row, if anything speaks against it; `tried` as in `padding_free`."""
    if data.template.mode != "causal":
        return f"{data.template.mode} takes each example in a row of its own"
    bank, kind = bank_of(model), type(model).__name__
    deltas = [delta for name in data.names for leaf in bank[name].leaves for _, delta in leaf.items()]
    if any(delta.reads_width for delta in deltas):
        return f"{run.method.name} depends on how long the longest row of a batch is"
    first = any(example.labels[0] != IGNORED for example in [*data.train, *(data.evaluation or ())])
    if first and any(bank.prompts(((name, 1.0),)) for name in data.names):
        return "the first token of an example has a label, which its pseudo-tokens predict in a row of its own alone"
    if run.data.padding_free is None and not interface.makes_no_mask(model):
        return f"attention of {kind} would need a mask of all tokens by all tokens"
    try:
        check_packing(model if tried is None else tried)
    except ConfigError:
        return f"{kind} lets examples of one row see each other"
    return None


def rows_of(run: Run) -> tuple[list[Row], list[Row] | None]:
    """The rows that a run trains on, and those that it is evaluated on.

    Raises:
        DataError, ConfigError: see `load_rows` and `hold_out`.
    """
    settings = run.data
    rows = load_rows(settings.train, split=settings.split, columns=settings.columns, limit=settings.limit)
    if settings.eval is None:
        return rows, None
    if isinstance(settings.eval, str):
        columns = settings.columns if settings.eval_columns is None else settings.eval_columns
        held = load_rows(settings.eval, split=settings.eval_split, columns=columns, limit=settings.eval_limit)
        return rows, held
    rows, held = hold_out(rows, settings.eval, run.seed if settings.eval_seed is None else settings.eval_seed)
    return rows, held[: settings.eval_limit]


def _named(rows: Sequence[Row], name: str) -> list[Row]:
    return [row if row.adapter is not None else dataclasses.replace(row, adapter=name) for row in rows]


def template_for(run: Run, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Template:
    """The run's template, with kind and mode chosen by the model where the run says nothing."""
    given = run.data.template
    settings: dict[str, Any] = {"kind": given} if isinstance(given, str) else dict(given or {})
    mode = "seq2seq" if config.is_encoder_decoder else "causal"
    settings.setdefault("mode", mode)
    settings.setdefault("kind", "chat" if tokenizer.chat_template and mode == "causal" else "plain")
    try:
        template = Template.from_dict(settings)
    except ConfigError as error:
        raise ConfigError(f"data.{error}") from None
    if template.mode not in (mode, "classification"):
        raise ConfigError(f"data.template.mode: {run.base} is no {template.mode} model; leave it out, or say {mode}")
    kind = next(iter(config.architectures or ()), "")
    if template.mode == "causal" and kind.endswith(NOT_CAUSAL):
        raise ConfigError(
            f"data.template.mode: {run.base} is a {kind}, which sees the tokens that it shall predict; say "
            "mode classification, or take a causal base"
        )
    if run.data.general is not None and template.mode == "classification":
        raise ConfigError("data.general: a classifier has no loss on text; leave it out")
    for key in ("packing", "padding_free"):
        if getattr(run.data, key) and template.mode != "causal":
            raise ConfigError(f"data.{key}: it works for decoders only, not in mode {template.mode}")
    if run.train.keep_best == "accuracy" and template.mode != "classification":
        raise ConfigError("train.keep_best: accuracy is for classification; use loss")
    if run.train.keep_best and run.data.eval is None:
        raise ConfigError("train.keep_best: it needs data.eval, a file or a share such as 0.1")
    return template


def _check_new(run: Run, data: Data, model: PreTrainedModel) -> None:
    """What the checkpoint lacks is random: it must train and be saved along, or no other load gives it again."""
    for name in data.names:
        adapter = bank_of(model)[name]
        whole = [site.path for site, delta in adapter.items() if delta.whole]
        if adapter.selected:
            whole = [head.path for head in roles.task_heads(model)]
        for key in base.made_new(model):
            if any(key.startswith(f"{path}.") for path in whole):
                continue
            module = key.rpartition(".")[0]
            if any(key.startswith(f"{head.path}.") for head in roles.task_heads(model)):
                raise ConfigError(f"method.head: {run.base} has no trained {module}; leave head out, so that it trains")
            raise ConfigError(
                f"base {run.base}: {module} is not in the checkpoint, so it is random and no adapter could be loaded "
                f"again; say method.modules_to_save: [{module}] to train and save it along, or take another base"
            )


def _check_slots(template: Template, names: Sequence[str], model: PreTrainedModel) -> None:
    """A template that places pseudo-tokens must place all of them."""
    placed = template.slots
    for name in names if placed else ():
        bank = bank_of(model)
        method, needed = bank[name].method.name, sum(delta.length for delta in bank.prompts(((name, 1.0),)))
        if needed == 0:
            raise ConfigError(f"data.template.templates: {placed} pseudo-tokens, {method} gives none; take them out")
        if needed != placed:
            raise ConfigError(
                f"data.template.templates: {placed} pseudo-tokens, and method.length is {needed} ({method}); make them "
                "equal, or take them out for slots in front"
            )


def _free_positions(names: Sequence[str], model: PreTrainedModel) -> tuple[int | None, int, int]:
    """How many tokens the model takes (None: any number), how many of them are slots, and how many prefix rows.

    Raises:
        ConfigError: the adapters leave no room for a text.
    """
    bank = bank_of(model)
    adapters = [bank[name] for name in names]
    slots = max(sum(delta.length for delta in bank.prompts(((each.name, 1.0),))) for each in adapters)
    shift = max((shift for each in adapters for shift in each.shift.values()), default=0)
    context = base.context_length(model.config)
    context = context and int(context * min(each.stretch for each in adapters))
    if context is None or roles.is_encoder_decoder(model):
        return None, slots, shift
    if context - slots - shift < 2:
        raise ConfigError(
            f"method.length: the {slots + shift} of {adapters[0].method.name} alone fill the {context} tokens that the "
            "model takes; use fewer"
        )
    return context, slots, shift


def _check_room(data: Data, model: PreTrainedModel) -> None:
    """Slots of soft prompts and prefix rows take positions too."""
    context, slots, shift = _free_positions(data.names, model)
    taken = shift + (0 if data.template.slots else slots)  # the rows have them already
    longest = max(len(example.input_ids) for example in [*data.train, *(data.evaluation or ())])
    if context is not None and taken + longest > context:
        method = bank_of(model)[data.names[0]].method.name
        raise ConfigError(
            f"data.max_length: {longest} tokens and {taken} of {method} are more than the {context} that the model "
            f"takes; use at most {context - taken}"
        )


def _hashes(run: Run, rows: Sequence[Row], held: Sequence[Row] | None) -> dict[str, str]:
    sources: dict[str, tuple[str, Sequence[Row]]] = {"train": (run.data.train, rows)}
    if run.data.general is not None:
        alone = Path(run.data.general).expanduser().is_file()  # its bytes are hashed
        sources["general"] = (run.data.general, [] if alone else load_rows(run.data.general))
    if isinstance(run.data.eval, str):
        sources["eval"] = (run.data.eval, held or ())
    found = {}
    for key, (source, content) in sources.items():
        path = Path(source).expanduser()
        if path.is_file():
            with path.open("rb") as file:
                found[key] = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            text = json.dumps([[row.index, dict(row.fields)] for row in content], default=str, sort_keys=True)
            found[key] = hashlib.sha256(text.encode()).hexdigest()
    return found
