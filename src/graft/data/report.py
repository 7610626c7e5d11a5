"""A look at the data before training: what is there, what would be lost, what stands twice, what the loss sees.

`report(...)` measures, `Report.check(limits)` refuses, and names the rows and the key to change.
"""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graft.data.encode import Example, text_of
from graft.data.rows import Row
from graft.errors import DataError
from graft.ids import IGNORED

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

NAMED = 10  # rows that an error names, and that the JSON form lists
BARS = 8  # bars of the length histogram
Run = tuple[str, bool]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What `Report.check` accepts. Shares are of the rows of a part."""

    truncate: bool = False
    """May rows longer than the context be cut? If not, one such row is an error."""
    truncated: float = 0.05
    """Largest share of rows that are cut."""
    zero_labels: int = 0
    """Most rows without a single trained token."""
    duplicates: float = 0.5
    """Largest share of training rows that repeat an earlier row, question and answer."""
    leaked: int = 0
    """Most evaluation rows whose question is also a training row's."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The training rows or the evaluation rows. Lists of rows are in the order of the source."""

    name: str
    rows: int
    tokens: int
    """All tokens, before cutting; in an encoder-decoder the targets' too."""
    trained: int
    """Tokens that give a loss, after cutting."""
    longest: int
    histogram: tuple[tuple[int, int, int], ...]
    """(shortest, longest, rows) of each bar."""
    truncated: tuple[Row, ...]
    zero_labels: tuple[Row, ...]
    duplicates: tuple[Row, ...]
    """Rows equal to an earlier one in question and answer."""
    other_answers: int
    """Rows that ask what an earlier row asks and answer otherwise: several references, no fault."""
    unused_references: int
    """Right answers that training does not see, because it takes the first of each row."""
    adapters: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON: counts, and the first ten rows of each list."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("truncated", "zero_labels", "duplicates"):
            plain[name] = _listed(plain[name])
        return plain | {"histogram": [list(bar) for bar in self.histogram]}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `report` found."""

    max_length: int
    train: Part
    evaluation: Part | None
    leaked: tuple[Row, ...]
    """Evaluation rows whose question stands in training."""
    samples: tuple[tuple[Run, ...], ...]
    """Three training rows as (text, trained) runs, as the model will see them."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Training, and evaluation if there is one."""
        return (self.train,) if self.evaluation is None else (self.train, self.evaluation)

    def check(self, limits: Limits | None = None, *, key: str = "data") -> None:
        """Raise a DataError for the first limit that is passed; `key` is where the settings stand in the run's file."""
        limits = limits or Limits()
        for part in self.parts:
            self._check_part(part, limits, key)
        share = len(self.train.duplicates) / self.train.rows
        if share > limits.duplicates:
            raise DataError(
                f"{share:.0%} of the training rows repeat an earlier row: {_named(self.train.duplicates)}; "
                f"remove them or raise {key}.limits.duplicates ({limits.duplicates})"
            )
        if len(self.leaked) > limits.leaked:
            raise DataError(
                f"{_count(self.leaked, 'evaluation row')} asked in training too: {_named(self.leaked)}; "
                f"remove them from one side or raise {key}.limits.leaked ({limits.leaked})"
            )

    def _check_part(self, part: Part, limits: Limits, key: str) -> None:
        if part.truncated and not limits.truncate:
            raise DataError(
                f"{_count(part.truncated, f'{part.name} row')} longer than {self.max_length} tokens "
                f"(longest {part.longest}): {_named(part.truncated)}; raise {key}.max_length or set {key}.truncate"
            )
        share = len(part.truncated) / part.rows
        if share > limits.truncated:
            raise DataError(
                f"{share:.1%} of the {part.name} rows would be cut at {self.max_length} tokens: "
                f"{_named(part.truncated)}; raise {key}.max_length or {key}.limits.truncated ({limits.truncated})"
            )
        if len(part.zero_labels) > limits.zero_labels:
            raise DataError(
                f"{_count(part.zero_labels, f'{part.name} row')} without a trained token: {_named(part.zero_labels)}; "
                f"raise {key}.max_length, remove them, or raise {key}.limits.zero_labels ({limits.zero_labels})"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "max_length": self.max_length,
            "train": self.train.to_dict(),
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
            "leaked": _listed(self.leaked),
            "samples": [[[text, trained] for text, trained in runs] for runs in self.samples],
        }

    def table(self) -> RenderableType:
        """For a rich console: counts, lengths, and the samples with the trained text in brackets and in colour."""
        from rich.console import Group

        return Group(self._counts(), self._lengths(), *self._marked())

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=100, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def _counts(self) -> RenderableType:
        from rich.table import Table

        table = Table(title="Data", title_justify="left")
        table.add_column("")
        for part in self.parts:
            table.add_column(part.name, justify="right")

        def line(name: str, values: Sequence[str]) -> None:
            if set(values) != {""}:
                table.add_row(name, *values)

        line("rows", [f"{p.rows:,}" for p in self.parts])
        line("tokens", [f"{p.tokens:,}" for p in self.parts])
        line("trained tokens", [f"{p.trained:,} ({_share(p.trained, p.tokens)})" for p in self.parts])
        line("longest row", [f"{p.longest:,} of {self.max_length:,}" for p in self.parts])
        line("rows too long", [f"{len(p.truncated):,} ({_share(len(p.truncated), p.rows)})" for p in self.parts])
        line("rows without a trained token", [f"{len(p.zero_labels):,}" for p in self.parts])
        line("rows that repeat a row", [f"{len(p.duplicates):,}" for p in self.parts])
        line("same question, other answer", [f"{p.other_answers:,}" for p in self.parts])
        line(
            "further references, not trained",
            [f"{p.unused_references:,}" if p.unused_references else "" for p in self.parts],
        )
        for name in sorted({name for p in self.parts for name in p.adapters}):
            line(f"rows of adapter {name}", [f"{p.adapters.get(name, 0):,}" for p in self.parts])
        if self.evaluation is not None:
            line("questions also in training", ["", f"{len(self.leaked):,}"])
        return table

    def _lengths(self) -> RenderableType:
        from rich.table import Table

        table = Table(title="Tokens in a training row", title_justify="left")
        table.add_column("tokens", justify="right")
        table.add_column("rows", justify="right")
        table.add_column("")
        most = max(rows for _, _, rows in self.train.histogram)
        for low, high, rows in self.train.histogram:
            table.add_row(f"{low} to {high}", f"{rows:,}", "#" * -(-30 * rows // most))
        return table

    def _marked(self) -> list[RenderableType]:
        from rich.text import Text

        texts: list[RenderableType] = [Text("Examples, the trained text in [[ ]]", style="italic")]
        for runs in self.samples:
            pieces = [(f"[[{text}]]", "bold green") if trained else (text, "") for text, trained in runs]
            texts.append(Text.assemble("- ", *pieces))
        return texts


def report(
    train: Sequence[Example],
    evaluation: Sequence[Example] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int,
    mode: str = "causal",
) -> Report:
    """Measure the examples, as they are before cutting.

    Args:
        train, evaluation: what the template made of the rows.
        tokenizer: writes the three samples; without it there are none.
        max_length: where rows longer than that would be cut.
        mode: the template's: causal, seq2seq or classification.
    """
    if not train or (evaluation is not None and not evaluation):
        raise DataError(f"no {'evaluation' if train else 'training'} rows; give a source with at least one row")
    asked = {example.row.question for example in train} - {""}
    leaked = tuple(example.row for example in evaluation or () if example.row.question in asked)
    chosen = sorted({0, len(train) // 2, len(train) - 1})
    samples = [] if tokenizer is None else [_runs(_cut(train[i], max_length, mode), tokenizer, mode) for i in chosen]
    return Report(
        max_length=max_length,
        train=_part("training", train, max_length, mode),
        evaluation=None if evaluation is None else _part("evaluation", evaluation, max_length, mode),
        leaked=leaked,
        samples=tuple(samples),
    )


def _cut(example: Example, max_length: int, mode: str) -> Example:
    from graft.data.collate import truncate

    return truncate(example, max_length, mode)


def _part(name: str, examples: Sequence[Example], max_length: int, mode: str) -> Part:
    lengths = [max(len(e.input_ids), len(e.labels)) for e in examples]
    cut = [_cut(example, max_length, mode) for example in examples]
    trained = [_trained(example, mode) for example in cut]
    first: set[tuple[str, str]] = set()
    questions: set[str] = set()
    duplicates, other_answers = [], 0
    for row in (example.row for example in examples):
        pair = (row.question, row.answer)
        if pair in first:
            duplicates.append(row)
        elif row.question and row.question in questions:
            other_answers += 1
        first.add(pair)
        questions.add(row.question)
    return Part(
        name=name,
        rows=len(examples),
        tokens=sum(len(e.input_ids) + (len(e.labels) if mode == "seq2seq" else 0) for e in examples),
        trained=sum(trained),
        longest=max(lengths),
        histogram=_histogram(lengths),
        truncated=tuple(e.row for e, length in zip(examples, lengths, strict=True) if length > max_length),
        zero_labels=tuple(e.row for e, count in zip(examples, trained, strict=True) if count == 0),
        duplicates=tuple(duplicates),
        other_answers=other_answers,
        unused_references=sum(max(0, len(e.row.references) - 1) for e in examples) if name == "training" else 0,
        adapters=dict(Counter(e.row.adapter for e in examples if e.row.adapter is not None)),
    )


def _trained(example: Example, mode: str) -> int:
    """Tokens that give a loss: in a decoder the first token never does, nothing predicts it."""
    return sum(label != IGNORED for label in (example.labels[1:] if mode == "causal" else example.labels))


def _histogram(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(shortest, longest, rows) of at most eight bars of equal width."""
    width = -(-max(*lengths, 1) // BARS)
    counts = Counter((max(length, 1) - 1) // width for length in lengths)
    return tuple((bar * width + 1, (bar + 1) * width, counts[bar]) for bar in range(max(counts) + 1))


def _runs(example: Example, tokenizer: PreTrainedTokenizerBase, mode: str) -> tuple[Run, ...]:
    """The example as (text, trained) runs."""
    if mode == "classification":
        return (text_of(example.input_ids, tokenizer), False), (str(example.row.label), True)
    if mode == "seq2seq":
        return (text_of(example.input_ids, tokenizer), False), (tokenizer.decode(example.labels), True)
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if not runs or runs[-1][1] != (label != IGNORED):
            runs.append(([], label != IGNORED))
        runs[-1][0].append(token)
    return tuple((text_of(ids, tokenizer), trained) for ids, trained in runs)


def _listed(rows: Sequence[Row]) -> dict[str, Any]:
    return {"count": len(rows), "first": [row.where for row in rows[:NAMED]]}


def _named(rows: Sequence[Row]) -> str:
    """'a.jsonl rows 3, 9; b.jsonl row 1 and 4 more'."""
    by_source: dict[str, list[str]] = {}
    for row in rows[:NAMED]:
        by_source.setdefault(row.source, []).append(str(row.index))
    text = ", ".join(f"{source} row{'s' * (len(n) > 1)} {', '.join(n)}" for source, n in by_source.items())
    return text + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")


def _count(rows: Sequence[Row], what: str) -> str:
    return f"1 {what} is" if len(rows) == 1 else f"{len(rows)} {what}s are"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0%"
