"""Records to rows: one frozen `Row` whatever the file's form, found by its column names.

| form | columns (others that are understood) |
|---|---|
| chat | `messages` (`conversations`): OpenAI's role and content, or ShareGPT's from and value |
| prompt | `prompt` and an answer |
| instruction | `instruction`, optional `context` (`input`), and an answer |
| label | `text` (`sentence`), or `premise` and `hypothesis` (`sentence1`, `sentence2`); and `label`, int or str |
| text | `text` (`sentence`) |

An answer is `completion` (`output`, `response`) or `references`, a list of right answers: evaluation scores against all
of them, training takes the first. Any form may have an `adapter` column. `columns` maps our name to the file's name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from graft.data.read import Record, near, records
from graft.errors import ConfigError, DataError

ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt",),
    "instruction": ("instruction",),
    "context": ("context", "input"),
    "completion": ("completion", "output", "response"),
    "references": ("references",),
    "text": ("text", "sentence"),
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "sentence2"),
    "label": ("label",),
    "adapter": ("adapter",),
}
LEADS = ("messages", "prompt", "instruction", "premise", "text")  # the column that decides a form, first found first
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
KNOWN_ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of data. `form` says which fields hold it: chat, prompt, instruction, label or text."""

    form: str
    index: int
    """The row's number in its source, from 1; in JSONL the line."""
    source: str
    prompt: str = ""
    """The prompt or the instruction."""
    context: str = ""
    completion: str = ""
    """The answer that is trained: the completion, the first reference, or the last assistant turn."""
    references: tuple[str, ...] = ()
    """Every right answer, when the source has several."""
    messages: tuple[Message, ...] = ()
    text: str = ""
    pair: str | None = None
    """The second text of a pair (the hypothesis)."""
    label: int | str | None = None
    adapter: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    """The columns as they were, under their own names and ours: what templates may use."""

    @property
    def where(self) -> str:
        """The row's place, for errors."""
        return f"{self.source} row {self.index}"

    @property
    def question(self) -> str:
        """What is asked, before any template: equal for two rows that ask the same."""
        if self.form == "chat":
            return json.dumps(self.messages[:-1], ensure_ascii=False)
        if self.form in ("label", "text"):
            return self.text if self.pair is None else f"{self.text}\x1f{self.pair}"
        return f"{self.prompt}\x1f{self.context}" if self.context else self.prompt

    @property
    def answer(self) -> str:
        """What is answered, before any template."""
        return str(self.label) if self.form == "label" else self.completion


def load_rows(
    source: str,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    adapter: str | None = None,
) -> list[Row]:
    """The rows of a file, folder or hub name (see `read.records`), all of one form.

    Args:
        source: a path, or a hub name such as "nyu-mll/glue:sst2".
        split: of a hub data set; files have none.
        columns: our name to the file's name, where they differ: {"prompt": "meaning_representation"}.
        limit: take only the first so many rows.
        adapter: the adapter of every row that does not name its own.

    Raises:
        DataError: missing or empty source, a missing column, a row without an answer or label, rows of different forms.
        ConfigError: `columns` or `limit` make no sense.
    """
    source, columns = str(source), dict(columns or {})
    _check_settings(columns, limit)
    rows: list[Row] = []
    first: _Layout | None = None
    seen: dict[tuple[str, ...], _Layout] = {}
    for number, record in records(source, split):
        keys = tuple(record)
        if keys not in seen:
            seen[keys] = _layout(record, columns, first, f"{source} row {number}")
        first = first or seen[keys]
        rows.append(_row(record, seen[keys], source, number, adapter))
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{source}: no rows; give a file with at least one row")
    return _integer_labels(rows)


