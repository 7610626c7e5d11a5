"""Doing one unit: train, measure, write `row.json`. Any process can do any unit; nothing here knows of the others."""

from __future__ import annotations

import json
import math
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from graft import base, files
from graft.adapt import detach
from graft.compare import after, peak
from graft.compare.grid import ROW, Row, Unit, read_row
from graft.compare.settings import ICL
from graft.data.collate import pad_id
from graft.description import values
from graft.disk import write_text
from graft.errors import BusyError, GraftError, TrainingError
from graft.evaluate.batches import bank_or_none
from graft.evaluate.opening import open_base, template_of
from graft.train.config import Run, make_run
from graft.train.progress import read_lines
from graft.train.result import Result, machine, versions
from graft.train.run import Interrupted, train
from graft.train.setup import Data, Opened, read_data, rows_of, template_for

ERROR, PEAK = "error.txt", "peak.json"
UNTRAINED = (
    "train.max_forgetting: no evaluation after the first step was within the bound, so the adapter has not trained; "
    "evaluate more often (train.eval_every), or raise the bound"
)
CURVE = ("step", "loss", "eval_loss", "eval_accuracy")


class Worker:
    """Does units one after the other on one loaded base."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.model: PreTrainedModel | None = None
        self.data: tuple[str, Data] | None = None

    def do(self, unit: Unit) -> Row:
        """What came of the unit, read if it was done before; a run that fails is a finding and no accident.

        Raises:
            Interrupted, KeyboardInterrupt: the run was stopped; the same unit goes on where it was.
        """
        done = read_row(unit)
        if done is not None:
            return done
        folder = Path(unit["folder"])
        start = time.perf_counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            row: Row = {"status": "ok", "why": None}
            row |= self._done(unit, folder)
        except (Interrupted, BusyError):
            raise
        except Exception as error:
            self.forget()
            row = _failed(error, folder)
        left = row.pop("left", None)
        row = {"kind": unit["kind"], "label": unit["label"], "lr": unit["lr"], "seed": unit["seed"]} | row
        row |= {"steps": unit["steps"], "wall_seconds": round(time.perf_counter() - start, 3), "folder": str(folder)}
        row = _plain(row)
        write_text(folder / ROW, json.dumps(row, indent=2, ensure_ascii=False) + "\n")
        if left is not None:  # behind the row: a kill in between would leave a run that is neither there nor done
            shutil.rmtree(left, ignore_errors=True)
        return row

    def forget(self) -> None:
        """Let go of the base."""
        self.key = self.model = None

    def base_of(self, run: Run, labels: int | None = None) -> PreTrainedModel:
        """The base without adapters: the one that the last unit had, if it is the same."""
        key = (run.base, run.precision, run.device, labels)
        if self.model is not None and self.key == key and bank_or_none(self.model) is not None:
            detach(self.model)
        if self.model is None or self.key != key:
            self.forget()
            self.model = base.load_base(run.base, precision=run.precision, device=run.device, num_labels=labels)
            self.key = key
        found = self.model
        if base.made_new(found):  # a random head depends on the seed at which it was made
            self.forget()
        return found

    def data_of(self, run: Run, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Data:
        """The rows as they are trained: those of the last run, if it reads the same."""
        seed = run.seed if run.data.eval_seed is None and not isinstance(run.data.eval, str) else None
        asked = [run.base, run.name, seed, run.method.stretch(config), run.train.keep_best]
        key = json.dumps([*asked, run.data.model_dump(mode="json")])
        if self.data is None or self.data[0] != key:
            self.data = key, read_data(run, tokenizer, config)
        return self.data[1]

    def _done(self, unit: Unit, folder: Path) -> Row:
        if unit["kind"] in ("base", "icl"):
            return self._untrained(unit)
        run = make_run(unit["run"])
        place = Path(run.output)
        if place.is_dir() and not (place / "run.yaml").is_file():
            shutil.rmtree(place)  # a start that was killed before it began
        tokenizer, config = base.load_tokenizer(run.base), base.load_config(run.base)
        classify = template_for(run, tokenizer, config).mode == "classification"
        model = None if classify else self.base_of(run)
        if classify:
            self.forget()
        device = base.device_of(run.device)
        peak.reset(device)
        done = (place / "result.json").is_file()
        opened = Opened(self.data_of(run, tokenizer, config), model, last_alone=unit["kind"] == "trial")
        result = train(run, console=Console(quiet=True), opened=opened)
        if not done:  # a start that only measures what an earlier one trained does not know the peak
            write_text(folder / PEAK, json.dumps(peak.read(device)))
        row = _trained(result)
        row["peak_bytes"] = json.loads((folder / PEAK).read_text()) if (folder / PEAK).is_file() else None
        row["score"] = _score(result, unit["measure"]["metric"])
        if unit["kind"] == "trial":
            return row | {"left": result.folder}
        row |= self._measured(run, result, unit["measure"], classify, tokenizer)
        kept = unit["measure"]["keep"]
        return row | {"kept": kept, "left": result.folder if kept == "results" else result.folder / "checkpoints"}

    def _measured(
        self, run: Run, result: Result, measure: dict[str, Any], classify: bool, tokenizer: PreTrainedTokenizerBase
    ) -> Row:
        """What the saved adapter does, loaded as a user would."""
        name = run.name
        template = template_of(str(result.adapter))
        assert template is not None  # every run's adapter has it
        if classify:
            model = open_base(run.base, {name: str(result.adapter)}, precision=run.precision, device=run.device).model
        else:
            model = self.base_of(run)
            files.load(model, result.adapter, name)
        rows, size = after.test_rows(run, measure), run.train.eval_batch_size or run.train.batch_size
        cut = run.data.truncate
        found: Row = {"quality": after.quality(model, tokenizer, rows, template, name, measure, cut, size)}
        found["adapter_bytes"] = after.bytes_of(result.adapter)
        found["counts"] = {"total": values(model), "trainable": result.trainable, "saved": result.saved}
        found["evaluation_its"] = after.evaluation_speed(model, tokenizer, rows, template, name, size)
        try:  # what cannot be measured beside the quality does not cost the run its quality
            if measure["forgetting"] is not None and not classify:
                found["forgetting"] = after.forgot(model, tokenizer, measure["forgetting"], name)
            if measure["latency"]:
                found["latency"] = after.latency(model, tokenizer, rows, template, name)
        except GraftError as error:
            found["note"] = str(error)
        return found

    def _untrained(self, unit: Unit) -> Row:
        """The bare base, or the base with demonstrations; a head answers neither, so the template may be another."""
        run, measure = make_run(unit["run"]), unit["measure"]
        tokenizer, config = base.load_tokenizer(run.base), base.load_config(run.base)
        asked = measure["icl"]["template"]
        if asked is not None:
            run = make_run(unit["run"] | {"data": unit["run"]["data"] | {"template": asked}})
        rows, size = after.test_rows(run, measure), run.train.eval_batch_size or run.train.batch_size
        pool = rows_of(run)[0]
        template = template_for(run, tokenizer, config).fit([*pool, *rows], tokenizer)
        set_seed(run.seed)  # for a head that no checkpoint has
        model = self.base_of(run, len(template.label_names) if template.mode == "classification" else None)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = pad_id(tokenizer)
        peak.reset(model.device)
        if unit["kind"] == ICL:
            found = after.few_shots(model, tokenizer, rows, pool, template, measure, unit["seed"], size)
        else:
            cut = run.data.truncate
            found = {"quality": after.quality(model, tokenizer, rows, template, None, measure, cut, size)}
            found["evaluation_its"] = after.evaluation_speed(model, tokenizer, rows, template, None, size)
        found["counts"] = {"total": values(model), "trainable": 0, "saved": 0}
        found |= {"machine": machine(model.device), "versions": versions()}
        return found | {"peak_bytes": peak.read(model.device)}


def _trained(result: Result) -> Row:
    stored = json.loads((result.folder / "result.json").read_text(encoding="utf-8"))
    lines = read_lines(result.folder / "metrics.jsonl")
    seconds = result.metrics.get("step_seconds")
    found: Row = {"note": UNTRAINED} if result.metrics.get("kept_step") == 0 else {}
    return found | {
        "batch_size": result.run.train.batch_size * result.run.train.accumulate,
        "training_its": 1 / seconds if seconds else None,
        "training": result.metrics,
        "seconds": result.seconds,
        "curve": [{key: line[key] for key in CURVE if key in line} for line in lines],
        "machine": stored["machine"],
        "versions": stored["versions"],
    }


def _score(result: Result, metric: str) -> float:
    """Of a trial, the higher the better."""
    metrics = result.metrics
    if metric == "accuracy":
        if "eval_accuracy" not in metrics:
            raise TrainingError("search.metric: accuracy is for classification heads; leave it out")
        return metrics["eval_accuracy"] - 1e-6 * metrics["eval_loss"]  # equal accuracies are told apart by the loss
    if not math.isfinite(metrics["eval_loss"]):
        raise TrainingError("the evaluation loss is not finite; lower the rate")
    return -metrics["eval_loss"]


def _failed(error: Exception, folder: Path) -> Row:
    """A method that cannot take the base is skipped; all else failed, with the traceback beside it."""
    if isinstance(error, GraftError) and not isinstance(error, TrainingError):
        return {"status": "skipped", "why": str(error)}
    if not isinstance(error, TrainingError):
        (folder / ERROR).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    name = "" if isinstance(error, TrainingError) else f"{type(error).__name__}: "
    return {"status": "failed", "why": name + " ".join(str(error).split())}


def _plain(value: Any) -> Any:
    """As JSON may hold it: numbers that are none become null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
