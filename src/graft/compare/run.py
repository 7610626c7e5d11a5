"""One comparison from its settings to the report: `compare(load_compare("compare.yaml"))`. The same call goes on.

<output>/compare.json   what was found, rewritten as runs end    <output>/report.html, .csv, .png, ...
<output>/runs/<label>/<settings>/row.json                        one for each run; see `grid`
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from graft import base
from graft.compare import after
from graft.compare.book import FOUND, Book
from graft.compare.executors import LOST, Executor, opened
from graft.compare.grid import ROW, RUNS, Entry, Grid, Row, Unit, entries, read_row, run_of
from graft.compare.matrix import make_matrix, run_matrix
from graft.compare.report import write_report
from graft.compare.search import Chosen, Flow, flow
from graft.compare.settings import Compare
from graft.compare.table import terminal
from graft.disk import LOCK, locked, write_text
from graft.errors import ConfigError, GraftError
from graft.evaluate import metrics as measures
from graft.evaluate.general import documents
from graft.evaluate.run import default_metrics
from graft.planning.gate import check_room
from graft.settings import read_yaml
from graft.train.config import Run
from graft.train.folder import undone
from graft.train.run import Interrupted
from graft.train.setup import Data, check_data, check_settings, read_data, schedule_of, template_for

MATRIX = "matrix"
QUALITY = ("accuracy", "bleu", "loss")
"""What is compared where the user names no metric: the first that fits the rows."""


def compare(settings: Compare, retry: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run what is not done yet, and say what it shows.

    Args:
        settings: of the comparison (`load_compare`).
        retry: do runs again that failed or were skipped.
        console: where a line for each run goes; None: the terminal.

    Returns:
        What `compare.json` holds.

    Raises:
        ConfigError, DataError: settings or data that cannot be compared.
        Interrupted: the comparison was stopped; the same call goes on.
    """
    console = console or Console()
    folder = _folder(settings)
    lines = entries(settings)
    run, data, rows = _checked(settings, lines)
    chosen = settings.model_copy(update={"metrics": _metrics(settings, rows, run)})
    schedule = schedule_of(run, data)
    hashes = data.hashes | ({"test": _hash(rows)} if settings.test is not None else {})
    if settings.forgetting is not None:
        hashes["forgetting"] = hashlib.sha256("\0".join(documents(settings.forgetting)).encode()).hexdigest()
    grid = Grid(chosen, hashes, schedule.steps)
    with undone(folder), locked(folder):
        book = Book(chosen, lines, folder, console)
        book.facts(run, data, schedule, len(rows))
        flows = {entry.label: flow(entry, grid) for entry in lines}
        for entry, why in _unfit(lines, chosen, run, data):
            flows.pop(entry.label).close()
            book.end(entry, Chosen(None, [{"status": "skipped", "why": why}]))
        if retry:
            _forget_bad(folder)
        try:
            with opened(settings.executor) as executor:
                _drive(flows, {entry.label: entry for entry in lines}, executor, book)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {folder} keeps what is done, the same command goes on from there") from None
    if (folder / MATRIX / "matrix.json").is_file():
        book.found["matrix"] = json.loads((folder / MATRIX / "matrix.json").read_text(encoding="utf-8"))
        book.write()
    summary = write_report(folder)
    console.print(terminal(summary, console.width))
    for line in summary.verdict.lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(f"{folder / 'report.html'} has all of it", highlight=False, soft_wrap=True, markup=False)
    return book.found


