"""A comparison as pictures: quality against a cost with its Pareto front, and the learning curves; SVG and PNG."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from graft.compare.field import Entry
from graft.compare.table import COLUMNS, COSTS, Column, Row, Summary, shown

INK, FRONT, OTHER = "#222222", "#0072B2", "#7a7a7a"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's, which the colour-blind tell apart; their yellow is too light for a line on white."""
DASHES = ("-", "--", ":", "-.")
MARKERS = {"method": "o", "icl": "D", "base": "s"}
NAMES = 14
"""Points that have their names beside them, more have numbers; and curves in colour, by rank, more are grey."""
Point = tuple[float, float]


def front(points: Sequence[Point], higher_is_better: bool = True) -> list[int]:
    """The places of the points that no other beats, cheapest first.

    A point (cost, quality) is beaten by one that is no worse in both and better in one.
    """
    sign = -1 if higher_is_better else 1
    found: list[int] = []
    for place in sorted(range(len(points)), key=lambda p: (points[p][0], sign * points[p][1])):
        beats = not found or sign * points[place][1] < sign * points[found[-1]][1]
        if beats or points[place] == points[found[-1]]:
            found.append(place)
    return found


def curves_of(entry: Entry, key: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) over the finished seeds, at each step that has the key."""
    by_step: dict[float, list[float]] = {}
    for run in entry.done:
        for line in run.curve:
            step, value = line.get("step"), line.get(key)
            if step is not None and value is not None:
                by_step.setdefault(step, []).append(value)
    return [(step, fmean(values), min(values), max(values)) for step, values in sorted(by_step.items())]


def pareto(summary: Summary, files: Sequence[Path]) -> None:
    """Quality against the cost of the summary, with intervals and the front; by suffix into each file."""
    rows = [row for row in summary.rows if row.quality is not None and row.values[summary.cost] is not None]
    with _figure(files, (8 if len(rows) <= NAMES else 11, 5 + 0.04 * len(rows))) as figure:
        axes = figure.add_subplot()
        column = next(column for column in COLUMNS if column.key == summary.cost)
        axes.set_xlabel(f"{COSTS[summary.cost]} (lower is better)")
        direction = "higher" if summary.compared.higher_is_better else "lower"
        axes.set_ylabel(f"{summary.compared.metric} ({direction} is better), 95 % intervals")
        axes.set_title(summary.compared.title, fontsize=10)
        if not rows:
            _nothing(axes, f"no run has both {summary.compared.metric} and {COSTS[summary.cost]}")
            return
        points = [(float(row.values[summary.cost] or 0), row.quality.mean) for row in rows if row.quality]
        best = front(points, summary.compared.higher_is_better)
        _scale(axes, [x for x, _ in points], lambda value, _: _tick(column, value))
        axes.plot(
            *zip(*(points[place] for place in best), strict=True), color=FRONT, alpha=0.45, drawstyle="steps-post"
        )
        for place, (row, (x, y)) in enumerate(zip(rows, points, strict=True)):
            color = FRONT if place in best else OTHER
            _interval_bar(axes, row, x, y, color)
            axes.plot(
                [x], [y], MARKERS[row.entry.kind], color=color, markerfacecolor=color if place in best else "white"
            )
        axes.margins(x=0.12, y=0.1)
        _names(figure, axes, [row.entry.label for row in rows], points, best)


def curves(summary: Summary, files: Sequence[Path]) -> None:
    """The evaluation loss by step, or the training loss where none was evaluated: means and ranges over the seeds."""
    entries = [row.entry for row in summary.rows]
    key = "eval_loss" if any(curves_of(entry, "eval_loss") for entry in entries) else "loss"
    drawn = [(entry.label, points) for entry in entries if (points := curves_of(entry, key))]
    with _figure(files, (9, 5)) as figure:
        axes = figure.add_subplot()
        axes.set_xlabel("optimizer step")
        axes.set_ylabel({"loss": "training loss", "eval_loss": "evaluation loss"}[key])
        axes.set_title(summary.compared.title, fontsize=10)
        if not drawn:
            _nothing(axes, "no run has a learning curve")
            return
        for _, points in drawn[NAMES:]:
            axes.plot([p[0] for p in points], [p[1] for p in points], color="#bbbbbb", linewidth=0.8, zorder=1)
        styles = itertools.product(DASHES, COLORS)
        lines, marker = [], "." if key == "eval_loss" else ""
        for (_, points), (dash, color) in zip(drawn[:NAMES], styles, strict=False):
            steps, means, lows, highs = zip(*points, strict=True)
            lines += axes.plot(steps, means, dash, color=color, linewidth=1.6, marker=marker)
            axes.fill_between(steps, lows, highs, color=color, alpha=0.12, linewidth=0)
        names = [f" {_shorter(label)}" for label, _ in drawn[:NAMES]]  # a leading underscore would hide it
        rest = f"and {len(drawn) - NAMES} more in grey" if len(drawn) > NAMES else None
        legend = figure.legend(lines, names, loc="outside right upper", frameon=False, fontsize=9, title=rest)
        legend.get_title().set_fontsize(9)


# ------------------------------------------------------------------------------------------------- the parts


@contextlib.contextmanager
def _figure(files: Sequence[Path], inches: tuple[float, float]) -> Iterator[Any]:
    """A figure that is written when the block ends, each file renamed into place."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plain = {"text.parse_math": False, "svg.hashsalt": "graft", "font.size": 10}  # a label may hold dollars
    with matplotlib.rc_context(plain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box, no reason to stop
        figure = Figure(figsize=inches, dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        for axes in figure.axes:
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        for file in files:
            kind = file.suffix.removeprefix(".")
            partial = file.with_name(file.name + ".partial")
            figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else None)
            os.replace(partial, file)


def _nothing(axes: Any, why: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color=OTHER)


def _scale(axes: Any, xs: Sequence[float], text: Any) -> None:
    """A logarithmic axis where the costs span it, with a place for 0 one decade below the smallest."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    positive = [x for x in xs if x > 0]
    if positive and (max(positive) > 20 * min(positive)):
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        axes.set_xscale("symlog", linthresh=10.0**low, linscale=1)
        axes.xaxis.set_major_locator(FixedLocator([0.0] * (0 in xs) + [10.0**k for k in range(low, high + 1)]))
        axes.xaxis.set_minor_locator(FixedLocator([m * 10.0**k for k in range(low, high) for m in range(2, 10)]))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(text))


def _tick(column: Column, value: float) -> str:
    """A number beside an axis: counts as 10k or 3M."""
    if column.key != "trainable" or abs(value) < 1000:
        return shown(column, value)
    return f"{value / 1e3:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M" if abs(value) < 1e9 else f"{value / 1e9:g}B"


def _interval_bar(axes: Any, row: Row, x: float, y: float, color: str) -> None:
    if row.quality is not None and row.quality.low is not None and row.quality.high is not None:
        axes.errorbar(
            [x], [y], yerr=[[y - row.quality.low], [row.quality.high - y]], color=color, alpha=0.55, capsize=2
        )


def _shorter(label: str, most: int = 34) -> str:
    """One line of a label, cut in the middle, where long labels tend to be the same."""
    text = " ".join(label.split()) or "?"
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def _names(figure: Any, axes: Any, labels: Sequence[str], points: Sequence[Point], best: Sequence[int]) -> None:
    """Write each name at the first free place around its point, the front's first; of many points only numbers."""
    from matplotlib.transforms import Bbox

    texts = [_shorter(label) for label in labels]
    if len(labels) > NAMES:
        _key(figure, texts)
        texts = [str(number + 1) for number in range(len(labels))]
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    room = axes.get_window_extent(renderer)
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in axes.transData.transform(points)]
    for (x, y), (right, top) in itertools.pairwise(axes.transData.transform([points[place] for place in best])):
        taken.append(Bbox.from_extents(x, y - 1, right, y + 1))
        taken.append(Bbox.from_extents(right - 1, min(y, top), right + 1, max(y, top)))
    for place in sorted(range(len(points)), key=lambda place: place not in best):
        for offset in _places():
            note = _note(axes, texts[place], points[place], offset)
            box = _text_box(note, renderer)
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


def _key(figure: Any, texts: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [f"{number + 1}  {text}" for number, text in enumerate(texts)]
    figure.legend(
        [Line2D([], [], linestyle="none")] * len(lines),
        lines,
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        handlelength=0,
        ncols=math.ceil(len(lines) / 32),
    )


def _note(axes: Any, text: str, point: Point, offset: tuple[float, float]) -> Any:
    dx, dy = offset
    line = {"arrowstyle": "-", "color": OTHER, "alpha": 0.6, "lw": 0.6} if math.hypot(dx, dy) > 14 else None
    return axes.annotate(
        text,
        point,
        offset,
        textcoords="offset points",
        fontsize=8.5,
        color=INK,
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="center",
        arrowprops=line,
    )


def _text_box(note: Any, renderer: Any) -> Any:
    """Where the text itself stands, without its line."""
    from matplotlib.text import Text

    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)


def _places() -> Iterator[tuple[float, float]]:
    """Offsets in points, near ones first."""
    for far in (9, 18, 30, 44, 60, 80):
        for dx, dy in ((1, 0), (1, 0.8), (1, -0.8), (-1, 0), (-1, 0.8), (-1, -0.8), (0, 1.1), (0, -1.1)):
            yield dx * far, dy * far
