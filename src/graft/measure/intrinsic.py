"""The intrinsic dimension of a task: the fewest dimensions d in which it can be learnt almost as well as in all.

d90 is the smallest d whose score is at least 90 % of full fine-tuning's (Aghajanyan et al. 2020, arXiv 2012.13255). The
score of a classification is the evaluation's accuracy. Where there is only a loss, it is the drop of the evaluation
loss from before the training to after it: 90 % of a loss itself would mean nothing. A d's score is that of the best
rate of a small sweep, each the mean over the seeds. The rates are those for d = 1000, times sqrt(1000 / d): projections
keep lengths, so a step of Adam is then as long in the space of the weights, whatever d.

Every training is a folder of `graft train` in `<output>/runs`; `<output>/intrinsic.json` and `intrinsic.png` are
written after each d. The same call goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from graft import base
from graft.bank import bank_of
from graft.errors import ConfigError, TrainingError
from graft.measure.plot import plot
from graft.train.config import Run, make_run
from graft.train.folder import write_text
from graft.train.result import Result
from graft.train.run import Interrupted, train
from graft.train.setup import check_data, open_model, read_data

RESULT, PLOT, RUNS = "intrinsic.json", "intrinsic.png", "runs"
METHOD, FULL = "intrinsic", "full"
RATED = 1000
"""The d that the sweep's rates are meant for."""
GRID = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)


@dataclass(frozen=True)
class Search:
    """What is tried.

    Args:
        sizes: the dimensions d, with SAID more than the base has tensors; None: 10, 30, 100, ..., 100,000.
        lrs: the learning rates for d = 1000; those for another d are sqrt(1000 / d) times as high.
        full_lrs: those for full fine-tuning; None: the run's own.
        seeds: how many seeds, from the run's own; a seed draws the projection too.
        share: of full fine-tuning's score, which a d has to reach.
        every: go on after the first d that reaches it.

    Raises:
        ConfigError: a value out of range.
    """

    sizes: tuple[int, ...] | None = None
    lrs: tuple[float, ...] = (1e-3, 1e-2)
    full_lrs: tuple[float, ...] | None = None
    seeds: int = 3
    share: float = 0.9
    every: bool = False

    def __post_init__(self) -> None:
        for name, values in (("sizes", self.sizes), ("lrs", self.lrs), ("full_lrs", self.full_lrs)):
            if values is not None and (not values or min(values) <= 0 or len(set(values)) != len(values)):
                raise ConfigError(f"{name}: give different numbers above 0, not {list(values)}")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share: it is above 0 and at most 1, not {self.share}")
        if self.seeds < 1:
            raise ConfigError(f"seeds: at least 1, not {self.seeds}")


def measure(run: Run, search: Search | None = None, *, fresh: bool = False, console: Console | None = None) -> Any:
    """Search d90 on the task of a run.

    Args:
        run: base, data and training; its method is left out, or is `intrinsic` with `kind` and `seed`.
        search: what is tried.
        fresh: start over in a new folder (`<output>-2`, ...).
        console: where a line for each training goes; None: the terminal.

    Returns:
        What `intrinsic.json` holds: `d90` (None if no d reaches it), `threshold`, `metric`, `full` and one entry of
        `sizes` for each d, both with `score`, `lr` and every run's own score; `tensors`, `total` and `notes`.

    Raises:
        ConfigError: settings that cannot be measured.
        TrainingError: full fine-tuning learns nothing, or every training of a d failed.
        Interrupted: a training was stopped; the same call goes on.
    """
    search, console = search or Search(), console or Console()
    _refuse(run)
    folder = _folder(Path(run.output).expanduser(), fresh)
    facts = _facts(run)
    sizes = _sizes(search, facts)
    metric = facts["metric"]
    found: dict[str, Any] = {"d90": None, "share": search.share, "metric": metric}
    found |= {key: facts[key] for key in ("kind", "tensors", "total")} | {"base": run.base, "data": run.data.train}
    found |= {"threshold": None, "notes": [], "full": None, "sizes": []}

    def tried(method: dict[str, Any], lrs: tuple[float, ...], label: str) -> dict[str, Any]:
        return _tried(run, folder, method, lrs, search.seeds, metric, label, console)

    full = found["full"] = tried({"method": FULL}, search.full_lrs or (run.train.lr,), "full")
    if full["score"] <= 0:
        raise TrainingError(
            f"full fine-tuning learns nothing ({metric} {full['score']:.4g}); give it more steps or --lrs"
        )
    found["threshold"] = search.share * full["score"]
    found["notes"] += _notes(found, facts)
    for size in sizes:
        lrs = tuple(float(f"{lr * math.sqrt(RATED / size):.3g}") for lr in search.lrs)
        entry = {"size": size} | tried({**_method(run), "size": size}, lrs, f"d={size}")
        found["sizes"].append(entry)
        if found["d90"] is None and entry["score"] >= found["threshold"]:
            found["d90"] = size
        _write(found, folder)
        if found["d90"] is not None and not search.every:
            break
    for line in (*found["notes"], _summary(found, folder)):
        console.print(line, highlight=False, soft_wrap=True)
    return found