def hold_out(rows: Sequence[Row], share: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Split rows into training and evaluation so that no question stands on both sides; a function of `seed` alone."""
    if not 0 < share < 1:
        raise ConfigError(f"data.eval: the held-out share is {share}; give a number between 0 and 1, for example 0.1")
    questions = list(dict.fromkeys(row.question for row in rows))
    if len(questions) < 2:
        raise DataError(
            f"{rows[0].source if rows else 'data'}: fewer than two different questions, nothing to hold out"
        )
    random.Random(f"hold out {seed}").shuffle(questions)
    held = set(questions[: min(len(questions) - 1, max(1, round(share * len(questions))))])
    return [r for r in rows if r.question not in held], [r for r in rows if r.question in held]


def label_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """The names of all labels: sorted words, or "0" to the highest integer."""
    labels = {row.label for row in rows if row.label is not None}
    if not labels:
        raise DataError(f"{rows[0].source if rows else 'data'}: no row has a label; give rows with a 'label' column")
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers and len(numbers) < len(labels):
        raise DataError(
            f"{rows[0].source}: labels mix numbers and words ({sorted(map(str, labels))[:6]}); use one kind"
        )
    return tuple(str(i) for i in range(max(numbers) + 1)) if numbers else tuple(sorted(str(label) for label in labels))


class _Layout(NamedTuple):
    """Which form a record has, and our name to its column for each column that the form uses."""

    form: str
    names: dict[str, str]


def _check_settings(columns: Mapping[str, str], limit: int | None) -> None:
    ours = dict.fromkeys([*ALIASES, "output", "response"])
    for name, column in columns.items():
        if name not in ours:
            raise ConfigError(f"data columns: unknown name '{name}'{near(name, ours)}; known: {', '.join(ours)}")
        if not isinstance(column, str):
            raise ConfigError(f"data columns.{name}: expected the name of a column, not {column!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"data limit {limit}: give at least 1, or leave it out for all rows")


def _layout(record: Record, columns: Mapping[str, str], first: _Layout | None, where: str) -> _Layout:
    """The layout of a record with these keys; `first` is the layout of the first row, whose form later rows share."""
    mapped = {("completion" if k in ("output", "response") else k): v for k, v in columns.items()}
    for name, column in mapped.items():
        if column not in record:
            there = ", ".join(map(str, record)) or "none"
            raise DataError(f"{where}: no column '{column}' (columns.{name}){near(column, record)}; there are: {there}")
    lead = next((n for n in LEADS if n in mapped), None) or next((n for n in LEADS if _find(n, record, mapped)), None)
    form = _form(lead, record, mapped)
    if first is not None and form != first.form:
        return _explain(first, form, record, where)
    if form is None:
        there = ", ".join(map(str, record)) or "none"
        hint = next((near(key, ALIASES) for key in record if near(key, ALIASES)), "")
        raise DataError(
            f"{where}: no known form in columns {there}{hint}; give messages, prompt + completion, "
            "instruction + output, text + label or text, or name the columns with data columns"
        )
    names = {name: _one(name, record, mapped, where) for name in _uses(form, lead)}
    return _Layout(form, {name: column for name, column in names.items() if column is not None})


def _find(name: str, record: Record, mapped: Mapping[str, str]) -> list[str]:
    return [mapped[name]] if name in mapped else [alias for alias in ALIASES[name] if alias in record]


def _one(name: str, record: Record, mapped: Mapping[str, str], where: str) -> str | None:
    found = _find(name, record, mapped)
    if len(found) > 1:
        raise DataError(f"{where}: both '{found[0]}' and '{found[1]}' could be the {name}; say which: columns.{name}")
    return found[0] if found else None


def _form(lead: str | None, record: Record, mapped: Mapping[str, str]) -> str | None:
    """The form that the deciding column begins, if what it needs beside it is there."""

    def has(name: str) -> bool:
        return bool(_find(name, record, mapped))

    if lead == "messages":
        return "chat"
    if lead in ("prompt", "instruction"):
        return lead if has("completion") or has("references") else None
    if lead == "premise":
        return "label" if has("hypothesis") and has("label") else None
    if lead == "text":
        return "label" if has("label") else "text"
    return None


def _uses(form: str, lead: str | None) -> tuple[str, ...]:
    texts = ("premise", "hypothesis") if lead == "premise" else ("text",)
    return {
        "chat": ("messages", "references", "adapter"),
        "prompt": ("prompt", "completion", "references", "adapter"),
        "instruction": ("instruction", "context", "completion", "references", "adapter"),
        "label": (*texts, "label", "adapter"),
        "text": ("text", "adapter"),
    }[form]


def _explain(first: _Layout, form: str | None, record: Record, where: str) -> _Layout:
    """Why a later row does not have the first row's form: a column is missing, or the forms are mixed."""
    missing = [f"'{column}'" for column in first.names.values() if column not in record]
    if first.form == "text" and form == "label":
        raise DataError(f"{where}: has a label, the rows before it have none; give every row a label or none")
    if missing and (form is None or {first.form, form} == {"label", "text"}):
        raise DataError(f"{where}: no {' and no '.join(missing)}, which the first row has; add it or remove the row")
    raise DataError(f"{where}: form '{form}', but the first row has form '{first.form}'; one form for one source")


def _row(record: Record, layout: _Layout, source: str, number: int, adapter: str | None) -> Row:
    where, names = f"{source} row {number}", layout.names
    values = {name: record[column] for name, column in names.items()}
    parts: dict[str, Any] = {"form": layout.form, "index": number, "source": source}
    parts["adapter"] = adapter_name(values.get("adapter"), adapter, where)
    parts["fields"] = {**record, **{name: value for name, value in values.items() if name != "messages"}}
    if layout.form == "chat":
        messages = _messages(values["messages"], where)
        said = {"completion": messages[-1].content, "references": values.get("references")}
        parts |= {"messages": messages, "completion": said["completion"], "references": _answers(said, names, where)[1]}
    elif layout.form in ("prompt", "instruction"):
        parts["prompt"] = _string(values[layout.form], names[layout.form], where)
        context = values.get("context")
        parts["context"] = "" if context is None else _string(context, names["context"], where)
        parts["completion"], parts["references"] = _answers(values, names, where)
    else:
        first, second = ("premise", "hypothesis") if "premise" in names else ("text", None)
        parts["text"] = _string(values[first], names[first], where)
        parts["pair"] = None if second is None else _string(values[second], names[second], where)
        if layout.form == "label":
            parts["label"] = _label(values["label"], names["label"], where)
        elif not parts["text"].strip():
            raise DataError(f"{where}: '{names[first]}' is empty; fill it or remove the row")
    return Row(**parts)


def adapter_name(value: Any, default: str | None, where: str) -> str | None:
    """A row's `adapter`, or the default where it has none."""
    if value is None or value == "":
        return default
    if not isinstance(value, str):
        raise DataError(f"{where}: adapter must be a name, not {value!r}")
    return value


def _string(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        what = "empty (null)" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{where}: '{column}' is {what}, a string is needed; mend the row or map another column")
    return value


def _answers(values: Mapping[str, Any], names: Mapping[str, str], where: str) -> tuple[str, tuple[str, ...]]:
    """(the trained completion, every right answer if there are several). A completion that is a list is references."""
    completion, references = values.get("completion"), values.get("references")
    if isinstance(completion, list | tuple):
        completion, references = None, completion if references is None else references
    texts = [references] if isinstance(references, str) else references or []
    if not isinstance(texts, list | tuple):
        raise DataError(f"{where}: '{names['references']}' must be a list of strings, not {type(texts).__name__}")
    texts = tuple(_string(text, names.get("references", names.get("completion", "")), where) for text in texts)
    texts = tuple(text for text in texts if text.strip())
    if completion is None or (texts and completion == ""):
        completion = texts[0] if texts else None
    column = names.get("completion", names.get("references", "completion"))
    if completion is None or not _string(completion, column, where).strip():
        raise DataError(f"{where}: no answer, '{column}' is empty; fill it or remove the row")
    return completion, texts


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{where}: the conversation must be a list of messages with 'role' and 'content'")
    messages = tuple(_message(turn, f"{where} message {number}") for number, turn in enumerate(value, start=1))
    if messages[-1].role != "assistant":
        raise DataError(
            f"{where}: the conversation ends with a {messages[-1].role} turn; end it with an assistant turn"
        )
    if not messages[-1].content.strip():
        raise DataError(f"{where}: no answer, the last assistant turn is empty; fill it or remove the row")
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: expected an object with 'role' and 'content', not {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in KNOWN_ROLES:
        raise DataError(f"{where}: role {role!r} is not known{near(role, KNOWN_ROLES)}; use {', '.join(KNOWN_ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where}: content must be a string, not {type(content).__name__}")
    return Message(role, content)


def _label(value: Any, column: str, where: str) -> int | str:
    if value is None or value == "" or (isinstance(value, int) and value < 0):
        raise DataError(f"{where}: no label ('{column}' is {value!r}); fill it or remove the row")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int | str):
        raise DataError(f"{where}: label {value!r} must be a whole number or a word")
    return int(value) if isinstance(value, int) else value


def _integer_labels(rows: list[Row]) -> list[Row]:
    """CSV knows only text: labels that all read as whole numbers are whole numbers."""
    import dataclasses

    texts = [row.label for row in rows if isinstance(row.label, str)]
    if not texts or len(texts) < len(rows) or not all(text.isdecimal() for text in texts):
        return rows
    return [dataclasses.replace(row, label=int(str(row.label))) for row in rows]
