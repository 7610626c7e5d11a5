"""The dial: an adapter's scale from 0 to 1.2, traced against the task's score and forgetting, without training again.

    y = y_base + s (y_adapter - y_base)     at each site of the adapter, s the scale; 0 is the base, 1 the adapter

Every scale is an entry {name: s} beside the base in the same batches. For low-rank changes of weights this is the
weight W + s B A; for scales (IA3) 1 + s (l - 1); for bottlenecks the residual times s. What acts inside attention, in
the input or on the base's own values has no scale between off and on, and is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from graft import files, files_disk, probe
from graft.adapt import detach
from graft.bank import bank_of
from graft.combining import combine
from graft.errors import AdapterFileError, ConfigError
from graft.evaluate.batches import Progress
from graft.evaluate.forgetting import check_model, forgetting
from graft.evaluate.general import LIMIT, pieces
from graft.evaluate.metrics import NEEDS, known_metrics
from graft.evaluate.run import default_metrics, examine
from graft.measure.dial_plot import plot
from graft.measure.runs import OpenedRun, open_run, text_of
from graft.train.folder import write_text

SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
FOLDER, RESULT = "dial", "dial.json"
PICTURES = ("dial.png", "dial.svg")
LOWER_IS_BETTER = ("loss", "perplexity")
ROWS = 16
"""Of a batch, the scales counted."""
SAME = 2e-3
"""The largest difference of a stored adapter's logits, as a share of the largest: two roundings of bf16 bases."""


@dataclass(frozen=True)
class Dial:
    """What is traced.

    Args:
        data: rows; None: the run's own evaluation rows.
        text: general text; None: the run's `data.general`.
        scales: of the adapter.
        metric: the score; None: accuracy for labels, else the loss.
        max_forgetting: the largest KL to the base, nats a token, that the recommendation may have; None: any.
        limit: rows at most.
        tokens: of general text at most.
        store: a scale to write as an adapter folder.
        adapter: whose; None: the only one of the run.

    Raises:
        ConfigError: a value that makes no sense.
    """

    data: str | None = None
    text: str | None = None
    scales: tuple[float, ...] = SCALES
    metric: str | None = None
    max_forgetting: float | None = None
    limit: int | None = None
    tokens: int = LIMIT
    store: float | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not self.scales or not all(map(math.isfinite, self.scales)) or len(set(self.scales)) < len(self.scales):
            raise ConfigError(f"scales: give different finite numbers, not {list(self.scales)}")
        if self.metric is not None:
            known_metrics([self.metric])
        if self.max_forgetting is not None and not self.max_forgetting > 0:
            raise ConfigError(f"max-forgetting: it is above 0, not {self.max_forgetting}")
        if self.store is not None and not math.isfinite(self.store):
            raise ConfigError(f"store: give a finite scale, not {self.store}")


