"""Templates: a row to text, and text to an `Example`. It is saved beside the adapter and used again after training.

| kind | prompt |
|---|---|
| chat | the tokenizer's chat template, up to where the assistant speaks |
| plain | the prompt as it is |
| instruction | `Instruction: ...`, `Input: ...` if there is one, `Response:` |
| alpaca | Stanford Alpaca's two texts, with and without input |

`task` or `templates` and `verbalizer` write the prompt and the answer first (text with labels needs them), then the
kind frames them; `templates` also place pseudo-tokens, and write the text of a classifier. Outside chat, one space
parts prompt and completion unless either has white space there, or `separator` says what does. Plain text rows are
trained whole, whatever the kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graft.data import chat
from graft.data.encode import (
    Example,
    Rendered,
    causal_examples,
    classifier_examples,
    prompt_ids,
    seq2seq_examples,
    whole_ids,
)
from graft.data.read import near
from graft.data.rows import Message, Row, label_names
from graft.data.tasks import MARK, TASKS, Task, task_for
from graft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Template", "chat_row"]

FRAMES = {
    "plain": ("{prompt}", "{prompt}\n{context}"),
    "instruction": (
        "Instruction: {prompt}\nResponse:",
        "Instruction: {prompt}\nInput: {context}\nResponse:",
    ),
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n### Response:\n",
    ),
}
CHOICES = {
    "kind": ("chat", *FRAMES),
    "mode": ("causal", "seq2seq", "classification"),
    "train_on": ("completion", "all"),
    "turns": ("all", "last"),
}
QUOTES = "put quotes around it (YAML reads a bare yes, no, on, off or null as something else)"
APPLIES: dict[str, dict[str, tuple[str, ...]]] = {
    "system": {"kind": ("chat",), "mode": ("causal", "seq2seq")},
    "turns": {"kind": ("chat",), "mode": ("causal",)},
    "separator": {"kind": tuple(FRAMES), "mode": ("causal",)},
    "label_names": {"mode": ("classification",)},
    "chat_template": {"kind": ("chat",), "mode": ("causal", "seq2seq")},
}
"""Where a setting has a meaning; elsewhere it would be ignored, so it is refused."""


def chat_row(messages: Sequence[Mapping[str, str]], adapter: str | None = None) -> Row:
    """A conversation so far as a row, for `render_prompt` and `prompt_ids`: the last turn is the user's."""
    turns = tuple(Message(m["role"], m["content"]) for m in messages)
    return Row(form="chat", index=1, source="chat", messages=turns, adapter=adapter)


