"""Annotated rows to prompts and answers: each row through one or several templates."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from graft.data.read import near, records
from graft.data.recipe import AgainstSettings, PromptTemplate, Recipe, SourceSettings
from graft.data.rows import ALIASES, ROLES, Message, Row, adapter_name, load_rows
from graft.data.tasks import TASKS, Task, columns_of, fill, task_for
from graft.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Item:
    """A row as one template renders it."""

    source: str
    row: Row
    template: int | None = None
    """The template's number in its source, from 1; None: the row has its own prompt."""
    prompt: str = ""
    completion: str | None = None
    """None: a model behind an endpoint is asked."""
    messages: tuple[Message, ...] = ()
    """The conversation, for a row that is one and for `form: messages`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Of a generated answer: model, endpoint, settings, time."""

    def record(self, form: str) -> dict[str, Any]:
        """The line that is written; `form` is prompt or messages."""
        said: dict[str, Any] = {"prompt": self.prompt, "completion": self.completion}
        if form == "messages":
            turns = (*self.messages, Message("assistant", self.completion or ""))
            said = {"messages": [turn._asdict() for turn in turns]}
        if self.row.references and self.completion == self.row.completion:
            said["references"] = list(self.row.references)
        if self.row.adapter is not None:
            said["adapter"] = self.row.adapter
        return said | {"source": self.source, "row": self.row.index, "template": self.template} | dict(self.provenance)


def question(row: Row) -> str:
    """What a row asks, in words alone, so that rows of different forms compare."""
    if row.form == "chat":
        return "\n".join(turn.content for turn in row.messages[:-1] if turn.role != "system")
    return row.question.replace("\x1f", "\n")


class Manner(NamedTuple):
    """What decides, beside a row's question and answer, what is asked of it."""

    how: str = ""
    """The templates, the words for labels, the teacher's prompt, the system message and the adapter."""
    shown: tuple[str, ...] = ()
    """The columns that the templates show."""


def manners(source: SourceSettings, rows: Sequence[Row], recipe: Recipe) -> list[Manner]:
    """How each row of a source is asked."""
    if not rows:
        return []
    texts = _texts(templates_of(source, rows))
    words = dict(_words(source, rows).verbalizer)
    teacher = recipe.generate.prompt if recipe.generate is not None and source.answer == "endpoint" else None
    names = _columns([*texts, teacher or ""])
    found = []
    for row in rows:
        system: list[str | None] = [turn.content for turn in row.messages if turn.role == "system"]
        shown = tuple(str(row.fields.get(name, "")) for name in names)
        how = [texts, words, names, teacher, system or [source.system], row.adapter]
        found.append(Manner(json.dumps(how), shown))
    return found


def compared(source: SourceSettings, row: Row) -> list[str]:
    """The texts of a row that must not stand in a test set: its question, and what templates make its answer."""
    if any(isinstance(each, PromptTemplate) for each in source.templates or ()) and row.completion:
        return [question(row), *row.completion.split("\x1f")]
    return [question(row)]


def read_source(source: SourceSettings) -> list[Row]:
    """The rows of a source, with or without answers as its settings ask.

    Raises:
        DataError: no such file, no rows, a row without what a template or the training needs.
    """
    free = source.templates is not None and all(isinstance(each, PromptTemplate) for each in source.templates)
    if source.answer == "data" and (not free or source.verbalizer):
        return load_rows(source.data, split=source.split, columns=source.columns, limit=source.limit)
    rows = []
    for number, record in records(source.data, source.split):
        rows.append(_free_row(source, number, _fields(record, source.columns, f"{source.data} row {number}")))
        if len(rows) == source.limit:
            break
    if not rows:
        raise DataError(f"{source.data}: no rows; give a file with at least one row")
    return rows


def read_questions(against: AgainstSettings) -> list[str]:
    """The questions of a test set, read as a source's; its rows may have no answers."""
    try:
        return [question(row) for row in load_rows(against.data, split=against.split, columns=against.columns)]
    except DataError:  # which the next lines raise as well, unless answers are all that it lacks
        found = []
    for number, record in records(against.data, against.split):
        where = f"{against.data} row {number}"
        fields = _fields(record, against.columns, where)
        if isinstance(fields.get("messages"), list):
            turns = [turn for turn in fields["messages"] if isinstance(turn, dict)]
            if turns and _role(turns[-1]) == "assistant":
                turns = turns[:-1]
            found.append("\n".join(str(t.get("content", t.get("value"))) for t in turns if _role(t) != "system"))
        else:
            asked, context = _asked(fields, against.columns, where, "against columns")
            found.append(f"{asked}\n{context}" if context else asked)
    if not found:
        raise DataError(f"{against.data}: no rows; give a file with at least one row")
    return found


