"""The parts of the report as HTML. Every text of a comparison may hold markup, so each passes through `text`."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from graft.compare.field import Compared, Entry, One
from graft.compare.pictures import curves_of
from graft.compare.search import measured
from graft.compare.statistics import Pair
from graft.compare.table import COLUMNS, DASH, Row, Summary, quality_text, short, shown, used

CLOSED = 60
"""Pairs beyond which their table is folded."""


def text(value: Any) -> str:
    """A value as text that is safe between tags and in attributes."""
    return html.escape(DASH if value is None or value == "" else str(value), quote=True)


def embedded(value: Any) -> str:
    """JSON that is safe inside a script element."""
    plain = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    return plain


def number(value: float | None, show: str | None = None) -> str:
    """A cell with a number, whose exact value sorts it."""
    exact = "" if value is None else f"{value!r}"
    return (
        f'<td data-value="{exact}">{text(show if show is not None else None if value is None else short(value))}</td>'
    )


def table(heads: Sequence[str], rows: Iterable[str], caption: str, kind: str = "", name: str = "") -> str:
    """A table that scrolls inside its own box, which the keyboard reaches."""
    label = f' id="{name}"' if name else ""
    return (
        f'<div class="scroll {kind}" role="region" aria-label="{text(caption)}" tabindex="0">'
        f'<table class="sortable"{label}><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def head(words: str, kind: str = "", title: str = "", first: str = "", now: str = "") -> str:
    """A column's head with the button that sorts by it; `first` is the direction of the first click."""
    attributes = f' class="{kind}"' if kind else ""
    attributes += f' title="{text(title)}"' if title else ""
    attributes += f' data-first="{first}"' if first else ""
    attributes += f' aria-sort="{now}"' if now else ""
    attributes += f' data-words="{text(words)}"'  # a browser does not print buttons in repeated heads
    return f'<th scope="col"{attributes}><button type="button">{text(words)}</button></th>'


def section(name: str, title: str, body: str) -> str:
    """A part of the page with its heading."""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{text(title)}</h2>\n{body}</section>'


# ------------------------------------------------------------------------------------------------ the field


def field(summary: Summary) -> str:
    """The table of the field, best first, and how each column is measured."""
    columns = used(summary.rows)
    compared = summary.compared
    better = "descending" if compared.higher_is_better else "ascending"
    heads = [
        head("label", "text"),
        head("method", "text"),
        head(f"{compared.metric} (95\u00a0%)", "wrap", "Mean over the seeds and half its interval", better, better),
        head("seeds", "", "Runs that came to their end", "descending"),
        *(head(c.head, "wrap", c.how, "descending" if c.better == "high" else "ascending") for c in columns),
    ]
    rows = [_line(summary, row, [(c.key, shown(c, row.values[c.key])) for c in columns]) for row in summary.rows]
    how = [("quality", _quality_how(compared)), *((c.head, c.how) for c in columns)]
    terms = "".join(f"<dt>{text(term)}</dt><dd>{text(words)}</dd>" for term, words in how)
    return (
        table(heads, rows, "The field", name="field")
        + '<p class="hint screen">A click on a head sorts. The label leads to the method below.</p>'
        + f"<details><summary>How each column is measured</summary><dl>{terms}</dl></details>"
    )


def _quality_how(compared: Compared) -> str:
    direction = "higher" if compared.higher_is_better else "lower"
    return f"{compared.metric}, {direction} is better: mean over the seeds ± half its 95 % interval (Student's t)."


def _line(summary: Summary, row: Row, cells: Sequence[tuple[str, str]]) -> str:
    found, label = summary.verdict, row.entry.label
    tags = []
    if label == found.best:
        tags.append('<span class="tag">best</span>')
    if label == found.cheapest:
        tags.append('<span class="tag">cheapest of the best</span>')
    elif label in found.same_as_best and label not in found.undecided:
        tags.append('<span class="tag plain">does not differ</span>')
    elif label in found.undecided:
        tags.append('<span class="tag plain">undecided</span>')
    if row.entry.status != "ok":
        tags.append(f'<span class="tag bad">{text(row.entry.status)}</span>')
    kind = "best" if label == found.best else "none" if row.quality is None else ""
    values = "".join(number(row.values[key], words) for key, words in cells)
    mean = number(None if row.quality is None else row.quality.mean, quality_text(row))
    runs = 0 if row.quality is None else row.quality.n
    link = f'<a href="#{anchor(summary, label)}">{text(label)}</a>'
    why = f'<span class="why">{text(row.note)}</span>' if row.note else ""
    return (
        f'<tr class="{kind}"><th scope="row" class="text" data-value="{text(label)}">{link} {" ".join(tags)}{why}</th>'
        f'<td class="text">{text(row.entry.method or row.entry.kind)}</td>{mean}'
        f"{number(runs, str(runs))}{values}</tr>"
    )


