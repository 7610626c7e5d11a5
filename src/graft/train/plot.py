"""The loss of a run as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TRAIN, EVALUATION = "#4c78a8", "#e45756"


def plot(lines: Sequence[dict[str, Any]], file: Path, title: str = "") -> None:
    """Training loss as a line, evaluation loss as points, by optimizer step.

    Args:
        lines: of `metrics.jsonl`: `step` and `loss`, or `step` and `eval_loss`.
        file: the PNG; it is renamed into place.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine's settings say
    axes = figure.add_subplot()
    ends = []
    for key, label, style in (
        ("loss", "training", {"color": TRAIN, "linewidth": 1.5}),
        ("eval_loss", "evaluation", {"color": EVALUATION, "linewidth": 1.2, "marker": "o", "markersize": 5}),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)  # type: ignore[arg-type]
            ends.append((points[-1], style["color"]))
    for number, ((step, value), color) in enumerate(sorted(ends, key=lambda end: end[0][1])):
        place = (8, -9 if number == 0 and len(ends) > 1 else 3)  # the lower number below, so that they never overlap
        axes.annotate(f"{value:.3g}", (step, value), place, textcoords="offset points", color=color)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.margins(x=0.08)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    partial = file.with_name(file.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, file)