@dataclass(frozen=True, kw_only=True)
class Template:
    """How rows become text and tokens."""

    kind: str = "chat"
    mode: str = "causal"
    """causal; seq2seq (prompt in, completion out); classification (text in, label out, by a head)."""
    task: Task | None = None
    train_on: str = "completion"
    """completion, or all tokens."""
    turns: str = "all"
    """In a conversation: all assistant turns are trained, or only the last."""
    system: str | None = None
    """A system message for rows that have none (chat)."""
    separator: str | None = None
    seed: int = 0
    """Chooses each row's prompt among the task's."""
    label_names: tuple[str, ...] = ()
    """The labels in the order of the head's outputs (classification)."""
    chat_template: str | None = None
    """The chat template's text; `fit` copies the tokenizer's, so that the adapter keeps what it was trained with."""

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"template {name} '{value}' is unknown{near(value, known)}; use {', '.join(known)}")
        if self.mode != "causal" and self.train_on == "all":
            raise ConfigError(f"template train_on 'all' has no meaning in mode '{self.mode}'; use 'completion'")
        if self.mode == "classification" and self.kind not in ("chat", "plain"):
            raise ConfigError(
                f"template kind: '{self.kind}' has no meaning with mode 'classification', whose head reads the text as "
                "it is; leave kind out"
            )
        for name, where in self._ignored().items():
            raise ConfigError(f"template {name}: it has no meaning with {where}; leave {name} out")
        if self.mode == "classification" and self.task is not None and self.task.verbalizer:
            raise ConfigError(
                "template task and verbalizer: they have no meaning with mode 'classification', whose labels have no "
                "words; give templates alone"
            )

    def _ignored(self) -> dict[str, str]:
        """Each setting that is given and would do nothing, and the setting beside it that makes it so."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {
            name: f"{key} '{getattr(self, key)}'"
            for name, places in APPLIES.items()
            for key, known in places.items()
            if getattr(self, name) != defaults[name] and getattr(self, key) not in known
        }

    @classmethod
    def from_dict(cls, settings: str | Mapping[str, Any] | None) -> Template:
        """From YAML or from `to_dict`: the name of a kind, or its settings. `task` is the name of a known task."""
        settings = {"kind": settings} if isinstance(settings, str) else dict(settings or {})
        known = [f.name for f in dataclasses.fields(cls)] + ["templates", "verbalizer"]
        for name in settings:
            if name not in known:
                raise ConfigError(f"template: unknown key '{name}'{near(name, known)}; known: {', '.join(known)}")
        task = _task(settings.pop("task", None), settings.pop("templates", None), settings.pop("verbalizer", None))
        _check_types(settings)
        settings["label_names"] = tuple(str(name) for name in settings.get("label_names") or ())
        return cls(task=task, **settings)

    def to_dict(self) -> dict[str, Any]:
        """JSON that `from_dict` reads; a task is written out, so that it stays what it was."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "task"}
        settings["label_names"] = list(self.label_names)
        if self.task is not None:
            settings |= {"templates": list(self.task.templates), "verbalizer": dict(self.task.verbalizer)}
        return settings

    def fit(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None = None) -> Template:
        """This template with what the training rows and the tokenizer decide: task, label names, chat template."""
        changes: dict[str, Any] = {}
        if self.mode == "classification":
            if not self.label_names:
                changes["label_names"] = label_names(rows)
        elif self.task is None and rows and rows[0].form == "label":
            changes["task"] = task_for(rows)
        if (
            self.kind == "chat"
            and self.mode != "classification"
            and self.chat_template is None
            and tokenizer is not None
        ):
            changes["chat_template"] = chat.template_text(tokenizer)
        return dataclasses.replace(self, **changes)

    @property
    def slots(self) -> int:
        """How many pseudo-tokens `{slots:n}` puts into each prompt; 0: a soft prompt stands in front."""
        return 0 if self.task is None else self.task.slots

    # Text -------------------------------------------------------------------------------------------------------

    def render_prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The text that generation starts from; chat needs the tokenizer. Tokenize it with `prompt_ids` only."""
        if row.form == "text" and self.task is None:
            raise DataError(
                f"{row.where}: plain text has no prompt; measure it by loss, or give prompts and completions"
            )
        if self.kind == "chat":
            messages = self._messages(row)
            asked = messages[:-1] if messages[-1].role == "assistant" else messages
            text = chat.render(asked, self._tokenizer(tokenizer), self.chat_template, row.where, prompt=True)
        else:
            text = self._frame(row)
        return self._marked(text, row)

    def prompt_ids(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that generation starts from: the very ones that training showed before the completion."""
        text = self.render_prompt(row, tokenizer)
        if self.mode == "seq2seq":
            return whole_ids([text], tokenizer)[0]
        return prompt_ids(text, tokenizer, begin=self.kind != "chat")

    def answer(self, row: Row) -> str:
        """The completion that is trained."""
        if row.form == "label" and self.task is None:
            raise DataError(
                f"{row.where}: text with a label needs words: set template task ({', '.join(TASKS)}) or templates"
            )
        return row.completion if self.task is None else self.task.answer(row)

    def references(self, row: Row) -> tuple[str, ...]:
        """Every right answer, for evaluation."""
        return row.references or (self.answer(row),)

    # Tokens -----------------------------------------------------------------------------------------------------

    def examples(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Rows to token ids and labels; nothing is cut here (see `collate.truncate`)."""
        if self.mode == "classification":
            texts = None if self.task is None else [self._marked(self.task.prompt(row, self.seed), row) for row in rows]
            return classifier_examples(rows, [self.label_number(row) for row in rows], tokenizer, texts)
        if self.mode == "seq2seq":
            prompts = [self.render_prompt(row, tokenizer) for row in rows]
            return seq2seq_examples(rows, prompts, [self.answer(row) for row in rows], tokenizer)
        rendered = [self.render(row, tokenizer) for row in rows]
        for row, item in zip(rows, rendered, strict=True):
            self._marked(item.text, row)
        return causal_examples(rows, rendered, tokenizer, everything=self.train_on == "all")

    def example(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Example:
        """One row to token ids and labels."""
        return self.examples([row], tokenizer)[0]

    def label_number(self, row: Row) -> int:
        """The place of the row's label in `label_names`."""
        if row.form != "label":
            raise DataError(f"{row.where}: no label; classification needs rows with text and label")
        if str(row.label) not in self.label_names:
            known = ", ".join(self.label_names) or "none"
            raise DataError(f"{row.where}: label '{row.label}' is not among template label_names ({known})")
        return self.label_names.index(str(row.label))

    def render(self, row: Row, tokenizer: PreTrainedTokenizerBase | None = None) -> Rendered:
        """The whole text with its trained parts marked (the end token is added to the ids, not here)."""
        if row.form == "text" and self.task is None:
            return Rendered(row.text, ((0, len(row.text)),), begin=True)
        if self.kind == "chat":
            messages = self._messages(row)
            return chat.render_turns(messages, self._tokenizer(tokenizer), self.chat_template, row.where, self.turns)
        prompt, answer = self._frame(row), self.answer(row)
        text = prompt + self._between(prompt, answer) + answer
        return Rendered(text, ((len(prompt), len(text)),), begin=True)

    def _marked(self, text: str, row: Row) -> str:
        """The text, if it has exactly the template's pseudo-tokens."""
        if (found := text.count(MARK)) != self.slots:
            raise DataError(
                f"{row.where}: {found} pseudo-tokens in its text, the template has {self.slots}; U+FDD0 stands for "
                "one: remove it from the row, and let the chat template keep each"
            )
        return text

    def _messages(self, row: Row) -> tuple[Message, ...]:
        """The row as a conversation; a system message is put in front if the row has none."""
        messages = row.messages
        if row.form != "chat":
            prompt, context = self._asked(row)
            content = f"{prompt}\n\n{context}" if context else prompt
            messages = (Message("user", content), Message("assistant", self.answer(row)))
        elif self.task is not None:
            raise ConfigError(
                f"{row.where}: template templates do not apply to conversations; leave task and templates out"
            )
        if self.system is not None and messages[0].role != "system":
            messages = (Message("system", self.system), *messages)
        return messages

    def _asked(self, row: Row) -> tuple[str, str]:
        """(prompt, context) of a row before it is framed."""
        if self.task is not None:
            return self.task.prompt(row, self.seed), ""
        if row.form == "label":
            self.answer(row)  # raises: a label without a task
        if row.form != "chat":
            return row.prompt, row.context
        turns = [m for m in row.messages if m.role != "system"]
        if [m.role for m in turns][:2] != ["user", "assistant"][: len(turns)] or len(turns) > 2:
            raise DataError(
                f"{row.where}: template kind '{self.kind}' has one question and one answer; use kind 'chat'"
            )
        systems = [m.content for m in row.messages if m.role == "system"]
        return "\n\n".join([*systems, turns[0].content]), ""

    def _frame(self, row: Row) -> str:
        prompt, context = self._asked(row)
        without, with_context = FRAMES[self.kind]
        frame = with_context if context else without
        head, _, tail = frame.partition("{prompt}")
        return head + prompt + tail.replace("{context}", context, 1)

    def _between(self, prompt: str, answer: str) -> str:
        if self.separator is not None:
            return self.separator
        return " " if prompt and not prompt[-1].isspace() and not answer[:1].isspace() else ""

    def _tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        if tokenizer is None:
            raise ConfigError("template kind 'chat' renders with the tokenizer; pass it")
        return tokenizer


def _task(name: Any, templates: Any, verbalizer: Any) -> Task | None:
    """The task that the settings name or write out."""
    if isinstance(name, Task):
        return name
    if name is not None and name not in TASKS:
        raise ConfigError(f"template task '{name}' is unknown{near(name, TASKS)}; use {', '.join(TASKS)} or templates")
    if name is not None and templates is not None:
        raise ConfigError("template: give task or templates, not both")
    if verbalizer is not None and not isinstance(verbalizer, Mapping):
        raise ConfigError(f"template verbalizer: expected label: word pairs, not {verbalizer!r}")
    if name is None and templates is None:
        if verbalizer:
            raise ConfigError("template verbalizer: it needs templates or a task beside it")
        return None
    templates = TASKS[name].templates if name is not None else templates
    if isinstance(templates, str) or not all(isinstance(template, str) for template in templates):
        raise ConfigError("template templates: expected a list of prompts, for example ['Review: {text}\\nSentiment:']")
    default = TASKS[name].verbalizer if name is not None else {}
    for label, word in (verbalizer or {}).items():
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise ConfigError(f"template verbalizer: the label {label!r} is no text or number; {QUOTES}")
        if not isinstance(word, str):
            raise ConfigError(f"template verbalizer: the word for {label!r} is {word!r}, not text; {QUOTES}")
    words = default if verbalizer is None else {str(label): word for label, word in verbalizer.items()}
    return Task(templates=tuple(templates), verbalizer=words)


def _check_types(settings: Mapping[str, Any]) -> None:
    for name in ("kind", "mode", "train_on", "turns", "system", "separator", "chat_template"):
        value = settings.get(name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"template {name}: expected text, not {value!r}")
    if not isinstance(settings.get("seed", 0), int):
        raise ConfigError(f"template seed: expected a whole number, not {settings['seed']!r}")
    names = settings.get("label_names") or ()
    if isinstance(names, str) or not all(isinstance(name, str | int) for name in names):
        raise ConfigError(f"template label_names: expected a list of names, not {names!r}")
    for name in names:
        if isinstance(name, bool):
            raise ConfigError(f"template label_names: {name!r} is no text or number; {QUOTES}")
