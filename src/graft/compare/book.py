"""What a comparison has found so far: `compare.json`, rewritten after each entry, and a line on the screen a run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from graft.compare.grid import Entry, Row, Unit
from graft.compare.search import Chosen, measured
from graft.compare.settings import Compare
from graft.compare.table import DASH
from graft.disk import write_text
from graft.train.config import Run
from graft.train.schedule import Schedule
from graft.train.setup import Data

FOUND = "compare.json"
LOWER = ("loss", "perplexity")
"""Metrics of which less is better."""
MIXED = "Not all runs were made on one machine with the same versions: times and memory are not comparable."
OF_RUN = (
    *("seed", "status", "why", "quality", "batch_size", "counts", "peak_bytes", "training_its", "evaluation_its"),
    *("adapter_bytes", "latency", "forgetting", "curve", "seconds", "folder", "note"),
)
"""What a run's row gives to the report."""


class Book:
    """The findings.

    Args:
        settings: of the comparison, with its metrics.
        lines: its entries, in the order of the table.
        folder: where `compare.json` goes.
        console: for a line a run.
    """

    def __init__(self, settings: Compare, lines: Sequence[Entry], folder: Path, console: Console) -> None:
        assert settings.metrics is not None
        self.settings, self.lines, self.folder, self.console = settings, lines, folder, console
        self.metric = settings.metrics[0]
        self.entries: dict[str, dict[str, Any]] = {}
        self.found: dict[str, Any] = {}
        self.made: set[str] = set()
        """The machines and versions of the runs."""
        self.runs = 0

    def facts(self, run: Run, data: Data, schedule: Schedule, test_rows: int) -> None:
        """What was the same for all."""
        settings = self.settings
        rows = {"train": len(data.train), "eval": len(data.evaluation or ()), "test": test_rows}
        tokens = sum(schedule.tokens(step) for step in range(schedule.steps))
        self.found = {
            "version": 1,
            "title": settings.title or f"{run.base} on {Path(run.data.train).name}",
            "base": run.base,
            "data": {"train": run.data.train, "eval": run.data.eval, "test": settings.test, "rows": rows},
            "metric": self.metric,
            "metrics": list(settings.metrics or ()),
            "higher_is_better": self.metric not in LOWER,
            "seeds": list(settings.all_seeds),
            "budget": {"steps": schedule.steps, "batch_size": run.train.batch_size, "tokens": tokens},
            "search": settings.search.model_dump(mode="json"),
            "machine": {"cores": os.cpu_count(), "system": platform.platform()},
            "versions": {"python": platform.python_version()},
            "entries": [],
            "notes": [],
        }
        trained = {each.label: [key for key in each.train if key != "lr"] for each in self.lines}
        if own := [f"{label}: {', '.join(keys)}" for label, keys in trained.items() if keys]:
            self.found["budget"]["except"] = own
        usual = (settings.train.lr,) if settings.search.kind == "none" else settings.search.lrs
        if own := [each.label for each in self.lines if each.kind == "method" and each.lrs != usual]:
            self.found["search"]["except"] = own
        if settings.test is None:
            self.found["notes"].append(
                "The learning rates were chosen on the rows on which the quality is measured (no test was given), so "
                "the quality is somewhat too good for methods that were searched widely."
            )

    def say(self, unit: Unit, row: Row) -> None:
        """A line for a run that ended."""
        self.runs += 1
        what = f"lr {unit['lr']:g}, " if unit["lr"] is not None else ""
        what += f"{unit['steps']} steps" if unit["kind"] == "trial" else f"seed {unit['seed']}"
        if row["status"] != "ok":
            result = f"{row['status']}: {row['why']}"
        elif unit["kind"] == "trial":
            metric = self.settings.search.metric
            score = measured(row["score"], metric)
            result = f"{metric} {DASH if score is None else f'{score:.4f}'}"
        else:
            value = row["quality"][self.metric]
            result = f"{self.metric} {DASH if value is None else f'{value:.4g}'}"
        seconds = f" ({row['wall_seconds']:.0f} s)" if "wall_seconds" in row else ""
        self.console.print(f"{unit['label']}: {what}: {result}{seconds}", highlight=False, soft_wrap=True, markup=False)

    def end(self, entry: Entry, chosen: Chosen) -> None:
        """What came of an entry; `compare.json` has it from now on."""
        rows = chosen.rows
        for row in rows:
            for key in ("machine", "versions"):
                self.found[key] |= row.get(key) or {}
            if "machine" in row:
                self.made.add(json.dumps([row["machine"], row["versions"]], sort_keys=True))
        if len(self.made) > 1 and MIXED not in self.found["notes"]:
            self.found["notes"].append(MIXED)
        method = entry.method if isinstance(entry.method, dict) else {"method": entry.method}
        own = ({"train": dict(entry.train)} if entry.train else {}) | dict(entry.run)
        good = [row for row in rows if row["status"] == "ok"]
        bad = [row for row in rows if row["status"] != "ok"]
        status = "ok" if not bad else "partial" if good else bad[0]["status"]
        self.entries[entry.label] = {
            "label": entry.label,
            "kind": entry.kind,
            "method": method["method"] or entry.kind,
            "settings": method | own if entry.kind == "method" else {},
            "status": status,
            "why": bad[0]["why"] if bad else None,
            "note": chosen.note or next((row["note"] for row in good if row.get("note")), None),
            "lr": chosen.lr,
            "tried": chosen.tried,
            "runs": [self._run(row) for row in rows if "seed" in row],
        }
        self.found["entries"] = [self.entries[each.label] for each in self.lines if each.label in self.entries]
        self.write()

    def write(self) -> None:
        """Write what is found so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / FOUND, json.dumps(self.found, indent=2, ensure_ascii=False) + "\n")

    def _run(self, row: Row) -> Row:
        found = {key: row.get(key) for key in OF_RUN}
        return found | {"folder": os.path.relpath(row["folder"], self.folder)}
