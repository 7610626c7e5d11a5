"""A recipe to a folder of instruction data.

| file | holds |
|---|---|
| `train.jsonl`, `eval.jsonl` | the rows, which `graft train` reads as they are |
| `report.json` | how many rows came from where, what was left out and why; the folder is finished when it is there |
| `recipe.yaml`, `inputs.json` | the settings, and the hashes of the data that they name |
| `journal.jsonl` | every answer of an endpoint as it came |
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from graft.data.generate import Generated, Progress, asked_of, generate
from graft.data.items import Item, read_questions, read_source, render, templates_of
from graft.data.journal import Journal
from graft.data.mixing import Taken, contaminated, mix, repeated, split
from graft.data.recipe import OPERATIONAL, AgainstSettings, Recipe, make_recipe
from graft.data.rows import Row
from graft.data.self_instruct import invent, request_text
from graft.disk import LOCK, locked, write_text
from graft.errors import ConfigError, DataError
from graft.settings import flat

INPUTS, SETTINGS, REPORT, JOURNAL = "inputs.json", "recipe.yaml", "report.json", "journal.jsonl"
EXAMPLES = 10


@dataclass(frozen=True)
class Made:
    """What a recipe became."""

    folder: Path
    report: dict[str, Any]
    finished_before: bool
    """It was there already, and nothing was done."""

    def __str__(self) -> str:
        return "\n".join(_lines(self))


@dataclass(frozen=True)
class Pool:
    """What is left of the sources before the mix."""

    rows: dict[str, list[Row]]
    items: dict[str, list[Item]]
    duplicates: list[tuple[str, str]]
    """(a row that was left out, the row that it repeats)."""
    against: dict[str, Counter[str]]
    """For each test set, how many rows of each source were left out."""


def make(
    recipe: Recipe,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Made:
    """Make a recipe's data. Called again it goes on where it was stopped, or says that it is finished.

    Args:
        recipe: see `load_recipe`.
        fresh: start over in a new folder beside one that is there.
        progress: told what is done, how many of how many.
        tell: given a line for what the user should know while it runs.

    Raises:
        ConfigError: the folder was begun with another recipe or other data, or a setting makes no sense.
        DataError: a source cannot be read, or an endpoint does not answer.
    """
    folder = _place(recipe, fresh)
    sources = {source.called: read_source(source) for source in recipe.sources}
    questions = {_against(each).data: read_questions(_against(each)) for each in recipe.against}
    inputs = _hashes(recipe, sources, questions)
    _check_inputs(folder, inputs)
    if (folder / REPORT).is_file():
        return Made(folder, json.loads((folder / REPORT).read_text(encoding="utf-8")), True)
    if not (folder / SETTINGS).is_file():
        _check_templates(recipe, sources)
    with locked(folder):
        write_text(folder / INPUTS, _json(inputs))
        write_text(folder / SETTINGS, _yaml(recipe))
        with _journal(recipe, folder, tell or (lambda line: None)) as journal:
            sources, left_out = _invented(recipe, sources, journal, progress)
            pool = _pool(recipe, sources, questions)
            mixed, taken = mix(pool.items, recipe)
            made = Generated(mixed, 0)
            if recipe.generate is not None and journal is not None:
                made = generate(mixed, recipe.generate, journal, progress=progress)
                made.dropped.update(left_out)
        if not made.items:
            raise DataError("no rows are left to write: all answers were left out; journal.jsonl has them")
        train, evaluation, groups = split(made.items, recipe.split, recipe.near, recipe.seed)
        report = _report(recipe, pool, taken, made, (train, evaluation, groups), inputs)
        _write(folder / "train.jsonl", train, recipe.form)
        if recipe.split.eval:
            _write(folder / "eval.jsonl", evaluation, recipe.form)
        write_text(folder / REPORT, _json(report))
    return Made(folder, report, False)


def preview(recipe: Recipe, count: int) -> str:
    """The first `count` rows of each source through each of its templates; nothing is written or asked."""
    parts = []
    for source in recipe.sources:
        rows = read_source(source.model_copy(update={"limit": min(count, source.limit or count)}))
        templates = templates_of(source, rows)
        if source.self_instruct is not None and recipe.generate is not None:
            parts += [f"{source.called}: {source.data}, seeds of new instructions, which it is asked for so", ""]
            parts += [f"  {line}" for line in request_text(rows, recipe.generate.api).splitlines()]
            continue
        parts.append(f"{source.called}: {source.data}, {len(templates) or 'no'} templates")
        for item in render(source, rows, recipe, every=True):
            through = f", template {item.template}" if item.template is not None else ""
            parts.append(f"\n- row {item.row.index}{through}")
            parts += [f"  {turn.role}: {turn.content}" for turn in item.messages]
            parts += [] if item.messages else [f"  prompt: {item.prompt}"]
            if item.completion is not None:
                parts.append(f"  answer: {item.completion}")
            elif recipe.generate is not None:
                parts.append(f"  {recipe.generate.model} is asked: {asked_of(item, recipe.generate)}")
        parts.append("")
    return "\n".join(parts).rstrip()


def _place(recipe: Recipe, fresh: bool) -> Path:
    """A new folder, or one that was begun with the same recipe."""
    folder = first = Path(recipe.output).expanduser()
    number = 2
    while fresh and folder.exists():
        folder, number = first.with_name(f"{first.name}-{number}"), number + 1
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file; name a folder")
    settings = folder / SETTINGS
    if not settings.is_file():
        if folder.is_dir() and any(item.name not in (INPUTS, LOCK) for item in folder.iterdir()):
            raise ConfigError(f"output: {folder} holds something else than a recipe's data; take another folder")
        return folder
    if not (folder / INPUTS).is_file():
        raise ConfigError(f"output: {settings} was not written by Graft and would be lost; take another folder")
    try:
        old = make_recipe(yaml.safe_load(settings.read_text(encoding="utf-8")), str(settings))
    except (ConfigError, yaml.YAMLError, OSError) as error:
        raise ConfigError(f"output: the settings in {settings} cannot be read ({error}); use --fresh") from None
    before, now = flat(old.model_dump(mode="json")), flat(recipe.model_dump(mode="json"))
    for key in dict.fromkeys([*before, *now]):
        free = key == "output" or (key.startswith("generate.") and key.split(".")[1] in OPERATIONAL)
        if not free and before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: {folder} was begun with {before.get(key)!r}, not {now.get(key)!r}; put it back, take another "
                "output, or use --fresh"
            )
    return folder


def _hashes(recipe: Recipe, sources: dict[str, list[Row]], questions: dict[str, list[str]]) -> dict[str, str]:
    """Of the rows of each source and test set, by their key in the recipe."""
    found = {}
    for number, source in enumerate(recipe.sources):
        found[f"sources.{number}.data"] = _sha(
            [row.index, dict(row.fields), row.prompt, row.completion] for row in sources[source.called]
        )
    for number, each in enumerate(recipe.against):
        found[f"against.{number}"] = _sha(questions[_against(each).data])
    return found


def _sha(rows: Any) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    if (folder / SETTINGS).is_file():
        before = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
        for key, value in inputs.items():
            if before.get(key) != value:
                raise ConfigError(f"{key}: the content changed since {folder} was begun; put it back or use --fresh")


def _pool(recipe: Recipe, sources: dict[str, list[Row]], questions: dict[str, list[str]]) -> Pool:
    """The rows without duplicates and test questions, rendered."""
    flat_rows = [(name, row) for name, rows in sources.items() for row in rows]
    rows = [row for _, row in flat_rows]
    double = repeated(rows, recipe.deduplicate, recipe.near)
    gone = set(double)
    against: dict[str, Counter[str]] = {}
    for data, asked in questions.items():
        hit = contaminated(rows, asked, recipe.near) - gone
        against[data] = Counter(flat_rows[number][0] for number in hit)
        gone |= hit
    left: dict[str, list[Row]] = {name: [] for name in sources}
    for number, (name, row) in enumerate(flat_rows):
        if number not in gone:
            left[name].append(row)
    items = {source.called: _rendered(recipe, source.called, left[source.called]) for source in recipe.sources}
    pairs = [tuple(f"{flat_rows[n][0]} row {rows[n].index}" for n in pair) for pair in double.items()]
    return Pool(sources, items, [(one, other) for one, other in pairs], against)


def _rendered(recipe: Recipe, name: str, rows: list[Row]) -> list[Item]:
    source = next(each for each in recipe.sources if each.called == name)
    return render(source, rows, recipe) if rows else []


@contextlib.contextmanager
def _journal(recipe: Recipe, folder: Path, tell: Callable[[str], None]) -> Iterator[Journal | None]:
    """The folder's journal, for a recipe that asks an endpoint."""
    if recipe.generate is None:
        yield None
        return
    journal = Journal(folder / JOURNAL)
    try:
        if journal.repaired:
            tell(f"{journal.path}: the last line was cut off by a kill and is removed; its prompt is asked again")
        if journal.answers:
            tell(f"{journal.path}: {len(journal.answers)} answers are there; only what is missing is asked")
        yield journal
    finally:
        journal.close()


