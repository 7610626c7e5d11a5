"""What a comparison runs: its entries, and each run of them with the folder that its settings name.

A run's folder holds a hash of everything that could change its result: the settings and the content of the data. So a
comparison that is started again finds what is done, and a changed setting makes a new run beside the old one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.compare.settings import BASE, FULL, ICL, Compare, Icl, Own
from graft.errors import ConfigError
from graft.settings import validated
from graft.train.config import Run, make_run

RUNS = "runs"
OF_TEST = ("test", "test_split", "test_columns", "test_limit", "metrics", "max_new_tokens")
MEASURED = ("test", "forgetting")
"""Facts that only a measurement of the same name reads."""
ROW = "row.json"
"""Written last: without it a run is not finished."""

Unit = dict[str, Any]
"""One run as plain data, so that any process on any machine can do it: `kind`, `label`, `run`, `measure`, `folder`."""
Row = dict[str, Any]
"""What came of a unit: `status` ("ok", "skipped", "failed"), `why`, and its figures."""


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method with its settings, or a baseline."""

    label: str
    kind: str
    """"method", "icl" or "base"."""
    method: Any = None
    """The method's settings, as in a run."""
    lrs: tuple[float, ...] = ()
    train: Mapping[str, Any] = field(default_factory=dict)
    """Training settings of its own, over those of the comparison."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Other settings of its runs: precision, peft_compat."""


def entries(settings: Compare) -> list[Entry]:
    """The lines of the comparison: the methods in their order, then the baselines.

    Raises:
        ConfigError: an entry that is no method, with its label.
    """
    found = [_entry(label, given, settings) for label, given in settings.methods.items()]
    if settings.baselines.full and not any(_name(entry.method) == FULL for entry in found):
        found.append(_entry(FULL, FULL, settings))
    if settings.baselines.icl:
        found.append(Entry(ICL, ICL))
    if settings.baselines.base:
        found.append(Entry(BASE, BASE))
    return found


def _name(method: Any) -> Any:
    return method.get("method") if isinstance(method, dict) else method


def _entry(label: str, given: Any, settings: Compare) -> Entry:
    where = f"methods.{label}"
    asked = {key: given[key] for key in Own.model_fields if key in given} if isinstance(given, dict) else {}
    own = validated(Own, asked, where, "method")
    if isinstance(given, dict):
        given = {key: value for key, value in given.items() if key not in asked}
    rate = own.train.get("lr", settings.train.lr)
    lrs = own.lrs or ((rate,) if settings.search.kind == "none" or "lr" in own.train else settings.search.lrs)
    if settings.search.kind == "none" and len(lrs) > 1:
        raise ConfigError(f"{where}.lrs: search.kind is none, so give one rate, not {list(lrs)}")
    other = {key: value for key in ("precision", "peft_compat") if (value := getattr(own, key)) is not None}
    entry = Entry(label, "method", given, lrs, own.train, other)
    try:
        run = run_of(entry, settings, lr=lrs[0], seed=0, steps=None, output=settings.output)
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('run: ')}") from None
    # As the run read them: YAML gives 1e-3 as text.
    train = {key: value for key, value in run.train.model_dump(mode="json").items() if key in own.train}
    lrs = (run.train.lr,) if "lr" in own.train else lrs
    return dataclasses.replace(entry, method=run.method.to_dict(), lrs=lrs, train=train)


def run_of(
    entry: Entry,
    settings: Compare,
    *,
    lr: float | None = None,
    seed: int = 0,
    steps: int | None = None,
    whole: int | None = None,
    output: str = "",
) -> Run:
    """The run of an entry with a rate and a seed; `steps`: fewer than its `whole` number, for a trial."""
    train = settings.train.model_dump(mode="json") | dict(entry.train)
    if lr is not None:
        train["lr"] = lr
    if steps is not None:
        train |= {"max_steps": steps, "save_every": steps, "keep_best": None}
        if train["max_forgetting"] is None:  # else it is held to the bound at the same steps as the run
            train["eval_every"] = steps
        if train["warmup"] >= 1 and whole is not None:
            train["warmup"] = train["warmup"] / whole  # the same share of a shorter run
    data = settings.data.model_dump(mode="json")
    if not isinstance(settings.data.eval, str) and settings.data.eval_seed is None:
        data["eval_seed"] = settings.all_seeds[0]  # one split for all
    return make_run(
        {
            "base": settings.base,
            "precision": settings.precision,
            "device": settings.device,
            "data": data,
            "method": entry.method,
            "train": train,
            "seed": seed,
            "output": output,
        }
        | dict(entry.run)
    )


