"""One comparison from its settings to the report: `compare(load_compare("compare.yaml"))`. The same call goes on.

<output>/compare.json   what was found, rewritten as runs end    <output>/report.html, .csv, .png, ...
<output>/runs/<label>/<settings>/row.json                        one for each run; see `grid`
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from graft.compare.before import checked, facts_of, fits, metrics_of
from graft.compare.book import FOUND, Book
from graft.compare.executors import LOST, Executor, opened
from graft.compare.grid import ROW, RUNS, Entry, Grid, Row, Unit, entries, read_row
from graft.compare.matrix import run_matrix
from graft.compare.matrix_settings import make_matrix
from graft.compare.report import write_report
from graft.compare.search import Chosen, Flow, flow
from graft.compare.settings import Compare, Icl
from graft.compare.table import terminal
from graft.disk import LOCK, PARTIAL, locked, write_text
from graft.errors import ConfigError
from graft.settings import read_yaml
from graft.train.folder import undone
from graft.train.run import Interrupted
from graft.train.setup import schedule_of

MATRIX = "matrix"
"""Of a comparison's folder: what `graft compare --matrix` wrote."""


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
    run, data, rows = checked(settings)
    chosen = settings.model_copy(update={"metrics": metrics_of(settings, rows, data.template)})
    steps, unfit = fits(lines, chosen, data, folder)
    grid = Grid(chosen, facts_of(settings, run, data, rows), steps)
    grid.random_head = data.template.mode == "classification" and _icl(settings).template is None
    with undone(folder), locked(folder):
        book = Book(chosen, lines, folder, console)
        book.facts(run, data, schedule_of(run, data), len(rows))
        flows = {entry.label: flow(entry, grid) for entry in lines if entry.label not in unfit}
        for entry in lines:
            if entry.label in unfit:
                book.end(entry, Chosen(None, [{"status": "skipped", "why": unfit[entry.label]}]))
        if retry:
            _forget_bad(folder)
        try:
            with opened(settings.executor, settings.device) as executor:
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
    if strange and {item.name for item in folder.iterdir()} - {RUNS, LOCK, MATRIX, FOUND + PARTIAL}:
        raise ConfigError(f"output: {folder} holds something else than a comparison; take another folder")
    return folder


def _icl(settings: Compare) -> Icl:
    return settings.baselines.icl if isinstance(settings.baselines.icl, Icl) else Icl()


def _forget_bad(folder: Path) -> None:
    for file in folder.glob(f"{RUNS}/*/*/{ROW}"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # `read_row` says it
            if json.loads(file.read_text(encoding="utf-8"))["status"] != "ok":
                shutil.rmtree(file.parent)