def _check_templates(recipe: Recipe, sources: dict[str, list[Row]]) -> None:
    """Render each source's first row, so that a wrong template leaves no folder behind."""
    for source in recipe.sources:
        if source.self_instruct is None:
            for item in render(source, sources[source.called][:1], recipe, every=True):
                if item.completion is None and recipe.generate is not None:
                    asked_of(item, recipe.generate)


def _invented(
    recipe: Recipe, sources: dict[str, list[Row]], journal: Journal | None, progress: Progress | None
) -> tuple[dict[str, list[Row]], Counter[str]]:
    """The sources, seeds replaced by the new instructions of a model; and what was left out of those."""
    found, left_out = dict(sources), Counter[str]()
    for source in recipe.sources:
        if source.self_instruct is not None and journal is not None:
            seeds = sources[source.called]
            rows, dropped = invent(source, source.self_instruct, seeds, recipe, journal, progress)
            found[source.called] = rows
            left_out.update(dropped)
    return found, left_out


def _report(
    recipe: Recipe,
    pool: Pool,
    taken: dict[str, Taken],
    made: Generated,
    parts: tuple[list[Item], list[Item], int],
    inputs: dict[str, str],
) -> dict[str, Any]:
    train, evaluation, groups = parts
    count = Counter(item.source for item in [*train, *evaluation]), len(train) + len(evaluation)
    sources = []
    for source in recipe.sources:
        name, rows = source.called, pool.rows[source.called]
        templates: list[Any] = list(enumerate(templates_of(source, rows), start=1)) or [(None, None)]
        sources.append(
            {
                "name": name,
                "data": source.data,
                "rows": len(rows),
                "duplicates": sum(one.startswith(f"{name} row ") for one, _ in pool.duplicates),
                "against": sum(each[name] for each in pool.against.values()),
                "rendered": taken[name].there,
                "taken": taken[name].taken,
                "share_asked": taken[name].asked,
                "share": count[0][name] / count[1],
                "train": sum(item.source == name for item in train),
                "eval": sum(item.source == name for item in evaluation),
                "templates": [
                    {
                        "number": number,
                        "template": text if isinstance(text, str | None) else text.model_dump(),
                        "train": sum(item.source == name and item.template == number for item in train),
                        "eval": sum(item.source == name and item.template == number for item in evaluation),
                    }
                    for number, text in templates
                ],
            }
        )
    return {
        "train": len(train),
        "eval": len(evaluation),
        "sources": sources,
        "duplicates": {
            "kind": recipe.deduplicate,
            "dropped": len(pool.duplicates),
            "first": [list(pair) for pair in pool.duplicates[:EXAMPLES]],
        },
        "against": {data: sum(each.values()) for data, each in pool.against.items()},
        "split": {"groups": groups, "near": recipe.near},
        "characters": {"train": _lengths(train), "eval": _lengths(evaluation)},
        "generate": made.to_dict() if recipe.generate is not None else None,
        "sha256": inputs,
    }