def _tried(
    run: Run,
    folder: Path,
    method: dict[str, Any],
    lrs: tuple[float, ...],
    seeds: int,
    metric: str,
    label: str,
    console: Console,
) -> dict[str, Any]:
    """Train with each rate and seed, and keep the best rate's mean."""
    runs: list[dict[str, Any]] = []
    for lr in lrs:
        for seed in range(run.seed, run.seed + seeds):
            place = folder / RUNS / f"{label.replace('=', '')}-lr{lr:g}-seed{seed}"
            drawn = {"seed": seed + _drawn(run)} if method["method"] == METHOD else {}
            score, why = _score(_one(run, {**method, **drawn}, lr, seed, place), metric)
            runs.append(
                {"lr": lr, "seed": seed, "score": score, "folder": str(place)} | ({"failed": why} if why else {})
            )
            console.print(f"{label}, lr {lr:g}, seed {seed}: {_said(score, metric)}", highlight=False, soft_wrap=True)
    means = {lr: _mean([each["score"] for each in runs if each["lr"] == lr]) for lr in lrs}
    best = max(means, key=lambda lr: means[lr])
    if means[best] == -float("inf"):
        raise TrainingError(f"{label}: every training failed, the last with: {runs[-1]['failed']}; give lower --lrs")
    return {"score": means[best], "lr": best, "runs": runs}


def _one(run: Run, method: dict[str, Any], lr: float, seed: int, place: Path) -> Result | TrainingError:
    """One training, or why it failed: a rate that is too high is a finding and no accident."""
    settings = run.model_dump(mode="json")
    settings |= {"method": method, "seed": seed, "output": str(place), "train": {**settings["train"], "lr": lr}}
    try:
        return train(make_run(settings), console=Console(quiet=True))
    except Interrupted:
        raise
    except TrainingError as error:
        return error


def _score(result: Result | TrainingError, metric: str) -> tuple[float | None, str | None]:
    if isinstance(result, TrainingError):
        return None, str(result)
    metrics = result.metrics
    return metrics["eval_accuracy"] if metric == "accuracy" else metrics["eval_loss_before"] - metrics[
        "eval_loss"
    ], None


def _mean(scores: list[float | None]) -> float:
    """A rate at which a training fails is no rate to take."""
    known = [score for score in scores if score is not None]
    return statistics.mean(known) if len(known) == len(scores) else -float("inf")


# ------------------------------------------------------------------------------------------------- what is asked