class Grid:
    """The units of a comparison.

    Args:
        settings: of the comparison.
        facts: what else decides a result: hashes of the base and of the data, the kind of device; those of `test` and
            `forgetting` count where these are measured.
        steps: of a run on the whole budget, by the entry's label.
    """

    def __init__(self, settings: Compare, facts: Mapping[str, str], steps: Mapping[str, int]) -> None:
        self.settings, self.facts, self.steps = settings, dict(facts), steps
        self.folder = Path(settings.output).expanduser().absolute()
        self.random_head = False
        """Whether the bare base answers by a head that no checkpoint has."""

    def trial(self, entry: Entry, lr: float, steps: int) -> Unit:
        """A short run of the search: one rate on part of the budget."""
        return self._unit("trial", entry, lr, self.settings.all_seeds[0], steps)

    def final(self, entry: Entry, lr: float, seed: int) -> Unit:
        """A run on the whole budget, measured afterwards."""
        return self._unit("final", entry, lr, seed, None)

    def baseline(self, entry: Entry, seed: int) -> Unit:
        """The untouched base, or in-context learning with demonstrations drawn by the seed."""
        return self._unit(entry.kind, entry, None, seed, None)

    def _unit(self, kind: str, entry: Entry, lr: float | None, seed: int, steps: int | None) -> Unit:
        settings = self.settings
        base = entry if entry.kind == "method" else Entry(entry.label, entry.kind, "lora")
        whole = self.steps.get(entry.label)
        run = run_of(base, settings, lr=lr, seed=seed, steps=steps, whole=whole).model_dump(mode="json")
        if str(run["device"]).startswith("cuda"):
            run["device"] = "cuda"  # a worker sees one alone
        if entry.kind != "method":
            del run["method"]
            run["train"] = {"batch_size": run["train"]["eval_batch_size"] or run["train"]["batch_size"]}
        measure = self._measure(kind)
        facts = {key: value for key, value in self.facts.items() if key not in MEASURED or key in measure}
        decides = {key: value for key, value in measure.items() if key != "keep"}
        asked = {"kind": kind, "run": run, "measure": decides, "facts": facts}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:10]
        parts = [f"lr{lr:g}" if lr is not None else "", f"seed{seed}", f"steps{steps}" if steps else "", digest]
        place = self.folder / RUNS / slug(entry.label) / "-".join(part for part in parts if part)
        if "method" in run:
            run["output"] = str(place / "run")
        unit = {"kind": kind, "label": entry.label, "lr": lr, "seed": seed, "steps": steps or whole or 0}
        return unit | {"run": run, "measure": measure, "folder": str(place)}

    def _measure(self, kind: str) -> dict[str, Any]:
        """What is measured after a run; a trial is judged by its own evaluation rows."""
        settings, icl = self.settings, self.settings.baselines.icl
        metric = {"metric": settings.search.metric}
        if kind == "trial":
            return metric
        found = {key: getattr(settings, key) for key in OF_TEST}
        shown = (icl if isinstance(icl, Icl) else Icl()).model_dump(mode="json")
        if kind == BASE:
            found["icl"] = {"template": shown["template"]}
        elif kind == ICL:
            found |= {"icl": shown, "latency": settings.latency}
        else:
            found |= {key: getattr(settings, key) for key in ("forgetting", "latency", "keep")}
            found |= metric if settings.search.kind == "exhaustive" else {"metric": "loss"}  # trials chose the rate
        return json.loads(json.dumps(found))


def read_row(unit: Unit) -> Row | None:
    """What came of a unit, if it is done; a row whose adapter was not kept is none where it is to be kept."""
    file = Path(unit["folder"]) / ROW
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(row, dict) or not {"kind", "status", "why"} <= set(row):
            raise ValueError("it is no row of a run")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); remove it, and its run is done again") from None
    return None if row.get("kept") == "results" and unit["measure"].get("keep") == "adapters" else row


def slug(label: str) -> str:
    """A label as the name of a folder; two labels never share one."""
    plain = "".join(letter if letter.isalnum() or letter in "-_.=" else "_" for letter in label).strip(".")
    return plain if plain == label else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"
