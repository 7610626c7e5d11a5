"""What is measured of a finished run: quality, speed of evaluation, time of an answer, size on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from graft.adapt import prepare
from graft.bank import bank_of
from graft.data.collate import pad
from graft.data.rows import Row, load_rows
from graft.data.template import Template
from graft.errors import ConfigError, GraftError
from graft.evaluate import score
from graft.evaluate.batches import bank_or_none, on_device, quiet, routed
from graft.evaluate.forgetting import forgetting
from graft.evaluate.generate import Decoding, answer_ids, generation_config
from graft.evaluate.icl import few_shot
from graft.evaluate.metrics import NEEDS
from graft.evaluate.run import examine
from graft.evaluate.shots import with_shots
from graft.merging import merge, unmerge
from graft.train.config import Run
from graft.train.setup import rows_of

MERGED = object()
ANSWERS, TOKENS, ROUNDS = 1, 16, 5
"""Prompts, tokens of each answer, and how often each is timed, for the latency."""
MOST = 16
"""Demonstrations that "fit" takes at most."""
BATCHES = 8
"""Of the evaluation speed."""

Found = dict[str, Any]


def test_rows(run: Run, measure: Found) -> list[Row]:
    """The rows on which the quality is measured: those of the test, or else the evaluation's."""
    if measure["test"] is None:
        return rows_of(run)[1] or []
    columns = measure["test_columns"]
    if columns is None:
        columns = run.data.columns if run.data.eval_columns is None else run.data.eval_columns
    return load_rows(measure["test"], split=measure["test_split"], columns=columns, limit=measure["test_limit"])


def quality(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: Template,
    entry: Any,
    measure: Found,
    truncate: bool,
    batch_size: int,
) -> dict[str, float]:
    """The metrics of one entry; `truncate` cuts rows that are longer than the context, where losses are measured."""
    found = examine(
        model,
        tokenizer,
        rows,
        template,
        [entry],
        measure["metrics"],
        batch_size=batch_size,
        decoding=Decoding(max_new_tokens=measure["max_new_tokens"]),
        truncate=truncate,
    )
    return next(iter(found.scores.values()))


def few_shots(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    pool: Sequence[Row],
    template: Template,
    measure: Found,
    seed: int,
    batch_size: int,
) -> Found:
    """The quality of the base with demonstrations from the training rows, and how many they were.

    Raises:
        ConfigError: a quality that needs the loss of an answer, or a template that reads no demonstrations.
    """
    wanted = measure["icl"]
    metrics = [name for name in measure["metrics"] if NEEDS[name] != "loss"]
    if measure["metrics"][0] not in metrics:
        raise ConfigError(
            f"in-context learning is not measured by {measure['metrics'][0]}; name accuracy or bleu first"
        )
    if template.mode == "classification":
        raise ConfigError(
            "a classification head reads no demonstrations; name a task in baselines.icl.template, for example "
            "{task: sentiment}"
        )
    found = few_shot(
        model,
        tokenizer,
        rows,
        pool,
        template,
        shots=wanted["shots"],
        most=MOST if wanted["shots"] == "fit" else None,
        seed=seed,
        calibrate=wanted["calibrate"],
        metrics=metrics,
        batch_size=batch_size,
        decoding=Decoding(max_new_tokens=measure["max_new_tokens"]),
    )
    made: Found = {"quality": next(iter(found.scores.values())), "note": f"{len(found.shots)} demonstrations"}
    fitted = template.fit([*pool, *rows], tokenizer)
    asked, behind = with_shots(rows[: BATCHES * batch_size], found.shots, fitted)
    made["evaluation_its"] = evaluation_speed(model, tokenizer, asked, behind, None, batch_size)
    if measure["latency"]:
        calls = {"base": _answering(model, tokenizer, rows[:ANSWERS], template, None)}
        with quiet(model):
            took = _in_turn(calls | {"unmerged": _answering(model, tokenizer, asked[:ANSWERS], behind, None)})
        made["latency"] = took | {"merged": None}
    return made


def forgot(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> Found:
    """What the adapter forgot of a general text, in nats a token."""
    return dataclasses.asdict(forgetting(model, tokenizer, text, [name])[0])


def evaluation_speed(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], template: Template, entry: Any, size: int
) -> float:
    """Batches of `size` rows a second, forward alone, each row with its answer."""
    rows = rows[: BATCHES * size]
    template = template.fit(rows, tokenizer) if template.mode != "classification" else template
    examples = score.encode(rows, [template], tokenizer)

    def once() -> None:
        if template.mode == "classification":
            score.class_scores(model, tokenizer, examples, [entry], batch_size=size, cut=True)
        else:
            score.losses(model, tokenizer, examples, [entry], mode=template.mode, batch_size=size, cut=True)

    return -(-len(rows) // size) / min(_seconds(once) for _ in range(2))


def latency(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], template: Template, name: str
) -> dict[str, float | None]:
    """Seconds of a token of an answer to one prompt (of one row, for a classifier): of the base, with the adapter
    `name`, and with it merged (None where it does not merge). Medians, base and adapter in turn."""
    rows = rows[:ANSWERS]
    entries: dict[str, Any] = {"base": None, "unmerged": name}
    if bank_of(model)[name].selected:  # it is the base, with other values
        entries = {"unmerged": name}
    with quiet(model):
        took = _in_turn({key: _answering(model, tokenizer, rows, template, entry) for key, entry in entries.items()})
    found: dict[str, float | None] = {"base": took.get("base", took["unmerged"]), "unmerged": took["unmerged"]}
    found["merged"] = None
    try:
        merge(model, name, tied="untie")
    except (GraftError, NotImplementedError):
        return found
    try:
        with quiet(model):
            found["merged"] = _in_turn({"merged": _answering(model, tokenizer, rows, template, MERGED)})["merged"]
    finally:
        unmerge(model)
    return found


def bytes_of(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _answering(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], template: Template, entry: Any
) -> Callable[[], int]:
    """A call that answers each row on its own, and returns how many tokens it made; `MERGED` is no route."""
    if template.mode == "classification":
        examples = template.examples(rows, tokenizer)
        batches = [pad([each], tokenizer, mode="classification") for each in examples]
        for batch in batches:
            del batch["labels"]

        def classify() -> int:
            for batch in batches:
                with contextlib.nullcontext() if entry is MERGED else routed(model, [entry]):
                    given = batch if entry is MERGED or bank_or_none(model) is None else prepare(model, batch, [entry])
                    out = model(**on_device(given, model))
                out.logits.sum().item()  # a GPU is done then
            return len(rows)

        return classify
    prompts = [template.prompt_ids(row, tokenizer) for row in rows]
    decoding = Decoding(max_new_tokens=TOKENS, min_new_tokens=TOKENS)

    def answer() -> int:
        if entry is not MERGED:
            return sum(len(answer_ids(model, tokenizer, [prompt], [entry], decoding)[0]) for prompt in prompts)
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            config = generation_config(model, tokenizer, decoding, len(prompt))
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return TOKENS * len(prompts)

    return answer


def _in_turn(calls: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Median seconds for each token, the calls one after the other in each round; the first round warms up."""
    took: dict[str, list[float]] = {key: [] for key in calls}
    for number in range(ROUNDS + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            made = call()
            if number:
                took[key].append((time.perf_counter() - start) / max(1, made))
    return {key: statistics.median(times) for key, times in took.items()}


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
