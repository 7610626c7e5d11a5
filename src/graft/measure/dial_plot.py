"""A dial as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

LINE, CHOSEN, BOUND = "#4c78a8", "#e45756", "#555555"


def plot(found: dict[str, Any], file: Path) -> None:
    """The task's score against forgetting, a point for each scale, labelled; the recommended one stands out.

    Args:
        found: what `graft.measure.dial.dial` returns.
        file: a PNG or SVG by its suffix; it is renamed into place.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine's settings say
    axes = figure.add_subplot()
    points = found["points"]
    axes.plot([p["kl"] for p in points], [p["score"] for p in points], color=LINE, linewidth=1.5, marker="o")
    for point in points:
        chosen = point["scale"] == found["recommended"]
        color = CHOSEN if chosen else LINE
        if chosen:
            axes.plot(point["kl"], point["score"], color=CHOSEN, marker="o", markersize=9, linestyle="none")
        place, weight = (point["kl"], point["score"]), "bold" if chosen else "normal"
        offset = (
            (8, 5) if points[0]["score"] > points[-1]["score"] else (8, -12)
        )  # beside the line, whichever way it runs
        axes.annotate(f"{point['scale']:g}", place, offset, textcoords="offset points", color=color, weight=weight)
    bound = found["max_forgetting"]
    if bound is not None:
        axes.axvline(bound, color=BOUND, linestyle="--", linewidth=1.2, label=f"bound, {bound:g}")
        axes.legend(frameon=False)
    axes.set_xlabel("forgetting: KL to the base on general text, nats a token")
    axes.set_ylabel(f"{found['metric']} on the task")
    axes.set_title(f"{found['adapter']}: scale 0 is the base, 1 as trained", fontsize=10)
    axes.margins(0.1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    partial = file.with_name(file.name + ".partial")
    figure.savefig(partial, format=file.suffix.removeprefix("."))
    os.replace(partial, file)