def _lengths(items: Sequence[Item]) -> dict[str, Any]:
    """Smallest, median, mean and largest number of characters."""
    if not items:
        return {}
    found = {}
    for part in ("prompt", "completion"):
        sizes = [
            len(item.completion or "")
            if part == "completion"
            else sum(len(turn.content) for turn in item.messages) or len(item.prompt)
            for item in items
        ]
        found[part] = {
            "min": min(sizes),
            "median": statistics.median(sizes),
            "mean": round(statistics.fmean(sizes), 1),
            "max": max(sizes),
        }
    return found


def _lines(made: Made) -> list[str]:
    """The report in words."""
    report = made.report
    lines = [f"{made.folder}: {'finished before; ' if made.finished_before else ''}{report['train']} rows for training"]
    lines[0] += f", {report['eval']} for evaluation" if report["eval"] else ""
    for source in report["sources"]:
        given = source["train"] + source["eval"]
        asked = source["share_asked"]
        wanted = "" if asked is None else f", asked {asked:.1%}"
        gone = f"{source['duplicates']} duplicates" if source["duplicates"] else ""
        leaks = f"{source['against']} test questions" if source["against"] else ""
        less = ", ".join(filter(None, [gone, leaks]))
        lines.append(
            f"- {source['name']}: {source['rows']} rows{f' less {less}' if less else ''}, "
            f"{source['rendered']} rendered, {given} written ({source['share']:.1%} of all{wanted})"
        )
    generated = report["generate"]
    if generated is not None:
        lines.append(f"- answers: {generated['answers']} of {generated['requests']} prompts")
        lines[-1] += f", cost {generated['cost']:g}" if generated["cost"] else ""
        lines += [f"  left out: {count} {why}" for why, count in generated["dropped"].items()]
        lines += [f"  no answer: {where} ({why})" for where, why in list(generated["failed"].items())[:EXAMPLES]]
    return lines


def _against(each: str | AgainstSettings) -> AgainstSettings:
    return AgainstSettings(data=each) if isinstance(each, str) else each


def _write(file: Path, items: Sequence[Item], form: str) -> None:
    write_text(file, "".join(json.dumps(item.record(form), ensure_ascii=False) + "\n" for item in items))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
