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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from graft.data.generate import Generated, Progress, asked_of, generate
from graft.data.items import Item, read_questions, read_source, render, templates_of
from graft.data.journal import Journal
from graft.data.make_report import in_words, made_report
from graft.data.mixing import Taken, mix, split
from graft.data.pool import Pool, pooled
from graft.data.recipe import FILTERS, OPERATIONAL, AgainstSettings, Recipe, SplitSettings, make_recipe
from graft.data.rows import Row
from graft.data.self_instruct import invent, request_text
from graft.disk import LOCK, locked, write_text
from graft.errors import ConfigError, DataError
from graft.settings import flat

INPUTS, SETTINGS, REPORT, JOURNAL = "inputs.json", "recipe.yaml", "report.json", "journal.jsonl"


@dataclass(frozen=True)
class Made:
    """What a recipe became."""

    folder: Path
    report: dict[str, Any]
    finished_before: bool
    """It was there already, and nothing was done."""

    def __str__(self) -> str:
        return "\n".join(in_words(self.report, self.folder, self.finished_before))


class Mixed(NamedTuple):
    """The mix, and what it was taken from."""

    pool: Pool
    items: list[Item]
    taken: dict[str, Taken]
    parts: tuple[list[Item], list[Item], int] | None = None
    """Training, evaluation and the number of groups, as far as they are known before any answer."""


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
    questions = [read_questions(_against(each)) for each in recipe.against]
    inputs = _hashes(recipe, sources, questions)
    _check_inputs(folder, inputs)
    if (folder / REPORT).is_file():
        return Made(folder, json.loads((folder / REPORT).read_text(encoding="utf-8")), True)
    planned = _planned(recipe, sources, questions)
    with locked(folder):
        write_text(folder / INPUTS, _json(inputs))
        write_text(folder / SETTINGS, _yaml(recipe))
        with _journal(recipe, folder, tell or (lambda line: None)) as journal:
            sources, left_out = _invented(recipe, sources, journal, progress)
            mixed = planned or _mixed(recipe, sources, questions)
            made, parts = Generated(mixed.items, 0), mixed.parts
            if recipe.generate is not None and journal is not None:
                parts, made = None, generate(mixed.items, recipe.generate, journal, progress=progress)
                made.dropped.update(left_out)
        if not made.items:
            lost = made.dropped + Counter(f"without an answer ({why})" for why in made.failed.values())
            why = ", ".join(f"{count} {each}" for each, count in lost.most_common())
            raise DataError(
                f"no rows are left to write: {why}; journal.jsonl has the answers, and keep_cut, refusals and "
                "duplicates of generate may be changed"
            )
        train, evaluation, groups = parts or split(made.items, recipe.split, recipe.near, recipe.seed)
        report = made_report(recipe, mixed.pool, mixed.taken, made, (train, evaluation, groups), inputs)
        _write(folder / "train.jsonl", train, recipe.form)
        if recipe.split.eval:
            _write(folder / "eval.jsonl", evaluation, recipe.form)
        else:  # an earlier start's, whose rows are for training now
            (folder / "eval.jsonl").unlink(missing_ok=True)
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
    """A new folder, or one that was begun with the same recipe; how it is split may change until it is finished."""
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
    free = ["output", *(f"generate.{name}" for name in OPERATIONAL)]
    if not (folder / REPORT).is_file():
        free += ["split", *(f"generate.{name}" for name in FILTERS)]
    for key in dict.fromkeys([*before, *now]):
        if not any(f"{key}.".startswith(f"{each}.") for each in free) and before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: {folder} was begun with {before.get(key)!r}, not {now.get(key)!r}; put it back, take another "
                "output, or use --fresh"
            )
    return folder


def _hashes(recipe: Recipe, sources: dict[str, list[Row]], questions: list[list[str]]) -> dict[str, str]:
    """Of the rows of each source and test set, by their key in the recipe."""
    found = {}
    for number, source in enumerate(recipe.sources):
        found[f"sources.{number}.data"] = _sha(
            [row.index, dict(row.fields), row.prompt, row.completion] for row in sources[source.called]
        )
    for number, asked in enumerate(questions):
        found[f"against.{number}"] = _sha(asked)
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


def _mixed(recipe: Recipe, sources: Mapping[str, list[Row]], questions: list[list[str]]) -> Mixed:
    pool = pooled(recipe, sources, questions)
    return Mixed(pool, *mix(pool.items, recipe))


def _planned(recipe: Recipe, sources: dict[str, list[Row]], questions: list[list[str]]) -> Mixed | None:
    """The mix before any answer, refused if it cannot be asked for or split, so that no answer is paid for in vain.

    None where instructions are still to be invented: then one for each such source is tried in their place.
    """
    invents = [source.called for source in recipe.sources if source.self_instruct is not None]
    known = sources | {name: [_stand_in(name)] for name in invents}
    for source in recipe.sources:
        _check(render(source, known[source.called][:1], recipe, every=True), recipe)
    if invents:
        items = [item for pool in pooled(recipe, known, questions).items.values() for item in pool]
        _check(items, recipe)
        split(items, SplitSettings(group=recipe.split.group), None, recipe.seed)
        return None
    found = _mixed(recipe, sources, questions)
    _check(found.items, recipe)
    answers = recipe.generate.n if recipe.generate is not None else 1
    answered = [item for item in found.items for _ in range(answers if item.completion is None else 1)]
    return found._replace(parts=split(answered, recipe.split, recipe.near, recipe.seed))


def _stand_in(name: str) -> Row:
    """For an instruction that is not yet invented, with the columns that it will have."""
    fields = {"prompt": "-", "seeds": [1]}
    return Row(form="prompt", index=1, source=f"new instructions of {name}", prompt="-", fields=fields)


def _check(items: Sequence[Item], recipe: Recipe) -> None:
    for item in items:
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


def _against(each: str | AgainstSettings) -> AgainstSettings:
    return AgainstSettings(data=each) if isinstance(each, str) else each


def _write(file: Path, items: Sequence[Item], form: str) -> None:
    write_text(file, "".join(json.dumps(item.record(form), ensure_ascii=False) + "\n" for item in items))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
