"""The dial: its ends are the base and the adapter, what is stored is what was traced, and what has no dial says so."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import graft
from graft.base import load_base, load_tokenizer
from graft.cli import app
from graft.data.rows import load_rows
from graft.errors import AdapterFileError, ConfigError, DataError
from graft.evaluate.forgetting import forgetting
from graft.evaluate.general import pieces
from graft.evaluate.run import evaluate
from graft.measure import dial as measured
from graft.measure.dial import Dial, dial, recommend
from graft.measure.runs import before_and_after, open_run, run_forgetting
from graft.train.config import make_run
from graft.train.run import train
from tiny import tiny

IDS = {"vocab_size": 4096, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
SILENT = Console(quiet=True)
PLAIN = {"method": "lora", "targets": "all-linear", "rank": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, rows of a task and general text."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("dial")
    tiny("llama", **IDS).save_pretrained(folder / "llama")
    load_tokenizer("embedded").save_pretrained(folder / "llama")
    animals = ["cat", "dog", "hen", "fox", "owl", "cow"]
    rows = [{"prompt": f"the {a} and the {b}", "completion": f"{b} {a}"} for a in animals for b in animals]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "general.txt").write_text("Once there was a river that nobody knew. " * 40, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Callable[..., Path]:
    """trained("lora", {...}): the folder of a finished run, trained once."""
    made: dict[str, Path] = {}

    def build(name: str, method: dict[str, Any], **data: Any) -> Path:
        if name not in made:
            run = make_run(
                {
                    "base": str(place / "llama"),
                    "precision": "fp32",
                    "method": method,
                    "name": "task",
                    "data": {"train": str(place / "rows.jsonl"), "eval": 0.25, "general": str(place / "general.txt")}
                    | data,
                    "train": {"lr": 1e-2, "max_steps": 8, "warmup": 0},
                    "output": str(place / name),
                }
            )
            made[name] = train(run, console=SILENT).folder
        return made[name]

    return build


def test_the_ends_are_the_base_and_the_adapter(trained: Callable[..., Path], place: Path) -> None:
    folder = trained("lora", PLAIN)
    found = dial(folder, Dial(scales=(0.0, 0.5, 1.0)), console=SILENT)
    base, half, whole = found["points"]
    assert base["kl"] == 0 and base["loss"] == found["base_loss"]
    opened = open_run(folder)
    rows, model, tokenizer = opened.rows(), opened.opened.model, opened.opened.tokenizer
    template = opened.opened.templates["task"]
    alone = load_base(str(place / "llama"), precision="fp32")
    assert base["score"] == pytest.approx(evaluate(alone, tokenizer, rows, template)["base"]["loss"], rel=1e-5)
    graft.load(alone, folder / "adapter", "task")
    scores = evaluate(alone, tokenizer, rows, template, ["task", {"task": 0.5}], ["loss"])
    assert whole["score"] == pytest.approx(scores["task"]["loss"], rel=1e-5)
    assert half["score"] == pytest.approx(scores["0.5*task"]["loss"], rel=1e-5)
    assert whole["score"] < half["score"] < base["score"], "what is compared must differ"
    (lost,) = forgetting(model, tokenizer, place / "general.txt", ["task"])
    assert whole["kl"] == pytest.approx(lost.kl, rel=1e-4) and 0 < half["kl"] < whole["kl"]
    stored = json.loads((folder / "result.json").read_text())["metrics"]
    assert whole["score"] == pytest.approx(stored["eval_loss"], rel=1e-4), "the rows are those the run held out"
    assert run_forgetting(folder)["task"].kl == pytest.approx(stored["forgetting_kl"], rel=1e-4)
    assert {file.name for file in (folder / "dial").iterdir()} >= {"dial.json", "dial.png", "dial.svg"}
    assert json.loads((folder / "dial" / "dial.json").read_text()) == found


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_stored_scale_is_the_weighted_entry_here_and_in_peft(trained: Callable[..., Path], place: Path) -> None:
    from peft import PeftModel

    folder = trained("lora", PLAIN)
    found = dial(folder, Dial(scales=(0.0, 1.0), store=0.6, tokens=64, limit=4), console=SILENT)
    stored = Path(found["stored"])
    assert stored == folder / "dial" / "adapter-0.6"
    ids = torch.tensor(pieces(place / "general.txt", load_tokenizer("embedded"), tiny("llama").config, limit=40)[:1])
    model = load_base(str(place / "llama"), precision="fp32")
    for name, source in (("task", folder / "adapter"), ("stored", stored)):
        graft.load(model, source, name)
    got = {}
    with torch.no_grad():
        for key, entry in {"weighted": {"task": 0.6}, "stored": "stored", "whole": "task"}.items():
            graft.use(model, entry)
            got[key] = model(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(load_base(str(place / "llama"), precision="fp32"), stored)
        got["peft"] = theirs(input_ids=ids).logits
    assert torch.allclose(got["stored"], got["weighted"], atol=1e-5)
    assert torch.allclose(got["peft"], got["weighted"], atol=1e-5)
    assert not torch.allclose(got["whole"], got["weighted"], atol=1e-3), "the comparison itself must see a difference"
    with pytest.raises(ConfigError, match=r"adapter-0\.6 exists"):
        dial(folder, Dial(store=0.6), console=SILENT)


def test_a_scale_that_cannot_be_stored_costs_no_trace(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no adapter: its factors compute something else than the scaled adapter."""
    folder = trained("refused", PLAIN)
    right = measured.combine
    monkeypatch.setattr(measured, "combine", lambda model, entry, name: right(model, {"task": 0.9}, name))
    asked, shown = Dial(scales=(0.0, 1.0), store=0.3, tokens=64, limit=4), Console(record=True, file=io.StringIO())
    with pytest.raises(AdapterFileError, match=r"adapter-0\.3: not stored, its logits are .* off those of scale 0\.3"):
        dial(folder, asked, console=shown)
    assert {file.name for file in (folder / "dial").iterdir()} == {"dial.json", "dial.png", "dial.svg"}
    found = json.loads((folder / "dial" / "dial.json").read_text())
    assert [point["scale"] for point in found["points"]] == [0, 1] and found["stored"] is None
    assert "see " in shown.export_text()
    monkeypatch.undo()
    again = dial(folder, asked, console=SILENT)
    assert json.loads((folder / "dial" / "dial.json").read_text()) == again
    assert again["stored"] == str(folder / "dial" / "adapter-0.3") and Path(again["stored"]).is_dir()


