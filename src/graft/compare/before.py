"""What is asked before the first run: the rows, the metrics, and which methods the base and the machine can take.

What is wrong with the data or the settings is said once, here, and not by every run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from graft import base
from graft.compare import after
from graft.compare.grid import ROW, RUNS, Entry, run_of, slug
from graft.compare.settings import Compare
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import ConfigError, DataError, GraftError
from graft.evaluate import metrics as measures
from graft.evaluate.batches import check_length
from graft.evaluate.general import documents
from graft.evaluate.run import check_rows, default_metrics
from graft.planning.gate import check_room
from graft.train.config import Run
from graft.train.schedule import warmup_steps
from graft.train.setup import Data, check_data, check_settings, read_data, schedule_of

QUALITY = ("accuracy", "bleu", "loss")
"""What is compared where the user names no metric: the first that fits the rows."""


def checked(settings: Compare) -> tuple[Run, Data, list[Row]]:
    """A run that stands for all, its data, and the rows of the test.

    Raises:
        ConfigError, DataError: what is wrong with them.
    """
    run = run_of(Entry("", "base", "lora"), settings, seed=settings.all_seeds[0], output=settings.output)
    if settings.executor.kind == "local":  # the machines of a cluster may have what this one lacks
        base.check(run.precision, run.device)
    tokenizer, config = base.load_tokenizer(run.base), base.load_config(run.base)
    data = read_data(run, tokenizer, config)
    check_data(run, data)
    if len(data.names) > 1:
        raise ConfigError(f"data: its rows name {len(data.names)} adapters; a comparison is of one task")
    if settings.search.metric == "accuracy" and data.template.mode != "classification":
        raise ConfigError("search.metric: accuracy is for classification heads; leave it out")
    warmup_steps(run.train.warmup, schedule_of(run, data).steps)
    columns = {"test_split": settings.test_split, "test_columns": settings.test_columns}
    rows = after.test_rows(run, {"test": settings.test, "test_limit": settings.test_limit, **columns})
    metrics = metrics_of(settings, rows, data.template)
    needs = {measures.NEEDS[name] for name in metrics}
    check_rows(rows, data.template.mode, needs)
    if "text" in needs:
        measures.check_references(metrics, [data.template.references(row) for row in rows])
    _check_test(run, data, rows, base.context_length(config, tokenizer), writes="text" in needs)
    return run, data, rows


def metrics_of(settings: Compare, rows: Sequence[Row], template: Template) -> tuple[str, ...]:
    """The metrics; the first is the quality."""
    if settings.metrics is not None:
        return tuple(measures.known_metrics(settings.metrics))
    fit = default_metrics(rows, template)
    first = next(name for name in QUALITY if name in fit)
    return (first, *(name for name in fit if name != first))


def facts_of(settings: Compare, run: Run, data: Data, rows: Sequence[Row]) -> dict[str, str]:
    """What decides results beside the settings: the base, the data, and the kind of device."""
    facts = {"base": base.identity(run.base), **data.hashes}
    if settings.test is not None:
        text = json.dumps([[row.index, dict(row.fields)] for row in rows], default=str, sort_keys=True)
        facts["test"] = hashlib.sha256(text.encode()).hexdigest()
    if settings.forgetting is not None:
        facts["forgetting"] = hashlib.sha256("\0".join(documents(settings.forgetting)).encode()).hexdigest()
    here = settings.executor.kind == "local"
    facts["device"] = base.device_kind(run.device) if here else f"of Ray, a GPU: {settings.executor.gpus > 0}"
    return facts


def fits(
    lines: Sequence[Entry], settings: Compare, data: Data, folder: Path
) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """By label the steps of the whole budget, and why an entry is skipped: the base or the machine cannot take it."""
    tokenizer, config = base.load_tokenizer(settings.base), base.load_config(settings.base)
    steps, unfit = dict[str, int](), dict[str, str]()
    here = settings.executor.kind == "local"
    for entry in lines:
        if entry.kind != "method":
            continue
        run = run_of(entry, settings, lr=entry.lrs[0], output=settings.output)
        ran = any((folder / RUNS / slug(entry.label)).glob(f"*/{ROW}"))
        try:
            steps[entry.label] = schedule_of(run, data).steps
            warmup_steps(run.train.warmup, steps[entry.label])
            check_settings(run, tokenizer, config, here=here)
            if here and not ran:  # it fitted before; less memory may be free by now
                check_room(run, config, tokenizer, data, force=False, console=Console(quiet=True))
        except GraftError as error:
            unfit[entry.label] = str(error).removesuffix("; or --force tries it all the same")
    return steps, unfit


def _check_test(run: Run, data: Data, rows: Sequence[Row], context: int | None, writes: bool) -> None:
    """The test's rows must have answers that the template knows, fit into the context, and be new to the training.

    `writes`: answers are generated; rows may be cut for a loss, but a prompt must leave room for a token.
    """
    template, tokenizer = data.template, base.load_tokenizer(run.base)
    for row in rows:
        if template.mode == "classification":
            template.label_number(row)
        elif template.task is not None:
            template.task.answer(row)
    if not run.data.truncate:
        for example in template.examples(rows, tokenizer):
            check_length(example.row.where, max(len(example), len(example.labels)), context)
    elif writes:
        room = 0 if template.mode == "seq2seq" else 1
        for row in rows:
            check_length(row.where, len(template.prompt_ids(row, tokenizer)) + room, context)
    seen = {example.row.question: example.row for example in data.train}
    leaked = [row for row in rows if row.question in seen]
    if len(leaked) > run.data.limits.leaked:
        raise DataError(
            f"{leaked[0].where}: it asks what {seen[leaked[0].question].where} asks, which is trained "
            f"({len(leaked)} such rows of {len(rows)}); remove them, or raise data.limits.leaked"
        )