def templates_of(source: SourceSettings, rows: Sequence[Row]) -> list[str | PromptTemplate]:
    """The templates that the source's rows go through; none if they have prompts of their own."""
    if source.templates is not None:
        return list(source.templates)
    if source.task is not None:
        return list(TASKS[source.task].templates)
    return list(task_for(rows).templates) if rows and rows[0].form == "label" else []


def render(source: SourceSettings, rows: Sequence[Row], recipe: Recipe, every: bool = False) -> list[Item]:
    """The rows' items: through `per_row` templates each, drawn by seed and row; with `every`, through all."""
    templates = templates_of(source, rows)
    _check_templates(source, templates, rows)
    task = _words(source, rows)
    items = []
    for row in rows:
        for number in _chosen(source, len(templates), row, recipe.seed, every):
            item = _item(source, row, task, None if number is None else templates[number], number)
            if source.self_instruct is not None:
                item = dataclasses.replace(item, provenance={"seeds": row.fields["seeds"]})
            items.append(_with_messages(item, source.system) if recipe.form == "messages" else _plain(item))
    return items


def _chosen(source: SourceSettings, count: int, row: Row, seed: int, every: bool) -> list[int | None]:
    if not count:
        return [None]
    if every or source.per_row == "all":
        return list(range(count))
    drawn = random.Random(f"template {seed} {source.called} {row.index}").sample(range(count), source.per_row)
    return [*sorted(drawn)]


def _check_templates(source: SourceSettings, templates: Sequence[Any], rows: Sequence[Row]) -> None:
    where = f"sources {source.called}"
    if templates and rows[0].form == "chat":
        raise ConfigError(f"{where}: templates do not apply to conversations; leave task and templates out")
    if not templates and rows[0].form == "text":
        raise DataError(f"{where}: plain text asks nothing; give templates with prompt and completion")
    if isinstance(source.per_row, int) and source.per_row > max(1, len(templates)):
        raise ConfigError(f"{where}: per_row {source.per_row}, but there are {len(templates)} templates; use all")
    prompts = tuple(each if isinstance(each, str) else each.prompt for each in templates)
    if prompts and Task(templates=prompts).slots:
        raise ConfigError(f"{where}: pseudo-tokens ({{slots:n}}) belong into the run's data.template, not into rows")


def _words(source: SourceSettings, rows: Sequence[Row]) -> Task:
    """The task whose words answer labels."""
    words = {str(label): word for label, word in (source.verbalizer or {}).items()}
    if not words and source.task is not None:
        words = dict(TASKS[source.task].verbalizer)
    if not words and source.templates is None and rows[0].form == "label":
        words = dict(task_for(rows).verbalizer)
    return Task(templates=("-",), verbalizer=words)


def _item(
    source: SourceSettings, row: Row, task: Task, template: str | PromptTemplate | None, number: int | None
) -> Item:
    shared: dict[str, Any] = {"source": source.called, "row": row, "template": None if number is None else number + 1}
    if template is None:
        if row.form == "chat":
            return Item(**shared, messages=row.messages[:-1], completion=row.completion)
        prompt = f"{row.prompt}\n\n{row.context}" if row.context else row.prompt
        return Item(**shared, prompt=prompt, completion=row.completion or None)
    if row.label is not None and "answer" not in row.fields:
        row = dataclasses.replace(row, fields={**row.fields, "answer": task.answer(row)})
    if isinstance(template, PromptTemplate):
        prompt, said = fill(template.prompt, row), fill(template.completion, row)
        if not said.strip():
            raise DataError(f"{row.where}: the template's completion {template.completion!r} is empty; remove the row")
        return Item(**shared, prompt=prompt, completion=said)
    completion = None if source.answer == "endpoint" else task.answer(row)
    return Item(**shared, prompt=fill(template, row), completion=completion)


