"""The table of the field: a line for each entry of a comparison, for the terminal, as CSV, Markdown and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from graft.compare.field import Compared, Entry, One
from graft.compare.statistics import Interval, interval
from graft.compare.verdict import Verdict, verdict
from graft.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

DASH = "–"  # noqa: RUF001
COSTS = {
    "trainable": "trainable parameters",
    "seconds": "seconds of training",
    "peak_bytes": "bytes of peak memory",
    "adapter_bytes": "bytes on disk",
}
"""What may decide which of several equally good methods is the cheapest, with its unit in words."""


@dataclass(frozen=True)
class Column:
    """A column: its key in CSV and JSON, its head, which direction is better, and how it is measured."""

    key: str
    head: str
    better: Literal["low", "high"] | None
    how: str
    show: Callable[[float], str]
    take: Callable[[One], float | None]
    join: Callable[[Sequence[float]], float] = fmean


def count(value: float) -> str:
    """A count with separators."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def size(value: float) -> str:
    """Bytes, in powers of 1,000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{short(value / scale)} {unit}"
    return f"{value:.0f} B"


def short(value: float) -> str:
    """Three or four digits, without an exponent where one can do without."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))) - 1)}f}"
    return f"{value:.2e}"


def percent(value: float) -> str:
    """A share as percent."""
    return f"{short(100 * value)} %"


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.3f}"


def over(value: float) -> str:
    """A share over the base, in percent with its sign."""
    return f"{100 * value:+.1f} %"


def _share(run: One) -> float | None:
    total, trainable = run.counts.total, run.counts.trainable
    return trainable / total if total and trainable is not None else None


def _slower(run: One, way: str) -> float | None:
    value = getattr(run.latency, way)
    return value / run.latency.base - 1 if run.latency.base and value is not None else None


def _forgot(run: One) -> float | None:
    found = run.forgetting
    return None if found.loss is None or found.base_loss is None else found.loss - found.base_loss


COLUMNS = (
    Column("batch_size", "batch", None, "Rows in a training step.", count, lambda run: run.batch_size),
    Column("total", "parameters", None, "Of the base and what the method adds.", count, lambda run: run.counts.total),
    Column("trainable", "trainable", "low", "Parameters with a gradient.", count, lambda run: run.counts.trainable),
    Column("share", "trainable %", "low", "Trainable of all parameters.", percent, _share),
    Column(
        "peak_bytes",
        "peak memory",
        "low",
        "The most memory in training, base included: of the GPU, or of the process on a CPU. The largest seed.",
        size,
        lambda run: run.peak_bytes,
        max,
    ),
    Column("training_its", "train it/s", "high", "Optimizer steps a second.", short, lambda run: run.training_its),
    Column(
        "evaluation_its", "eval it/s", "high", "Evaluation batches a second.", short, lambda run: run.evaluation_its
    ),
    Column(
        "adapter_bytes", "adapter size", "low", "Of what is saved, on disk.", size, lambda run: run.adapter_bytes, max
    ),
    Column(
        "latency_unmerged",
        "latency unmerged",
        "low",
        "The time of a token of an answer (of a row, for a classifier) with the adapter, over the base alone.",
        over,
        lambda run: _slower(run, "unmerged"),
    ),
    Column(
        "latency_merged",
        "latency merged",
        "low",
        "The same with the adapter merged into the base; a dash where the method cannot merge.",
        over,
        lambda run: _slower(run, "merged"),
    ),
    Column(
        "forgetting",
        "forgetting",
        "low",
        "Loss on general text less that of the base, in nats a token; above 0 something was lost.",
        signed,
        _forgot,
    ),
    Column("kl", "KL to base", "low", "On the same text, in nats a token.", short, lambda run: run.forgetting.kl),
    Column("seconds", "seconds", "low", "Of a run, training and evaluation.", short, lambda run: run.seconds),
)
"""Beside the label, the method, the quality and the note; means over the seeds unless they say otherwise."""


@dataclass(frozen=True)
class Row:
    """A line: the entry, its quality over the seeds, and a number for each column that was measured."""

    entry: Entry
    quality: Interval | None
    values: Mapping[str, float | None]

    @property
    def note(self) -> str:
        """Why the line is not whole, or what to know of it; empty if nothing."""
        why = self.entry.why or next((run.why for run in self.entry.runs if run.why), None) or "no reason is known"
        if self.entry.status == "ok":
            return (self.entry.note or "") if self.quality else "no quality was measured"
        if self.entry.status == "partial":
            return f"{len(self.entry.done)} of {len(self.entry.runs)} runs: {why}"
        return f"{self.entry.status}: {why}"


@dataclass(frozen=True)
class Summary:
    """A comparison with its table and its verdict; `cost` is one of `COSTS`."""

    compared: Compared
    rows: list[Row]
    verdict: Verdict
    cost: str
    level: float


def summarize(compared: Compared, cost: str = "trainable", level: float = 0.05) -> Summary:
    """The table and the verdict of a comparison; the rows best first, those without a quality last.

    Args:
        compared: what `graft.compare.field.read` returns.
        cost: by which the cheapest is chosen, one of `COSTS`. Base and in-context learning train 0 parameters.
        level: of the tests (see `graft.compare.statistics.pairs`).

    Raises:
        ConfigError: an unknown cost.
    """
    if cost not in COSTS:
        raise ConfigError(f"cost: unknown cost '{cost}'; take one of {', '.join(COSTS)}")
    groups = compared.groups()
    rows = [Row(entry, interval(groups[entry.label]), _values(entry)) for entry in compared.entries]
    sign = -1 if compared.higher_is_better else 1
    rows.sort(key=lambda row: math.inf if row.quality is None else sign * row.quality.mean)
    costs = {row.entry.label: row.values.get(cost) for row in rows}
    partial = [row.entry for row in rows if row.entry.status == "partial"]  # no winners by the seeds that are left
    found = verdict(
        # The pairs with the best come first.
        {row.entry.label: groups[row.entry.label] for row in rows if row.entry.status != "partial"},
        costs,
        compared.higher_is_better,
        level,
        fixed=compared.fixed(),
        quality=compared.metric,
        cost=COSTS[cost],
        left_out=[f"{entry.label} ({len(entry.done)} of {len(entry.runs)})" for entry in partial],
    )
    return Summary(compared, rows, found, cost, level)


