"""The search for the intrinsic dimension: what it runs, what it says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from graft.base import load_base, load_tokenizer
from graft.cli import app
from graft.errors import ConfigError, TrainingError
from graft.measure import intrinsic
from graft.measure.intrinsic import PLOT, RESULT, Search, measure
from graft.measure.plot import plot
from graft.train.config import Run, make_run
from graft.train.result import Result
from graft.train.run import Interrupted
from tiny import tiny

IDS = {"vocab_size": 4096, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
WORDS = {"good": ["kind", "warm", "brave", "bright"], "bad": ["cruel", "cold", "mean", "dark"]}
SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and a tiny Llama with a tokenizer, and rows that one word decides."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("measure")
    tokenizer = load_tokenizer("embedded")
    for kind in ("bert", "llama"):
        tiny(kind, **IDS).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    rows = [
        {"text": f"the {animal} is {word}", "label": label}
        for animal in ("cat", "dog", "hen", "fox", "owl", "cow", "pig", "bee")
        for label, words in WORDS.items()
        for word in words
    ]
    pairs = [{"prompt": row["text"], "completion": row["label"]} for row in rows]
    for name, content in (("labels", rows), ("prompts", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return folder


@pytest.fixture
def task(folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """task(base="llama", data={...}, train={...}, ...): a run of a few steps."""

    def build(kind: str = "bert", **parts: Any) -> Run:
        classify = kind == "bert"
        data = {"train": str(folder / ("labels.jsonl" if classify else "prompts.jsonl")), "eval": 0.25}
        data |= {"template": {"mode": "classification"} if classify else "plain"} | parts.pop("data", {})
        train = {"lr": 1e-2, "batch_size": 16, "max_steps": 4, "log_every": 2} | parts.pop("train", {})
        run = {"base": str(folder / kind), "precision": "fp32", "data": data, "train": train}
        return make_run({**run, "output": str(tmp_path / "out"), **parts})

    return build


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_classification_is_measured_by_its_accuracy(task: Callable[..., Run]) -> None:
    search = Search(sizes=(50,), lrs=(1e-3, 5e-2), seeds=2)
    found = measure(task(), search, console=SILENT)
    folder = Path(task().output)
    assert json.loads((folder / RESULT).read_text()) == found
    assert found["metric"] == "accuracy" and [entry["size"] for entry in found["sizes"]] == [50]
    assert found["threshold"] == pytest.approx(0.9 * found["full"]["score"])
    for entry in (found["full"], *found["sizes"]):
        by_rate: dict[float, list[float]] = {}
        for each in entry["runs"]:
            result = json.loads((Path(each["folder"]) / "result.json").read_text())
            assert result["metrics"]["eval_accuracy"] == each["score"] and result["settings"]["seed"] == each["seed"]
            assert result["settings"]["train"]["lr"] == each["lr"]
            by_rate.setdefault(each["lr"], []).append(each["score"])
            trained = found["total"] if entry is found["full"] else entry["size"]  # type: ignore[comparison-overlap]
            assert result["counts"]["trainable"] == trained
        if entry is not found["full"]:
            assert sorted(by_rate) == [0.00447, 0.224]  # 1e-3 and 5e-2, times sqrt(1000 / 50)
        means = {lr: sum(scores) / len(scores) for lr, scores in by_rate.items()}
        assert entry["score"] == pytest.approx(max(means.values())) and means[entry["lr"]] == max(means.values())
    reached = [entry["size"] for entry in found["sizes"] if entry["score"] >= found["threshold"]]
    assert found["d90"] == (reached[0] if reached else None)
    assert (folder / PLOT).read_bytes().startswith(b"\x89PNG")


def test_without_labels_the_score_is_the_drop_of_the_loss_and_a_second_call_trains_nothing(
    task: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = task("llama", method={"method": "intrinsic", "kind": "did", "seed": 4})
    search = Search(sizes=(5,), lrs=(3e-2,), full_lrs=(3e-3, 1e-2), seeds=1, share=0.1)
    found = measure(run, search, console=SILENT)
    for entry in (found["full"], *found["sizes"]):
        for each in entry["runs"]:
            metrics = json.loads((Path(each["folder"]) / "result.json").read_text())["metrics"]
            assert each["score"] == metrics["eval_loss_before"] - metrics["eval_loss"]
    assert {each["lr"] for each in found["full"]["runs"]} == {3e-3, 1e-2}
    settings = json.loads((Path(found["sizes"][0]["runs"][0]["folder"]) / "result.json").read_text())["settings"]
    assert settings["method"] == {"method": "intrinsic", "head": False, "size": 5, "kind": "did", "seed": 4}
    before = contents(Path(run.output) / "runs")
    monkeypatch.setattr("graft.train.run._train", lambda *_: pytest.fail("it trained again"))
    assert measure(run, search, console=SILENT) == found
    assert contents(Path(run.output) / "runs") == before


def scripted(monkeypatch: pytest.MonkeyPatch, scores: Callable[[Run], float]) -> list[str]:
    """Put `scores` in the place of training; the folders that would have been trained, in order."""
    asked: list[str] = []

    def train(run: Run, **_: Any) -> Result:
        asked.append(Path(run.output).name)
        return Result(run, {"eval_accuracy": scores(run)}, 0, 0.0, 0, 0, Path(run.output))

    monkeypatch.setattr(intrinsic, "train", train)
    return asked


def by_size(run: Run) -> float:
    """Full fine-tuning has 0.8; dimensions approach it, best at a rate of 0.01 for d = 1000."""
    size = run.method.to_dict().get("size", 1000)
    rate = 0.0 if run.train.lr < 0.02 * (1000 / size) ** 0.5 else 0.2
    return 0.8 * (1 - 10 / size) - rate if run.method.name != "full" else 0.8


def test_the_search_ends_at_the_first_that_reaches_the_share(
    task: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(monkeypatch, by_size)
    found = measure(task(), Search(sizes=(300, 60, 120, 80), lrs=(0.1, 0.01), seeds=1), console=SILENT)
    assert found["d90"] == 120 and found["threshold"] == pytest.approx(0.72)  # 0.8 * (1 - 10 / 120) = 0.733
    assert asked[0] == "full-lr0.01-seed0"
    assert [entry["size"] for entry in found["sizes"]] == [60, 80, 120]
    assert [entry["lr"] for entry in found["sizes"]] == [0.0408, 0.0354, 0.0289]
    missed = measure(task(), Search(sizes=(60, 80), seeds=1), fresh=True, console=SILENT)
    assert missed["d90"] is None and Path(task().output).with_name("out-2").is_dir()


def test_the_grid_starts_above_the_tensors_and_ends_below_all(
    task: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda run: 0.8 if run.method.name == "full" else 0.1)
    found = measure(task(), Search(seeds=1), console=SILENT)
    tensors = len(list(load_base(task().base, precision="fp32", num_labels=2).parameters()))
    assert found["tensors"] == tensors == 41
    assert [entry["size"] for entry in found["sizes"]] == [100, 300, 1000, 3000, 10_000, 30_000, 100_000]
    did = measure(task(method={"method": "intrinsic", "kind": "did"}), Search(seeds=1), fresh=True, console=SILENT)
    assert did["sizes"][0]["size"] == 10


def test_a_rate_that_fails_is_left_out_and_an_interruption_is_not(
    task: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(run: Run) -> float:
        if run.method.name != "full" and run.train.lr > 0.1:
            raise TrainingError("the loss is not finite")
        return 0.75

    scripted(monkeypatch, failing)
    found = measure(task(), Search(sizes=(60,), lrs=(0.1, 0.01), seeds=1), console=SILENT)
    assert found["sizes"][0]["lr"] == 0.0408 and found["sizes"][0]["runs"][0]["failed"] == "the loss is not finite"
    with pytest.raises(TrainingError, match=r"d=60: every training failed, the last with: the loss.*give lower --lrs"):
        measure(task(), Search(sizes=(60,), lrs=(0.1,), seeds=1), fresh=True, console=SILENT)

    def stopped(run: Run) -> float:
        raise Interrupted("Ctrl-C")

    scripted(monkeypatch, stopped)
    with pytest.raises(Interrupted):
        measure(task(), Search(sizes=(60,), seeds=1), fresh=True, console=SILENT)


def test_an_aim_that_the_commonest_label_reaches_is_noted(
    task: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda run: 0.5)
    found = measure(task(), Search(sizes=(60,), seeds=1), console=SILENT)
    assert len(found["notes"]) == 1 and "the commonest label has an accuracy of" in found["notes"][0]
    scripted(monkeypatch, lambda run: 0.95)
    assert measure(task(), Search(sizes=(60,), seeds=1), fresh=True, console=SILENT)["notes"] == []


def test_nothing_learnt_is_an_error(task: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda run: 0.0)
    with pytest.raises(TrainingError, match=r"full fine-tuning learns nothing \(accuracy 0\)"):
        measure(task(), Search(sizes=(60,), seeds=1), console=SILENT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ()}, "sizes: give different numbers above 0"),
        ({"sizes": (10, 10)}, "sizes: give different numbers"),
        ({"lrs": (0.0,)}, "lrs: give different numbers above 0"),
        ({"full_lrs": (-1.0,)}, "full_lrs: give different numbers above 0"),
        ({"share": 1.5}, "share: it is above 0 and at most 1"),
        ({"seeds": 0}, "seeds: at least 1"),
    ],
)
def test_bad_searches(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Search(**options)


def test_bad_settings_are_refused_before_anything_trains(task: Callable[..., Run], folder: Path) -> None:
    rows = [json.loads(line) | {"adapter": name} for line in (folder / "labels.jsonl").read_text().splitlines()
            for name in ("a", "b")]  # fmt: skip
    two = folder / "two.jsonl"
    two.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for parts, message in (
        ({"method": "lora"}, "method: lora has no part in this; leave it out, or say method: intrinsic"),
        ({"method": {"method": "intrinsic", "size": 5}}, r"method.size: the search chooses it; give --sizes"),
        ({"data": {"eval": None}}, r"data.eval: the scores are of held-out rows"),
        ({"precision": "nf4"}, "precision: full fine-tuning cannot train a base in nf4"),
        ({"data": {"train": str(two)}}, "its rows name 2 adapters"),
    ):
        with pytest.raises(ConfigError, match=message):
            measure(task(**parts), console=SILENT)
    for wrong in (41, 10**9):
        with pytest.raises(ConfigError, match=f"sizes: {wrong} is not between 41 "):
            measure(task(), Search(sizes=(wrong, 50)), console=SILENT)
    output = Path(task().output)
    assert not output.exists()
    output.mkdir()
    (output / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else than a measurement"):
        measure(task(), console=SILENT)


def test_the_verb(task: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, by_size)
    settings = {key: value for key, value in task().model_dump(mode="json").items() if key != "method"}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    call = ["measure", "intrinsic-dimension", str(tmp_path / "run.yaml"), "--sizes", "60,200", "--seeds", "1"]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0 and "d90 = 200, " in shown.stdout and "full, lr 0.01, seed 0" in shown.stdout
    as_json = CliRunner().invoke(app, [*call, "--json", f"output={tmp_path / 'other'}"])
    assert json.loads(as_json.stdout)["d90"] == 200
    for extra, message in ((["--sizes", "60,x"], "--sizes 60,x: expected numbers"), (["--share", "2"], "share: it is")):
        bad = CliRunner().invoke(app, [*call, *extra])
        assert bad.exit_code == 2 and message in bad.output
    missing = CliRunner().invoke(app, [*call[:2], str(tmp_path / "none.yaml")])
    assert missing.exit_code == 2 and "no such file" in missing.output


def test_the_picture_of_a_search_that_found_nothing(tmp_path: Path) -> None:
    entry = {"score": 0.4, "lr": 0.1, "runs": [{"lr": 0.1, "score": 0.4}, {"lr": 1.0, "score": None}]}
    found = {"sizes": [{"size": 100, **entry}], "full": entry, "threshold": 0.36, "share": 0.9, "d90": None}
    found |= {"kind": "said", "total": 10**6, "metric": "accuracy", "data": "a/rows.jsonl", "base": "embedded"}
    plot(found, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
