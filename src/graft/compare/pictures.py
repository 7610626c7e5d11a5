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
from graft.compare.table import COLUMNS, Row, Summary, shown

INK, FRONT, OTHER = "#222222", "#0072B2", "#7a7a7a"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's, which the colour-blind tell apart; their yellow is too light for a line on white."""
DASHES = ("-", "--", ":", "-.")
MARKERS = {"method": "o", "icl": "D", "base": "s"}
NAMES = 12
"""Curves whose names stand beside the picture; more are drawn, by rank, in grey."""


def front(points: Sequence[tuple[float, float]], higher_is_better: bool = True) -> list[int]:
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
    with _figure(files, (8, 5 + 0.04 * len(rows))) as figure:
        axes = figure.add_subplot()
        column = next(column for column in COLUMNS if column.key == summary.cost)
        axes.set_xlabel(column.head + ("" if column.better is None else f" ({column.better}er is better)"))
        direction = "higher" if summary.compared.higher_is_better else "lower"
        axes.set_ylabel(f"{summary.compared.metric} ({direction} is better), 95 % intervals")
        axes.set_title(summary.compared.title, fontsize=10)
        if not rows:
            _nothing(axes, f"no run has both {summary.compared.metric} and {column.head}")
            return
        points = [(float(row.values[summary.cost] or 0), row.quality.mean) for row in rows if row.quality]
        best = front(points, summary.compared.higher_is_better)
        _scale(axes, [x for x, _ in points], lambda value, _: shown(column, value))
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
        _name(figure, axes, [row.entry.label for row in rows], points, best)


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
        for (label, points), (dash, color) in zip(drawn[:NAMES], styles, strict=False):
            steps, means, lows, highs = zip(*points, strict=True)
            axes.plot(
                steps,
                means,
                dash,
                color=color,
                linewidth=1.6,
                label=_shorter(label),
                marker="." if key != "loss" else "",
            )
            axes.fill_between(steps, lows, highs, color=color, alpha=0.12, linewidth=0)
        rest = f"and {len(drawn) - NAMES} more in grey" if len(drawn) > NAMES else None
        handles, labels = axes.get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9, title=rest)
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


def _interval_bar(axes: Any, row: Row, x: float, y: float, color: str) -> None:
    if row.quality is not None and row.quality.low is not None and row.quality.high is not None:
        axes.errorbar(
            [x], [y], yerr=[[y - row.quality.low], [row.quality.high - y]], color=color, alpha=0.55, capsize=2
        )


def _shorter(label: str, most: int = 28) -> str:
    """One line of a label; a leading underscore would hide it from the legend."""
    text = " ".join(label.split()) or "?"
    text = text if len(text) <= most else text[: most - 1] + "…"
    return f"\u200b{text}" if text.startswith("_") else text


def _name(
    figure: Any, axes: Any, labels: Sequence[str], points: Sequence[tuple[float, float]], best: Sequence[int]
) -> None:
    """Write each name at the first free place around its point, the front's first; numbers where no place is free."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    room = axes.get_window_extent(renderer)
    centers = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in centers]
    order = [*best, *(place for place in range(len(points)) if place not in best)]
    left: list[int] = []
    for place in order:
        text = _shorter(labels[place])
        for dx, dy in _places():
            note = axes.annotate(
                text,
                points[place],
                (dx, dy),
                textcoords="offset points",
                fontsize=8.5,
                color=INK,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center",
                arrowprops={"arrowstyle": "-", "color": OTHER, "alpha": 0.6, "lw": 0.6}
                if math.hypot(dx, dy) > 14
                else None,
            )
            box = note.get_window_extent(renderer) if note.arrowprops is None else _text_box(note, renderer)
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()
        else:
            left.append(place)
    if left:
        figure.supxlabel(f"{len(left)} without a name for want of room: see the table", fontsize=8, color=OTHER)


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