def _values(entry: Entry) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for column in COLUMNS:
        values = [value for run in entry.done if (value := column.take(run)) is not None]
        found[column.key] = column.join(values) if values else None
    if entry.kind != "method" and entry.done and found["trainable"] is None:
        found["trainable"] = 0.0
    return found


def quality_text(row: Row) -> str:
    """A mean and half its interval, to two digits of that half."""
    quality = row.quality
    if quality is None:
        return DASH
    if quality.low is None:
        return short(quality.mean) + ("" if row.entry.kind == "base" else " (one seed)")
    half = quality.mean - quality.low
    if half == 0:
        return f"{short(quality.mean)} ± 0"
    digits = min(6, max(0, 1 - math.floor(math.log10(half))))
    return f"{quality.mean:.{digits}f} ± {half:.{digits}f}"


def shown(column: Column, value: float | None) -> str:
    """A cell's text."""
    return DASH if value is None else column.show(value)


def used(rows: Sequence[Row]) -> list[Column]:
    """The columns in which at least one row has a value."""
    return [column for column in COLUMNS if any(row.values[column.key] is not None for row in rows)]


def _quality_head(summary: Summary) -> str:
    return f"{summary.compared.metric} (95 %)"


def _cells(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Heads and lines as texts."""
    columns = used(summary.rows)
    heads = ["label", "method", _quality_head(summary), *(column.head for column in columns), "note"]
    lines = [
        [
            row.entry.label,
            row.entry.method or row.entry.kind,
            quality_text(row),
            *(shown(column, row.values[column.key]) for column in columns),
            row.note,
        ]
        for row in summary.rows
    ]
    return heads, lines


FIRST = ("trainable", "peak_bytes", "training_its", "latency_unmerged", "forgetting", "adapter_bytes", "share")
"""Columns that a narrow terminal shows before the others."""


def terminal(summary: Summary, width: int = 200) -> Table:
    """The table for a terminal of so many letters: what does not fit is left to the report. Notes are its caption."""
    from rich.table import Table
    from rich.text import Text

    heads, lines = _cells(summary)
    by_key = {column.key: number + 3 for number, column in enumerate(used(summary.rows))}
    wanted = [0, 2, *(by_key[key] for key in FIRST if key in by_key)]
    wanted += [number for number in range(len(heads) - 1) if number not in wanted]
    room, kept = width - 1, list[int]()
    for number in wanted:
        room -= 3 + max(len(heads[number]), *(len(line[number]) for line in lines))
        if room >= 0 or len(kept) < 2:
            kept.append(number)
    notes = "\n".join(f"{line[0]}: {line[-1]}" for line in lines if line[-1])
    caption = Text(notes, style="dim") if notes else None
    table = Table(title=Text(summary.compared.title), caption=caption, caption_justify="left", header_style="bold")
    for number in sorted(kept):
        table.add_column(heads[number], justify="left" if number < 2 else "right", overflow="fold")
    for row, line in zip(summary.rows, lines, strict=True):
        style = "bold" if row.entry.label == summary.verdict.best else "dim" if row.quality is None else ""
        table.add_row(*(Text(line[number]) for number in sorted(kept)), style=style)
    return table


def markdown(summary: Summary) -> str:
    """The verdict and the table in Markdown."""
    heads, lines = _cells(summary)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_plain(cell) for cell in cells) + " |"

    rule = [":---" if head in ("label", "method", "note") else "---:" for head in heads]
    table = [line(heads), "|" + "|".join(rule) + "|", *(line(each) for each in lines)]
    words = [f"- {_plain(sentence)}" for sentence in summary.verdict.lines]
    return "\n".join([f"# {_plain(summary.compared.title)}", "", *words, "", *table, ""])


def _plain(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}" if sign != "<" else "&lt;")
    return " ".join(text.split())


def csv_text(summary: Summary) -> str:
    """The numbers of the table, without rounding; what was not measured is empty."""
    records = [record(row) for row in summary.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in each.items()} for each in records)
    return text.getvalue()


def _harmless(value: Any) -> Any:
    """Spreadsheets run a text that begins like a formula; a quote before it makes it text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def record(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    quality = row.quality
    return {
        "label": row.entry.label,
        "kind": row.entry.kind,
        "method": row.entry.method,
        "status": row.entry.status,
        "lr": row.entry.lr,
        "seeds": 0 if quality is None else quality.n,
        "quality": None if quality is None else quality.mean,
        "quality_low": None if quality is None else quality.low,
        "quality_high": None if quality is None else quality.high,
        **row.values,
        "note": row.note,
    }


def summary_json(summary: Summary) -> str:
    """Table, verdict and pairs as JSON without NaN."""
    compared = summary.compared
    found = {
        "version": 1,
        "title": compared.title,
        "metric": compared.metric,
        "higher_is_better": compared.higher_is_better,
        "cost": summary.cost,
        "level": summary.level,
        "columns": [{"key": c.key, "head": c.head, "better": c.better, "how": c.how} for c in COLUMNS],
        "rows": [record(row) for row in summary.rows],
        "verdict": summary.verdict.to_dict(),
        "notes": compared.notes,
    }
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