def dial(
    folder: str | Path,
    asked: Dial | None = None,
    *,
    device: str | None = None,
    console: Console | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trace the dial of a finished run, and store one scale of it if that is asked.

    Args:
        folder: of the run; `dial/dial.json`, `dial.png`, `dial.svg` are written into it.
        console: where the table goes; None: the terminal.

    Returns:
        What `dial.json` holds: `metric`, `points` (`scale`, `score`, `kl`, `loss` of each), `base_loss`, `tokens`,
        `rows`, `recommended` (a scale, or None) and `advice` in words, `stored` (a folder, or None).

    Raises:
        ConfigError: no finished run, no rows or text, a method without a dial.
        DataError: rows or text that cannot be read.
        AdapterFileError: see `store`; all but the adapter is written then.
    """
    asked, console = asked or Dial(), console or Console()
    opened = open_run(folder, device=device)
    name = _name(opened, asked.adapter)
    check_dial(opened, name)
    if asked.store is not None:
        _check_store(opened, name, asked.store)
    text = text_of(opened.run, asked.text, opened.folder)
    scales = sorted(asked.scales)
    entries = [{name: scale} for scale in scales]
    rows = opened.rows(asked.data, asked.limit, name)
    model, tokenizer, template = opened.opened.model, opened.opened.tokenizer, opened.opened.templates[name]
    check_model(model)
    sample = pieces(text, tokenizer, model.config, limit=asked.tokens)  # what is wrong with it shows before the rows
    size = max(1, ROWS // len(scales))
    metric = asked.metric or _metric(default_metrics(rows, template))
    found = examine(
        model, tokenizer, rows, template, entries, [metric], batch_size=size, truncate=True, progress=progress
    )
    lost = forgetting(model, tokenizer, sample, entries, batch_size=1, progress=progress)
    points = [
        {"scale": scale, "score": scores[metric], "kl": each.kl, "loss": each.loss}
        for scale, scores, each in zip(scales, found.scores.values(), lost, strict=True)
    ]
    result: dict[str, Any] = {"run": str(opened.folder), "adapter": name, "metric": metric, "points": points}
    result |= {"base_loss": lost[0].base_loss, "tokens": lost[0].tokens, "rows": len(rows), "text": str(text)}
    result["max_forgetting"] = asked.max_forgetting
    result |= recommend(points, metric, asked.max_forgetting) | {"stored": None}
    place = _write(opened, result)
    for picture in PICTURES:
        plot(result, place / picture)
    try:
        if asked.store is not None:
            result["stored"] = str(store(opened, name, asked.store))
            _write(opened, result)
    finally:  # what cannot be stored has been traced all the same
        show(result, console)
    return result


def _write(opened: OpenedRun, result: dict[str, Any]) -> Path:
    place = opened.folder / FOLDER
    place.mkdir(exist_ok=True)
    write_text(place / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return place


def check_dial(opened: OpenedRun, name: str) -> None:
    """Refuse an adapter that has no scale between off and on.

    Raises:
        ConfigError: it is one.
    """
    adapter = bank_of(opened.opened.model)[name]
    if adapter.unweighted:
        raise ConfigError(
            f"{opened.folder}: {adapter.method.name} has no dial: it acts whole or not at all; the dial is for methods "
            "that add to or scale outputs, as lora, ia3 and bottleneck do"
        )


def recommend(points: Sequence[dict[str, Any]], metric: str, bound: float | None) -> dict[str, Any]:
    """The scale of the best score under the bound, and what there is to say of it.

    Args:
        points: `scale`, `score` and `kl` of each.
        bound: the largest KL, or None.
    """
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    finite = [point for point in points if math.isfinite(point["score"]) and math.isfinite(point["kl"])]
    if not finite:
        return {"recommended": None, "advice": "no scale has a finite score and forgetting"}
    allowed = [point for point in finite if bound is None or point["kl"] <= bound]
    if not allowed:
        least = min(finite, key=lambda point: point["kl"])
        return {
            "recommended": None,
            "advice": f"no scale forgets at most {bound:g} nats a token; the least is {least['kl']:.4g} at "
            f"{least['scale']:g}",
        }
    best = max(allowed, key=lambda point: (sign * point["score"], -point["kl"]))
    said = f"scale {best['scale']:g}: {metric} {best['score']:.4g}, forgetting {best['kl']:.4g} nats a token"
    if bound is not None:
        said += f", the best {metric} of those within {bound:g}"
    whole = next((point for point in points if point["scale"] == 1.0), None)
    if whole is not None and whole is not best:
        said += f"; as trained (scale 1) it is {metric} {whole['score']:.4g}, forgetting {whole['kl']:.4g}"
    return {"recommended": best["scale"], "advice": said}


def store(opened: OpenedRun, name: str, scale: float) -> Path:
    """Write the adapter with a scale folded into its low-rank factors, if what is written computes the same.

    Returns:
        `dial/adapter-SCALE` of the run: an adapter of its own, LoRA in peft's form, whatever low-rank method it was.

    Raises:
        ConfigError: the folder exists, or the adapter is more than a low-rank change of weights.
        AdapterFileError: the stored adapter does not compute what the scaled one does.
    """
    _check_store(opened, name, scale)
    model, place = opened.opened.model, _stored_at(opened, scale)
    folded, again = f"{name}-{scale:g}", f"{name}-{scale:g}-stored"
    combine(model, {name: scale}, folded)
    try:
        with files_disk.fresh(place) as new:
            files.save(model, folded, new, template=opened.opened.templates[name].to_dict(), form="peft")
            files.load(model, new, again)
            ids = list(range(2, 10))
            left, right = (probe.logits(model, entry, ids) for entry in ({name: scale}, again))
            apart = float((left - right).abs().max() / left.abs().max().clamp(min=1e-12))
            if not apart <= SAME:
                raise AdapterFileError(
                    f"{place}: not stored, its logits are {apart:.2g} off those of scale {scale:g}; use it with a "
                    f"weight instead: graft.use(model, {{{name!r}: {scale:g}}})"
                )
            new.rename(place)
    finally:
        for each in (folded, again):
            if each in bank_of(model).names:
                detach(model, each)
    return place


def _check_store(opened: OpenedRun, name: str, scale: float) -> None:
    place = _stored_at(opened, scale)
    if place.exists():
        raise ConfigError(f"store: {place} exists; remove it first, or take another scale")
    adapter = bank_of(opened.opened.model)[name]
    other = next((site.path for site, delta in adapter.items() if delta.factors() is None), None)
    if other is not None:
        raise ConfigError(
            f"store: {adapter.method.name} at {other} is more than a product of two factors, so its scale cannot be "
            "folded in; use it with a weight instead: graft.use(model, {name: scale})"
        )


def _stored_at(opened: OpenedRun, scale: float) -> Path:
    return opened.folder / FOLDER / f"adapter-{scale:g}"


def _name(opened: OpenedRun, asked: str | None) -> str:
    if asked is not None and asked not in opened.names:
        raise ConfigError(f"adapter: the run has {', '.join(opened.names)}, not {asked!r}")
    if asked is None and len(opened.names) > 1:
        raise ConfigError(f"adapter: the run has several ({', '.join(opened.names)}); name one with --adapter")
    return asked or opened.names[0]


def _metric(names: Sequence[str]) -> str:
    return "accuracy" if "accuracy" in names else next(name for name in names if NEEDS[name] == "loss")


def show(found: dict[str, Any], console: Console) -> None:
    """The table and the recommendation."""
    table = Table("scale", found["metric"], "KL to the base", "general loss", "more than the base's")
    for point in found["points"]:
        cells = (point["score"], point["kl"], point["loss"], point["loss"] - found["base_loss"])
        table.add_row(f"{point['scale']:g}", *(f"{cell:.4f}" for cell in cells))
    console.print(table)
    lines = [found["advice"]] + ([f"stored: {found['stored']}"] if found["stored"] else [])
    for line in [*lines, f"see {Path(found['run']) / FOLDER / PICTURES[0]}"]:
        console.print(line, highlight=False, soft_wrap=True)