def _with_messages(item: Item, system: str | None) -> Item:
    turns = item.messages or (Message("user", item.prompt),)
    if system is not None and turns[0].role != "system":
        turns = (Message("system", system), *turns)
    return dataclasses.replace(item, messages=turns)


def _plain(item: Item) -> Item:
    """A conversation of one question and one answer as prompt and completion."""
    if not item.messages:
        return item
    if [turn.role for turn in item.messages] != ["user"]:
        raise ConfigError(f"{item.row.where}: more than one question and one answer; set 'form: messages'")
    return dataclasses.replace(item, prompt=item.messages[0].content, messages=())


def _fields(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The columns under their own names and ours."""
    fields = dict(record)
    for ours, aliases in ALIASES.items():
        there = [alias for alias in aliases if alias in record]
        if len(there) == 1:
            fields.setdefault(ours, record[there[0]])
    for ours, column in columns.items():
        if column not in record:
            there = list(map(str, record))
            raise DataError(
                f"{where}: no column '{column}' (columns.{ours}){near(column, there)}; there are: {', '.join(there)}"
            )
        fields[ours] = record[column]
    return fields


def _free_row(source: SourceSettings, number: int, fields: dict[str, Any]) -> Row:
    """A row of any columns: its question is what the templates show of it, its answer what the completions show."""
    row = Row(form="prompt", index=number, source=source.data, fields=fields)
    row = dataclasses.replace(row, adapter=adapter_name(fields.get("adapter"), None, row.where))
    templates = source.templates or (list(TASKS[source.task].templates) if source.task else [])
    if not templates:
        asked, context = _asked(fields, source.columns, row.where, f"sources {source.called} columns")
        return dataclasses.replace(row, prompt=asked, context=context)
    texts = _texts(templates)
    for text in texts:
        fill(text, row)
    prompts = [each if isinstance(each, str) else each.prompt for each in templates]
    answers = [fill(each.completion, row) for each in templates if isinstance(each, PromptTemplate)]
    shown, prompted = ({str(fields[name]) for name in _columns(each)} for each in (texts, prompts))
    asked = _known(shown, prompted, fields)
    asked = asked or "\n".join(str(fields[name]) for name in _columns(prompts))
    return dataclasses.replace(row, prompt=asked, completion="\x1f".join(dict.fromkeys(answers)))


def _texts(templates: Sequence[str | PromptTemplate]) -> list[str]:
    """The prompts and completions of templates."""
    pairs = ([each] if isinstance(each, str) else [each.prompt, each.completion] for each in templates)
    return [text for pair in pairs for text in pair]


def _columns(texts: Sequence[str]) -> list[str]:
    return sorted({name for text in texts for name in columns_of(text)})


QUESTIONS = {"prompt": None, "instruction": "context", "premise": "hypothesis", "text": None}
"""Columns that ask, the first that is there, and what each has beside it: as `load_rows` reads them."""


def _known(shown: set[str], prompted: set[str], fields: Mapping[str, Any]) -> str:
    """The question of a test set's kind, as far as templates show it: of a text and its aspect only the text.

    An instruction with anything else beside it may be the same for all rows, and is then no question by itself.

    Args:
        shown: values of the columns that the templates show.
        prompted: of those that their prompts show.
    """
    for name, beside in QUESTIONS.items():
        if fields.get(name) and str(fields[name]) in shown:
            parts = [str(fields[each]) for each in (name, beside) if each and fields.get(each)]
            asked = [part for part in parts if part in shown]
            if name in ("premise", "text") or prompted <= set(asked):
                return "\n".join(asked)
    return ""


def _asked(fields: Mapping[str, Any], columns: Mapping[str, str], where: str, option: str) -> tuple[str, str]:
    """(the question, its context) of a record without an answer."""
    for name in sorted(QUESTIONS, key=lambda name: name not in columns):
        if isinstance(fields.get(name), str):
            beside = str(fields.get(QUESTIONS[name] or "") or "")
            return (f"{fields[name]}\n{beside}", "") if name == "premise" and beside else (fields[name], beside)
    there = ", ".join(map(str, fields)) or "none"
    raise DataError(f"{where}: no prompt, instruction or text in columns {there}; name one with {option}")


def _role(turn: Mapping[str, Any]) -> Any:
    """Who speaks, in OpenAI's names."""
    role = turn.get("role", turn.get("from"))
    return ROLES.get(role, role) if isinstance(role, str) else role
