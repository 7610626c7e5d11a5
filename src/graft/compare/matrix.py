"""Few-shot fine-tuning against in-context learning, after Mosbach et al. 2023 (arXiv 2305.16938).

For each seed the same demonstrations are drawn from the training rows once. In-context learning puts them in front of
the question; fine-tuning trains on them with the same pattern and the same words (pattern-based fine-tuning), and then
answers the pattern alone. Both choose the likeliest word. Every (base, approach, pattern, seed) is tested on the same
rows of each set, in and out of domain, and is one JSON file in `<folder>/results`, whose name has a hash of all that
it depends on: the same call goes on where it was stopped, and a changed setting makes new results.

As in the paper: 16 examples, 10 seeds, a Welch test for each cell of mean differences. Otherwise: no checkpoint is
chosen by a test set, the last one counts; and calibrated scores stand beside plain ones.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import shutil
import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from graft.adapt import detach
from graft.base import device_kind, identity, load_base, load_config, load_tokenizer
from graft.compare.cells import line, summary, told
from graft.compare.matrix_page import write_page
from graft.compare.matrix_settings import CALIBRATED, ICL, TUNED, ZERO, MatrixSettings, name_of
from graft.data.rows import Row, load_rows
from graft.data.template import Template
from graft.disk import write_text
from graft.errors import ConfigError, DataError, GraftError
from graft.evaluate.batches import bank_or_none
from graft.evaluate.icl import label_scores, one_pattern, with_words
from graft.evaluate.metrics import accuracy
from graft.evaluate.shots import draw, fitting, with_shots
from graft.files import load
from graft.planning.gate import check_room
from graft.train.config import Run, make_run
from graft.train.run import Interrupted, check_gpu, train
from graft.train.setup import Opened, read_data


@dataclass(frozen=True)
class _Sets:
    """The rows that a matrix is made of, and how many were left out for their length."""

    template: Template
    patterns: list[int]
    pool: list[Row]
    tests: dict[str, list[Row]]
    left_out: dict[str, int]
    digest: str
    bases: dict[str, str]
    """What each base holds: see `identity`."""


def run_matrix(settings: MatrixSettings, folder: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Run what is not there yet, and write `matrix.json`, `.csv`, `.html`, `.png` and `.svg` into the folder.

    Args:
        settings: see `MatrixSettings`.
        folder: made if it is not there.
        console: where a line for each result goes; None: the terminal.

    Returns:
        What `matrix.json` holds: see `cells.summary`.

    Raises:
        ConfigError, DataError: settings or rows that cannot be used, or no approach has a result.
        Interrupted: a training was stopped; the same call goes on.
    """
    console, folder = console or Console(), Path(folder).expanduser()
    check_gpu(settings.device)
    sets = _sets(settings)
    (folder / "results").mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    first: GraftError | None = None
    for base in settings.bases:
        tokenizer = load_tokenizer(base)
        model, unfit = None, dict[tuple[str, int, int], GraftError]()
        for pattern, seed, approach in _units(settings, sets):
            file = folder / "results" / f"{_file_name(settings, sets, base, approach, pattern, seed)}.json"
            if file.is_file():
                results.append(json.loads(file.read_text(encoding="utf-8")))
                continue
            gc.collect()  # a trainer is a ring: it holds its base and the optimizer's state until it is found
            if model is None:
                unfit = _unfit(settings, sets, base, tokenizer, folder / "runs")
                model = load_base(base, precision=settings.precision, device=settings.device)
            started = time.perf_counter()
            unit = {"base": name_of(base), "approach": approach, "pattern": pattern, "seed": seed}
            try:
                if (approach, pattern, seed) in unfit:
                    raise unfit[approach, pattern, seed]
                found = _measure(settings, sets, base, model, tokenizer, unit, folder / "runs" / file.stem)
            except Interrupted:
                raise
            except GraftError as error:
                first = first or type(error)(str(error))  # its traceback would hold the trainer
                failed.append({**unit, "why": str(error)})
                console.print(f"{told(unit)}: skipped, {error}", highlight=False, soft_wrap=True)
                continue
            found["seconds"] = round(time.perf_counter() - started, 2)
            write_text(file, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            if not settings.keep_adapters:
                shutil.rmtree(folder / "runs" / file.stem, ignore_errors=True)
            results.append(found)
            console.print(line(found), highlight=False, soft_wrap=True)
    if first is not None and not results:
        raise first
    found = summary(settings.model_dump(mode="json"), _facts(settings, sets), results, failed)
    write_page(found, folder)
    for note in found["notes"]:
        console.print(note, highlight=False, soft_wrap=True)
    return found


# ------------------------------------------------------------------------------------------------- one result


def _units(settings: MatrixSettings, sets: _Sets) -> list[tuple[int, int, str]]:
    """(pattern, seed, approach) of every result of a base; without shots no seed changes anything."""
    units = [(pattern, 0, ZERO) for pattern in sets.patterns]
    for seed in range(settings.seeds):
        units += [(pattern, seed, approach) for pattern in sets.patterns for approach in (ICL, *settings.methods)]
    return units


def _measure(
    settings: MatrixSettings,
    sets: _Sets,
    base: str,
    model: Any,
    tokenizer: Any,
    unit: dict[str, Any],
    place: Path,
) -> dict[str, Any]:
    """The accuracies of one approach with one pattern and seed."""
    template = one_pattern(sets.template, unit["pattern"]).fit(sets.pool, tokenizer)
    approach, entry = unit["approach"], None
    drawn = [] if approach == ZERO else draw(sets.pool, settings.shots, unit["seed"], balanced=settings.balanced)
    shown: list[Row] = []
    if approach == ICL:
        asked = [row for rows in sets.tests.values() for row in rows]
        more: dict[str, Any] = {"balanced": settings.balanced}
        shown = fitting(model, tokenizer, asked, sets.pool, template, settings.shots, unit["seed"], **more)
    elif approach != ZERO:
        _train(_run(settings, base, template, drawn, unit, place), model, tokenizer)
        load(model, place / "adapter", TUNED)
        entry = TUNED
    calibrate = settings.calibrated and approach == ICL
    found: dict[str, Any] = {**unit, "shots": [row.index for row in drawn], "accuracy": {}, "chosen": {}}
    try:
        for name, rows in sets.tests.items():
            right = [template.answer(row) for row in rows]
            scores = label_scores(model, tokenizer, rows, shown, template, entry, calibrate, settings.batch_size)
            for label, corrected in ((approach, False), *(((CALIBRATED, True),) if calibrate else ())):
                words = scores.chosen(corrected)
                found["accuracy"].setdefault(label, {})[name] = accuracy(words, right)
                found["chosen"].setdefault(label, {})[name] = {word: words.count(word) for word in scores.words}
    finally:
        if entry is not None:
            detach(model, TUNED)
    return found


def _run(
    settings: MatrixSettings, base: str, template: Template, drawn: Sequence[Row], unit: dict[str, Any], place: Path
) -> Run:
    """The training on the drawn rows alone; of them the file has what the pattern reads and nothing else."""
    rows = place.with_name(f"{place.name}.jsonl")
    names = ("text", "label") if drawn[0].pair is None else ("premise", "hypothesis", "label")
    assert template.task is not None
    for row in drawn:
        template.task.prompt(row)  # it refuses what is no text or number, such as a date
    read = [name for _, name, _, _ in string.Formatter().parse(template.task.templates[0]) if name]
    kept = [{name: row.fields[name] for name in (*names, *read) if name in row.fields} for row in drawn]
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(rows, "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in kept))
    arm = settings.methods[unit["approach"]]
    run: dict[str, Any] = {"base": base, "precision": settings.precision, "device": settings.device}
    run |= {"method": arm.method.to_dict(), "train": arm.train.model_dump(), "seed": unit["seed"], "output": str(place)}
    run["data"] = {"train": str(rows), "columns": {name: name for name in names}, "template": template.to_dict()}
    return make_run(run)


def _train(run: Run, model: Any, tokenizer: Any) -> None:
    """Train on the loaded base, which is as before afterwards; a training that was stopped goes on."""
    try:
        train(run, console=Console(quiet=True), opened=Opened(read_data(run, tokenizer, model.config), model))
    finally:
        if bank_or_none(model) is not None:  # a finished training attaches nothing
            detach(model)
        model.zero_grad()  # of a full fine-tuning that failed


def _unfit(
    settings: MatrixSettings, sets: _Sets, base: str, tokenizer: Any, folder: Path
) -> dict[tuple[str, int, int], GraftError]:
    """Which trainings (method, pattern, seed) do not fit, and why; asked before the base takes its part of memory."""
    seeds, config = range(settings.seeds), load_config(base)
    try:
        templates = {
            pattern: one_pattern(sets.template, pattern).fit(sets.pool, tokenizer) for pattern in sets.patterns
        }
        drawn = [draw(sets.pool, settings.shots, seed, balanced=settings.balanced) for seed in seeds]
        lengths = {
            (pattern, seed): [len(example) for example in template.examples(drawn[seed], tokenizer)]
            for pattern, template in templates.items()
            for seed in seeds
        }
    except GraftError:  # each of them says it of its own
        return {}

    @functools.cache
    def why(approach: str, pattern: int, seed: int) -> GraftError | None:
        unit = {"approach": approach, "seed": seed}
        try:
            run = _run(settings, base, templates[pattern], drawn[seed], unit, folder / "asked")
            data = read_data(run, tokenizer, config)
            check_room(run, config, tokenizer, data, force=False, console=Console(quiet=True))
        except ConfigError as error:
            return ConfigError(str(error).removesuffix("; or --force tries it all the same"))
        except DataError:  # of these rows; the training says it
            pass
        return None

    found: dict[tuple[str, int, int], GraftError] = {}
    heaviest = {max(lengths, key=lambda unit: max(lengths[unit])), max(lengths, key=lambda unit: sum(lengths[unit]))}
    for approach in settings.methods:
        if any(why(approach, *unit) for unit in heaviest):
            said = {(approach, *unit): why(approach, *unit) for unit in lengths}
            found |= {unit: error for unit, error in said.items() if error is not None}
    (folder / "asked.jsonl").unlink(missing_ok=True)
    return found


# ------------------------------------------------------------------------------------------------- rows and names


def _sets(settings: MatrixSettings) -> _Sets:
    """The rows, short enough for every base and pattern."""
    try:
        template = Template.from_dict(settings.template)
    except ConfigError as error:
        raise ConfigError(f"matrix.{error}") from None
    tokenizers = [load_tokenizer(base) for base in settings.bases]
    pool = load_rows(settings.train, split=settings.split, columns=settings.columns)
    template = template.fit(pool)
    if template.mode == "classification" or template.task is None or pool[0].form != "label":
        raise ConfigError(f"matrix.template: {settings.train} needs labels, and words for them (templates, verbalizer)")
    every = range(len(template.task.templates))
    template = with_words(template, pool)
    _check_words(template, pool)
    patterns = list(every) if settings.patterns is None else settings.patterns
    rendered = [one_pattern(template, pattern) for pattern in patterns]

    def short(rows: list[Row], most: int | None) -> list[Row]:
        if most is None:
            return rows
        kept = set(range(len(rows)))
        for each in rendered:
            made, plain = with_shots(rows, [], each)
            for tokenizer in tokenizers:
                kept &= {n for n, example in enumerate(plain.examples(made, tokenizer)) if len(example) <= most}
        return [rows[number] for number in sorted(kept)]

    drawn, left = short(pool, settings.max_shot_tokens), {}
    left["train"] = len(pool) - len(drawn)
    tests = {}
    for name, test in settings.tests.items():
        rows = load_rows(test.source, split=test.split, columns=test.columns)
        _check_words(template, rows)
        kept = short(rows, settings.max_question_tokens)
        left[name], tests[name] = len(rows) - len(kept), kept[: test.limit]
        if not kept:
            raise DataError(f"{test.source}: no row has at most {settings.max_question_tokens} tokens; allow more")
    questions = {row.question for rows in tests.values() for row in rows}
    apart = [row for row in drawn if row.question not in questions]
    left["train_tested"] = len(drawn) - len(apart)
    draw(apart, settings.shots, balanced=settings.balanced)
    content = [[[row.index, dict(row.fields)] for row in rows] for rows in (apart, *tests.values())]
    digest = hashlib.sha256(json.dumps([content, list(tests)], default=str).encode()).hexdigest()
    return _Sets(template, patterns, apart, tests, left, digest, {base: identity(base) for base in settings.bases})


def _check_words(template: Template, rows: Sequence[Row]) -> None:
    """Raise a DataError for a label without a word before anything runs."""
    for row in rows:
        template.answer(row)


def _file_name(settings: MatrixSettings, sets: _Sets, base: str, approach: str, pattern: int, seed: int) -> str:
    """Readable, and with a hash of all that the result depends on."""
    arm = settings.methods.get(approach)
    depends: list[Any] = [sets.digest, sets.bases[base], approach, seed, settings.precision]
    depends.append(device_kind(settings.device))
    depends += [
        one_pattern(sets.template, pattern).to_dict(),
        None if approach == ZERO else [settings.shots, settings.balanced],
        approach == ICL and settings.calibrated,
    ]
    depends.append(None if arm is None else arm.model_dump(mode="json"))
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:10]
    return f"{name_of(base)}-{approach}-pattern{pattern}-seed{seed}-{digest}"


def _facts(settings: MatrixSettings, sets: _Sets) -> dict[str, Any]:
    """What the summary says of patterns and sets; shares of labels are by word."""
    task = sets.template.task
    assert task is not None
    tests = {}
    for name, rows in sets.tests.items():
        counts = Counter(sets.template.answer(row) for row in rows)
        tests[name] = {
            "rows": len(rows),
            "left_out": sets.left_out[name],
            "out_of_domain": settings.tests[name].out_of_domain,
            "shares": {word: counts.get(word, 0) / len(rows) for word in task.words or sorted(counts)},
        }
    left = {key: sets.left_out[key] for key in ("train", "train_tested")}
    patterns = {str(pattern): task.templates[pattern] for pattern in sets.patterns}
    return {"patterns": patterns, "pool": {"rows": len(sets.pool), "left_out": left}, "tests": tests}
