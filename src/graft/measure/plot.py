"""A search for the intrinsic dimension as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SCORE, FULL, AIM = "#4c78a8", "#555555", "#e45756"


def plot(found: dict[str, Any], file: Path) -> None:
    """The score by dimension: the best rate's mean as a line, its seeds as points, full fine-tuning and the aim.

    Args:
        found: what `graft.measure.intrinsic.measure` returns.
        file: the PNG; it is renamed into place.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine's settings say
    axes = figure.add_subplot()
    sizes = [entry["size"] for entry in found["sizes"]]
    axes.plot(sizes, [entry["score"] for entry in found["sizes"]], color=SCORE, linewidth=1.5, marker="o")
    points = [
        (entry["size"], each["score"])
        for entry in found["sizes"]
        for each in entry["runs"]
        if each["lr"] == entry["lr"]
    ]
    axes.plot(*zip(*points, strict=True), color=SCORE, alpha=0.4, linestyle="none", marker=".")
    full, aim = found["full"]["score"], found["threshold"]
    for height, color, style, label in (
        (full, FULL, "-", f"full fine-tuning, {full:.3g}"),
        (aim, AIM, "--", f"{found['share']:.0%} of it, {aim:.3g}"),
    ):
        axes.axhline(height, color=color, linestyle=style, linewidth=1.2, label=label)
    name = f"d{100 * found['share']:.0f}"
    if found["d90"] is not None:
        axes.axvline(found["d90"], color=AIM, linestyle=":", linewidth=1.2, label=f"{name} = {found['d90']:,}")
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(f"dimensions d ({found['kind'].upper()}), of {found['total']:,} parameters")
    axes.set_ylabel(f"{found['metric']} in the evaluation")
    axes.set_title(f"{Path(found['data']).name} on {Path(found['base']).name}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    partial = file.with_name(file.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, file)