def anchor(summary: Summary, label: str) -> str:
    """The name of an entry's section: by place, since a label may hold anything."""
    return f"entry-{[entry.label for entry in summary.compared.entries].index(label)}"


# ------------------------------------------------------------------------------------------------ pictures


def pareto(summary: Summary) -> str:
    """The place of the Pareto picture, with its axes to choose."""
    options = [("quality", summary.compared.metric), *((c.key, c.head) for c in used(summary.rows))]

    def choice(name: str, words: str, chosen: str) -> str:
        found = "".join(
            f'<option value="{key}"{" selected" if key == chosen else ""}>{text(label)}</option>'
            for key, label in options
        )
        return f'<label>{words} <select id="{name}">{found}</select></label>'

    across = summary.cost if summary.cost in dict(options) else options[-1][0]
    return (
        f'<div class="controls">{choice("pareto-y", "Up:", "quality")}{choice("pareto-x", "Across:", across)}</div>'
        '<div class="picture" id="pareto"><div class="tip" hidden></div></div>'
        '<p class="hint" id="pareto-words" aria-live="polite"></p>'
        '<p class="hint">Circles are methods, diamonds in-context learning, squares the base; filled ones are on the '
        "front: none is better in both. Bars are 95 % intervals.</p>"
    )


def curves(summary: Summary) -> str:
    """The place of the learning curves."""
    names = [("eval_loss", "evaluation loss"), ("loss", "training loss")]
    some = [(key, words) for key, words in names if any(curves_of(row.entry, key) for row in summary.rows)]
    if not some:
        return "<p>No run has a learning curve.</p>"
    options = "".join(f'<option value="{key}">{words}</option>' for key, words in some)
    return (
        f'<div class="controls"><label>Curve: <select id="curves-key">{options}</select></label></div>'
        '<div class="picture curves" id="curves"></div><ul class="legend" id="curves-legend"></ul>'
        '<p class="hint">Lines are means over the seeds, bands their range. A button picks out its line.</p>'
    )


def data(summary: Summary) -> dict[str, Any]:
    """What the pictures draw from."""
    quality = {
        "key": "quality",
        "head": summary.compared.metric,
        "better": "high" if summary.compared.higher_is_better else "low",
        "show": "short",
    }
    points = [
        {
            "label": row.entry.label,
            "kind": row.entry.kind,
            "low": None if row.quality is None else row.quality.low,
            "high": None if row.quality is None else row.quality.high,
            "values": {"quality": None if row.quality is None else row.quality.mean, **row.values},
        }
        for row in summary.rows
    ]
    lines = [
        {"label": row.entry.label, "loss": curves_of(row.entry, "loss"), "eval_loss": curves_of(row.entry, "eval_loss")}
        for row in summary.rows
    ]
    columns = [{"key": c.key, "head": c.head, "better": c.better, "show": c.show.__name__} for c in COLUMNS]
    return {
        "columns": [quality, *columns],
        "points": points,
        "curves": [line for line in lines if line["loss"] or line["eval_loss"]],
    }


# --------------------------------------------------------------------------------------------------- pairs


def pairs(summary: Summary) -> str:
    """Welch's test for every pair."""
    found = summary.verdict.pairs
    if not found:
        return "<p>Fewer than two entries have a quality, so there is nothing to test.</p>"
    words = ("a", "b", "a − b", "95 % interval", "t", "df", "p", "p, Holm", "verdict")  # noqa: RUF001
    heads = [head(each, "text" if each in ("a", "b", "verdict") else "") for each in words]
    shape = table(heads, [_pair(pair) for pair in found], "Pairs", "tall")
    note = (
        f'<p class="hint">Welch\'s t-test of the mean {text(summary.compared.metric)} over the seeds; the last p is '
        f"corrected by Holm over all pairs. They differ where it is at most {summary.level:g}; where only the p of the "
        "pair alone is, the pair is undecided.</p>"
    )
    if len(found) > CLOSED:
        return (
            f'{note}<details class="long"><summary>{len(found)} pairs (all in summary.json)</summary>{shape}</details>'
        )
    return note + shape


def _pair(pair: Pair) -> str:
    start = f'<tr><th scope="row" class="text">{text(pair.a)}</th><td class="text">{text(pair.b)}</td>'
    test = pair.test
    if test is None:
        tag = '<span class="tag plain">undecided</span> ' if pair.undecided else ""
        return f'{start}{number(None) * 6}<td class="text">{tag}{text(pair.why)}</td></tr>'
    verdict = "differ" if pair.differ else "undecided" if pair.undecided else "do not differ"
    tag = {"differ": "tag bad", "undecided": "tag plain", "do not differ": "tag"}[verdict]
    between = f"{short(test.low)} to {short(test.high)}"
    return (
        f"{start}{number(test.difference)}{number(test.low, between)}{number(test.t)}{number(test.df)}{number(test.p)}"
        f'{number(pair.adjusted)}<td class="text"><span class="{tag}">{verdict}</span> {text(test.note or " ")}'
        "</td></tr>"
    )