def with_matrix(path: str, overrides: Sequence[str] = (), console: Console | None = None) -> dict[str, Any]:
    """The matrix of fine-tuning against in-context learning that a comparison's file describes, into `<output>/matrix`;
    a report that is there already gets it too. A file with the keys `matrix` and `output` alone is enough.

    Raises:
        ConfigError, DataError, Interrupted: see `run_matrix`.
    """
    raw = read_yaml(path, "comparison", "matrix and output", overrides)
    if not isinstance(raw.get("output"), str):
        raise ConfigError(f"{path}: output: missing; name a folder")
    if not isinstance(raw.get("matrix"), dict):
        raise ConfigError(f"{path}: no key 'matrix' with settings; docs/icl.md has an example")
    folder, console = Path(raw["output"]).expanduser(), console or Console()
    found = run_matrix(make_matrix(raw["matrix"], path), folder / MATRIX, console)
    if (folder / FOUND).is_file():
        whole = json.loads((folder / FOUND).read_text(encoding="utf-8")) | {"matrix": found}
        write_text(folder / FOUND, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        write_report(folder)
    console.print(f"{folder / MATRIX / 'matrix.html'} has all of it", highlight=False, soft_wrap=True, markup=False)
    return found


def _drive(flows: dict[str, Flow], by_label: dict[str, Entry], executor: Executor, book: Book) -> None:
    """Run every flow to its end; units of earlier entries go first."""
    asked: dict[str, list[Unit]] = {}
    rows: dict[str, dict[int, Row]] = {}
    waiting: list[tuple[str, int]] = []
    lost: dict[str, int] = {}
    order = {label: number for number, label in enumerate(flows)}

    def advance(label: str, answer: list[Row] | None) -> None:
        while True:
            try:
                units = flows[label].send(answer) if answer is not None else next(flows[label])
            except StopIteration as end:
                book.end(by_label[label], end.value)
                return
            asked[label], rows[label] = units, {}
            for number, unit in enumerate(units):
                done = read_row(unit)
                if done is not None:
                    rows[label][number] = done
                else:
                    waiting.append((label, number))
            if len(rows[label]) < len(units):
                waiting.sort(key=lambda each: (order[each[0]], each[1]))
                return
            answer = [rows[label][number] for number in range(len(units))]

    for label in flows:
        advance(label, None)
    going: dict[str, tuple[str, int]] = {}
    while waiting or going:
        while waiting and executor.free:
            label, number = waiting.pop(0)
            unit = asked[label][number]
            going[unit["folder"]] = (label, number)
            executor.start(unit)
        unit, row = executor.next()
        label, number = going.pop(unit["folder"])
        if row["status"] == "lost":
            lost[unit["folder"]] = lost.get(unit["folder"], 0) + 1
            if lost[unit["folder"]] < LOST:
                waiting.insert(0, (label, number))
                book.say(unit, row | {"status": "lost, again"})
                continue
            row = _given_up(unit, row)
        book.say(unit, row)
        rows[label][number] = row
        if len(rows[label]) == len(asked[label]):
            advance(label, [rows[label][each] for each in range(len(asked[label]))])


def _given_up(unit: Unit, row: Row) -> Row:
    """The row of a unit whose process died as often as it may."""
    found = {key: unit[key] for key in ("kind", "label", "lr", "seed", "steps", "folder")}
    found |= {"status": "failed", "why": row["why"]}
    Path(unit["folder"]).mkdir(parents=True, exist_ok=True)
    write_text(Path(unit["folder"]) / ROW, json.dumps(found, indent=2) + "\n")
    return found


# ------------------------------------------------------------------------------------------------- before the runs


def _folder(settings: Compare) -> Path:
    folder = Path(settings.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file; name a folder")
    strange = folder.is_dir() and any(folder.iterdir()) and not (folder / FOUND).is_file()
    if strange and {item.name for item in folder.iterdir()} - {RUNS, LOCK, MATRIX}:
        raise ConfigError(f"output: {folder} holds something else than a comparison; take another folder")
    return folder


def _checked(settings: Compare, lines: Sequence[Entry]) -> tuple[Run, Data, list[Any]]:
    """The run that stands for all, its data, and the rows of the test; what is wrong with them is said once, here."""
    entry = next(entry for entry in lines if entry.kind == "method")
    run = run_of(entry, settings, lr=entry.lrs[0], seed=settings.all_seeds[0], steps=None, output=settings.output)
    base.check(run.precision, run.device)
    tokenizer, config = base.load_tokenizer(run.base), base.load_config(run.base)
    data = read_data(run, tokenizer, config)
    check_data(run, data)
    if len(data.names) > 1:
        raise ConfigError(f"data: its rows name {len(data.names)} adapters; a comparison is of one task")
    columns = {"test_split": settings.test_split, "test_columns": settings.test_columns}
    rows = after.test_rows(run, {"test": settings.test, "test_limit": settings.test_limit, **columns})
    template = template_for(run, tokenizer, config).fit(rows, tokenizer)
    _metrics(settings, rows, run)
    if template.task is not None:
        for row in rows:
            template.task.answer(row)
    return run, data, rows


def _metrics(settings: Compare, rows: Sequence[Any], run: Run) -> tuple[str, ...]:
    """The metrics; the first is the quality."""
    if settings.metrics is not None:
        return tuple(measures.known_metrics(settings.metrics))
    template = template_for(run, base.load_tokenizer(run.base), base.load_config(run.base))
    fit = default_metrics(rows, template)
    first = next(name for name in QUALITY if name in fit)
    return (first, *(name for name in fit if name != first))


def _unfit(lines: Sequence[Entry], settings: Compare, run: Run, data: Data) -> Iterator[tuple[Entry, str]]:
    """Methods that this base cannot take, and why; the others go on."""
    tokenizer, config = base.load_tokenizer(run.base), base.load_config(run.base)
    for entry in lines:
        if entry.kind != "method":
            continue
        asked = run_of(entry, settings, lr=entry.lrs[0], seed=0, steps=None, output=settings.output)
        try:
            check_settings(asked, tokenizer, config)
            check_room(asked, config, tokenizer, data, force=False, console=Console(quiet=True))
        except GraftError as error:
            yield entry, str(error).removesuffix("; or --force tries it all the same")


def _hash(rows: Sequence[Any]) -> str:
    text = json.dumps([[row.index, dict(row.fields)] for row in rows], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _forget_bad(folder: Path) -> None:
    for file in folder.glob(f"{RUNS}/*/*/{ROW}"):
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(file.read_text(encoding="utf-8"))["status"] != "ok":
                shutil.rmtree(file.parent)