def test_bad_text_is_refused_before_any_row_is_scored(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "examine", lambda *args, **more: pytest.fail("the rows were scored"))
    with pytest.raises(DataError, match="no such file"):
        dial(trained("lora", PLAIN), Dial(text="missing.txt"), console=SILENT)


def test_what_is_recommended() -> None:
    points = [{"scale": s, "score": v, "kl": k} for s, v, k in ((0, 4.0, 0.0), (0.5, 2.0, 0.1), (1, 1.5, 0.4))]
    assert recommend(points, "loss", None)["recommended"] == 1
    assert recommend(points, "loss", 0.2)["recommended"] == 0.5
    assert recommend(points, "bleu", 0.2)["recommended"] == 0
    found = recommend(points[1:], "loss", 0.05)
    assert found["recommended"] is None and "the least is 0.1 at 0.5" in found["advice"]
    assert "as trained (scale 1) it is loss 1.5, forgetting 0.4" in recommend(points, "loss", 0.2)["advice"]
    nan = {"scale": -1, "score": float("nan"), "kl": float("nan")}
    assert recommend([nan, *points], "loss", None)["recommended"] == 1
    assert recommend([nan, points[2]], "loss", 0.2)["advice"].endswith("the least is 0.4 at 1")
    assert recommend([nan], "loss", 0.2) == {
        "recommended": None,
        "advice": "no scale has a finite score and forgetting",
    }