# ------------------------------------------------------------------------------------------------- entries


def entries(summary: Summary) -> str:
    """A folded part for each entry."""
    return "".join(_entry(summary, row) for row in summary.rows)


def _entry(summary: Summary, row: Row) -> str:
    entry = row.entry
    value = "" if row.quality is None else f": {summary.compared.metric} {quality_text(row)}"
    tag = "" if entry.status == "ok" else f'<span class="tag bad">{text(entry.status)}</span> '
    parts = [f"<p>{tag}{text(row.note)}</p>"] if row.note else []
    settings = {"method": entry.method or entry.kind, "learning rate": entry.lr, **entry.settings}
    parts.append(_part("Settings", definitions(settings)))
    if entry.tried:
        parts.append(_part("Learning rates tried", _tried(entry, summary.compared)))
    if entry.runs:
        parts.append(_part("Seeds", _runs(entry.runs)))
    return (
        f'<details id="{anchor(summary, entry.label)}"><summary>{text(entry.label + value)}</summary>'
        f"{''.join(parts)}</details>"
    )


def _part(title: str, body: str) -> str:
    return f'<div class="part"><h3>{title}</h3>{body}</div>'


def definitions(values: Mapping[str, Any]) -> str:
    """Settings or facts as a list of terms; nested ones by dotted keys."""
    lines = [f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in _flat(values)]
    return f"<dl>{''.join(lines)}</dl>" if lines else "<p>None.</p>"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif isinstance(value, list):
            yield f"{before}{key}", ", ".join(str(each) for each in value)
        elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
            yield f"{before}{key}", f"{value:,}"
        else:
            yield f"{before}{key}", value


def _tried(entry: Entry, compared: Compared) -> str:
    metric = compared.search.get("metric")
    words = ("rung", "learning rate", "steps", str(metric or "score"), "seconds", "status")
    heads = [head(each, "text" if each == "status" else "") for each in words]
    rows = [
        f"<tr>{number(one.rung, _whole(one.rung))}{number(one.lr, None if one.lr is None else f'{one.lr:g}')}"
        f"{number(one.steps, _whole(one.steps))}"
        f"{number(measured(one.score, metric))}{number(one.seconds)}"
        f'<td class="text">{text(one.why or one.status)}</td></tr>'
        for one in entry.tried
    ]
    return table(heads, rows, f"Learning rates tried for {entry.label}")


def _whole(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _runs(runs: Sequence[One]) -> str:
    metrics = list(dict.fromkeys(name for run in runs for name in run.quality))
    columns = [c for c in COLUMNS if any(c.take(run) is not None for run in runs)]
    heads = [head("seed"), *(head(name) for name in metrics), *(head(c.head, "wrap", c.how) for c in columns)]
    heads += [head("folder", "text"), head("note", "text")]
    rows = []
    for run in runs:
        cells = [number(run.seed, _whole(run.seed)), *(number(run.quality.get(name)) for name in metrics)]
        cells += [number(c.take(run), shown(c, c.take(run))) for c in columns]
        note = "" if run.status == "ok" and not run.why else f"{run.status}: {run.why or 'no reason is known'}"
        cells += [f'<td class="text">{_folder(run.folder)}</td>', f'<td class="text note">{text(note)}</td>']
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return table(heads, rows, "Seeds")


def _folder(folder: str | None) -> str:
    """A link to a run's folder where it lies below the report; a folder elsewhere is only named."""
    if not folder:
        return DASH
    shape = f"<code>{text(folder)}</code>"
    if folder.startswith(("/", "\\")) or ".." in folder or ":" in folder:
        return shape
    return f'<a href="./{quote(folder)}/">{shape}</a>'


# -------------------------------------------------------------------------------------------------- shared


def same_for_all(compared: Compared) -> str:
    """What no entry had of its own."""
    facts = {
        "Data": {"base": compared.base, **compared.data},
        "Budget": {**compared.budget, "seeds": ", ".join(str(seed) for seed in compared.seeds)},
        "Search of the learning rate": compared.search,
        "Machine": compared.machine,
        "Versions": compared.versions,
    }
    parts = [_part(title, definitions(values)) for title, values in facts.items() if values]
    notes = "".join(f"<li>{text(note)}</li>" for note in compared.notes)
    remarks = f"<h3>Notes</h3><ul>{notes}</ul>" if notes else ""
    return f'<div class="same">{"".join(parts)}</div>{remarks}'
