"""What a plan says, as a table and as a picture."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from graft.planning.memory import Memory
from graft.planning.plan import Plan
from graft.planning.probe import Probe

if TYPE_CHECKING:
    from rich.console import RenderableType

COLORS = ("#4c78a8", "#f58518", "#e45756", "#72b7b2", "#54a24b", "#b279a2", "#b0b0b0")
MB = 1e6


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / MB:,.1f} MB"


def table(plan: Plan) -> RenderableType:
    """For a rich console."""
    from rich.console import Group
    from rich.table import Table

    parts = Table(box=None, pad_edge=False)
    parts.add_column("at the peak")
    columns = _columns(plan)
    for title in columns:
        parts.add_column(title, justify="right")
    for name in (*asdict(plan.training), "total"):
        row = [getattr(each, name) for each in columns.values()]
        if any(row):
            parts.add_row(name, *(size(count) if count else "" for count in row))
    head = (
        f"{plan.base} in {plan.precision}, {plan.method}: {plan.total:,} values, {plan.trainable:,} of them train; "
        f"the heaviest batch has {plan.rows} rows, {plan.tokens:,} tokens"
    )
    lines: list[RenderableType] = [head, "", parts, "", verdict(plan)]
    lines += [f"  {changed(change.settings)}: {size(change.total)}; {change.price}" for change in plan.changes or ()]
    if plan.probe is not None:
        lines.append(probed(plan, plan.probe))
    return Group(*lines, *(f"note: {note}" for note in plan.notes))


def _columns(plan: Plan) -> dict[str, Memory]:
    """What the plan says the memory of."""
    found = {"training": plan.training, "evaluation": plan.evaluation, "answering": plan.inference}
    return {title: memory for title, memory in found.items() if memory is not None}


def probed(plan: Plan, probe: Probe) -> str:
    """What two real steps measured, in one line."""
    off = plan.training.total / probe.peak - 1
    return (
        f"probe: {probe.seconds:.3g} s a step of the longest batches, {probe.steps:,} steps at most "
        f"{probe.seconds * probe.steps / 60:,.1f} min; measured peak {size(probe.peak)}, predicted {off:+.1%}"
    )


def verdict(plan: Plan) -> str:
    """Whether it fits, in one line."""
    need = f"{size(plan.need)} of {size(plan.room)} ({plan.device})"
    if plan.fits:
        return f"fits: {need}"
    if plan.need <= plan.room:
        need += ", which leaves too little for what is not predicted"
    if plan.changes:
        return f"does not fit: {need}; it would with"
    if plan.changes is None:
        return f"does not fit: {need}"
    return f"does not fit: {need}, and no setting that was tried makes it fit; take a smaller base or shorter rows"


def changed(settings: dict[str, object]) -> str:
    """Changed settings as the command line takes them."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    )


def draw(plan: Plan, file: Path) -> None:
    """The parts of the peak as bars beside the device's room, as a PNG that is renamed into place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = _columns(plan)
    unit = 1e9 if plan.need >= 1e9 else MB
    figure = Figure(figsize=(8, 1.2 + 0.7 * len(bars)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    left = dict.fromkeys(bars, 0.0)
    for part, color in zip(asdict(plan.training), COLORS, strict=True):
        widths = [getattr(memory, part) / unit for memory in bars.values()]
        if not any(widths):
            continue
        axes.barh(list(bars), widths, left=list(left.values()), color=color, label=part, height=0.55)
        left = {name: left[name] + width for name, width in zip(bars, widths, strict=True)}
    for name, end in left.items():
        axes.annotate(f" {end:,.1f}", (end, name), va="center")
    if plan.room / unit < 3 * max(left.values()):
        axes.axvline(plan.room / unit, color="black", linestyle="--", linewidth=1)
        place = (plan.room / unit, 1.01)
        axes.annotate(plan.device, place, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("GB" if unit == 1e9 else "MB")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_title(f"{plan.base}, {plan.method}, {plan.precision}, {plan.tokens:,} tokens", fontsize=10, pad=16)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(COLORS), frameon=False, fontsize=8)
    partial = file.with_name(file.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, file)