def test_what_has_no_dial_or_cannot_be_stored(trained: Callable[..., Path], place: Path, tmp_path: Path) -> None:
    for name, method in (
        ("full", {"method": "full"}),
        ("prompt", {"method": "prompt_tuning", "length": 2}),
        ("prefix", {"method": "prefix_tuning", "length": 2}),
    ):
        with pytest.raises(ConfigError, match=f"{method['method']} has no dial"):
            dial(trained(name, method), console=SILENT)
    folder = trained("ia3", {"method": "ia3"})
    with pytest.raises(ConfigError, match=r"store: ia3 at .* more than a product"):
        dial(folder, Dial(store=0.5), console=SILENT)
    assert not (folder / "dial").exists()
    assert dial(folder, Dial(scales=(0, 1), tokens=64, limit=4), console=SILENT)["points"][0]["kl"] == 0
    with pytest.raises(ConfigError, match="it holds no run"):
        dial(tmp_path, console=SILENT)
    with pytest.raises(ConfigError, match=r"no data\.general"):
        dial(trained("bare", PLAIN, general=None), console=SILENT)
    with pytest.raises(ConfigError, match="scales: give different"):
        Dial(scales=(1.0, 1.0))


def test_each_adapter_has_its_own_rows(trained: Callable[..., Path], place: Path) -> None:
    """Of a run with two, and only while the data are what they were."""
    lines = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    mixed = "".join(json.dumps({**row, "adapter": "ab"[n % 3 == 0]}) + "\n" for n, row in enumerate(lines))
    (place / "mixed.jsonl").write_text(mixed)
    folder = trained("two", PLAIN, train=str(place / "mixed.jsonl"))
    opened = open_run(folder)
    assert opened.names == ("a", "b")
    held = opened.rows()
    own = [row for row in held if row.adapter == "b"]
    assert 0 < len(own) < len(held) and opened.rows(adapter="b") == own
    source = load_rows(str(place / "mixed.jsonl"))
    assert opened.rows(str(place / "mixed.jsonl"), 3, "b") == [row for row in source if row.adapter == "b"][:3]
    assert opened.rows(str(place / "rows.jsonl"), 3, "b") == load_rows(str(place / "rows.jsonl"))[:3]
    found = dial(folder, Dial(scales=(0.0, 1.0), tokens=64, adapter="b"), console=SILENT)
    template, model = opened.opened.templates["b"], opened.opened.model
    right = evaluate(model, opened.opened.tokenizer, own, template, ["b"], ["loss"])["b"]["loss"]
    assert found["rows"] == len(own) and found["points"][1]["score"] == pytest.approx(right, rel=1e-5)
    with pytest.raises(DataError, match="no row is of adapter 'c'"):
        opened.rows(str(place / "mixed.jsonl"), adapter="c")
    (place / "mixed.jsonl").write_text(mixed + mixed.splitlines(keepends=True)[0])
    with pytest.raises(ConfigError, match=r"data\.train: the content changed since .*two was begun"):
        dial(folder, Dial(adapter="b"), console=SILENT)


def test_other_tasks_before_and_after(trained: Callable[..., Path], place: Path) -> None:
    opened = open_run(trained("lora", PLAIN)).opened
    rows = load_rows(str(place / "rows.jsonl"))
    found = before_and_after(opened, {"seen": rows[:4], "other": rows[4:8]}, ["task"], ["loss"])
    direct = evaluate(opened.model, opened.tokenizer, rows[:4], opened.templates["task"], [None, "task"], ["loss"])
    assert found["seen"].scores == direct and set(found) == {"seen", "other"}
    assert direct["task"]["loss"] < direct["base"]["loss"]


def test_the_command(trained: Callable[..., Path]) -> None:
    folder = str(trained("lora", PLAIN))
    done = CliRunner().invoke(
        app, ["measure", "dial", folder, "--scales", "0,1", "--limit", "4", "--tokens", "64", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert [point["scale"] for point in json.loads(done.stdout)["points"]] == [0, 1]
    refused = CliRunner().invoke(app, ["measure", "dial", folder, "--scales", "x"])
    assert refused.exit_code == 2 and "--scales x: expected numbers" in refused.output