def _refuse(run: Run) -> None:
    if "method" in run.model_fields_set and run.method.name != METHOD:
        raise ConfigError(f"method: {run.method.name} has no part in this; leave it out, or say method: {METHOD}")
    if "method" in run.model_fields_set and "size" in run.method.to_dict():
        raise ConfigError("method.size: the search chooses it; give --sizes")
    if run.data.eval is None:
        raise ConfigError("data.eval: the scores are of held-out rows; give a file or a share such as 0.1")
    if run.precision in ("int8", "nf4"):
        raise ConfigError(f"precision: full fine-tuning cannot train a base in {run.precision}; say fp32 or bf16")


def _method(run: Run) -> dict[str, Any]:
    """The method's settings but its size; the head moves in the same dimensions, as in the paper."""
    asked = run.method.to_dict() if run.method.name == METHOD else {"method": METHOD}
    return {"kind": "said", "head": False} | asked


def _drawn(run: Run) -> int:
    """What a run's own `method.seed` adds to the seeds of the projections."""
    return int(_method(run).get("seed", 0))


def _facts(run: Run) -> dict[str, Any]:
    """What the base and the data say before anything trains: tensors, parameters, the metric, the commonest label."""
    tokenizer, config = base.load_tokenizer(run.base), base.load_config(run.base)
    data = read_data(run, tokenizer, config)
    check_data(run, data)
    if len(data.names) > 1:
        raise ConfigError(f"data: its rows name {len(data.names)} adapters; a measurement is of one task")
    probe = make_run({**run.model_dump(mode="json"), "method": {**_method(run), "kind": "did", "size": 1}})
    model = open_model(probe, data, tokenizer)
    shared: Any = bank_of(model)[data.names[0]].shared
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("adapters."))
    labels = Counter(str(example.labels) for example in data.evaluation or ())
    classify = data.template.mode == "classification"
    return {
        "kind": _method(run)["kind"],
        "metric": "accuracy" if classify else "drop of the loss",
        "tensors": len(shared.projections),
        "total": total,
        "commonest": labels.most_common(1)[0][1] / labels.total() if classify else 0.0,
    }


def _sizes(search: Search, facts: dict[str, Any]) -> tuple[int, ...]:
    least = facts["tensors"] if facts["kind"] == "said" else 0
    if search.sizes is None:
        return tuple(size for size in GRID if least < size < facts["total"])
    wrong = next((size for size in search.sizes if not least < size < facts["total"]), None)
    if wrong is not None:
        raise ConfigError(
            f"sizes: {wrong} is not between {least} (with SAID the base's tensors, each of which has a scale) and "
            f"{facts['total']:,} (all of its parameters)"
        )
    return tuple(sorted(search.sizes))


def _folder(folder: Path, fresh: bool) -> Path:
    first, number = folder, 2
    while fresh and folder.exists():
        folder, number = first.with_name(f"{first.name}-{number}"), number + 1
    if folder.exists() and (not folder.is_dir() or {item.name for item in folder.iterdir()} - {RESULT, PLOT, RUNS}):
        raise ConfigError(f"output: {folder} holds something else than a measurement; take another folder")
    return folder


# ------------------------------------------------------------------------------------------------- what is said


def _write(found: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    plot(found, folder / PLOT)


def _notes(found: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    if facts["commonest"] < found["threshold"]:
        return []
    return [
        f"note: always saying the commonest label has an accuracy of {facts['commonest']:.3g}, not below the "
        f"{found['threshold']:.3g} to be reached; d90 says nothing here"
    ]


def _said(score: float | None, metric: str) -> str:
    return "failed" if score is None else f"{metric} {score:.4f}"


def _summary(found: dict[str, Any], folder: Path) -> str:
    full, d90 = found["full"]["score"], found["d90"]
    aim = f"{found['share']:.0%} of full fine-tuning's {found['metric']} ({full:.4f})"
    if d90 is None:
        return f"no dimension up to {found['sizes'][-1]['size']:,} reaches {aim}; see {folder / PLOT}"
    name, part = f"d{100 * found['share']:.0f}", 100 * d90 / found["total"]
    return f"{name} = {d90:,}, {part:.2g} % of the parameters: it reaches {aim}; see {folder / PLOT}"
