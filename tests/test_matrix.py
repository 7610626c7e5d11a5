"""The matrix of fine-tuning against in-context learning: what it runs, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import multiprocessing
import shutil
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from rich.console import Console
from scipy import stats

from graft import base
from graft.adapt import attach
from graft.base import load_base, load_tokenizer
from graft.compare import matrix
from graft.compare.cells import near_chance, summary, t_and_p
from graft.compare.matrix import run_matrix
from graft.compare.matrix_page import matrix_html, write_page
from graft.compare.matrix_settings import load_matrix, make_matrix
from graft.data.rows import load_rows
from graft.data.template import Template
from graft.errors import ConfigError, DataError, TrainingError
from graft.evaluate.icl import few_shot, label_scores, one_pattern
from graft.evaluate.run import examine
from graft.evaluate.shots import draw
from graft.files import load
from graft.train.config import Run, load_run
from graft.train.run import train
from graft.train.setup import Opened
from tiny import tiny

IDS = {"vocab_size": 4096, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
WORDS = {"good": ["kind", "warm", "brave", "bright"], "bad": ["cruel", "cold", "mean", "dark"]}
TEMPLATE = {
    "kind": "plain",
    "templates": ["Review: {text}\nMood:", "{text} It was"],
    "verbalizer": {"good": "fine", "bad": "really awful"},
}
SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, rows to draw from, and rows of two domains."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("matrix")
    tiny("llama", **IDS, initializer_range=0.2).save_pretrained(folder / "llama")
    load_tokenizer("embedded").save_pretrained(folder / "llama")
    for name, animals in (("train", ("cat", "dog", "hen")), ("near", ("fox", "owl")), ("far", ("old grey rock",))):
        rows = [{"text": f"the {a} is {w}", "label": label} for a in animals for label, ws in WORDS.items() for w in ws]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def settings(folder: Path) -> Callable[..., matrix.MatrixSettings]:
    def build(**changes: Any) -> matrix.MatrixSettings:
        few = {"epochs": 1, "batch_size": 4, "lr": 0.01}
        given: dict[str, Any] = {
            "bases": [str(folder / "llama")],
            "precision": "fp32",
            "train": str(folder / "train.jsonl"),
            "tests": {
                "near": {"source": str(folder / "near.jsonl")},
                "far": {"source": str(folder / "far.jsonl"), "out_of_domain": True, "limit": 7},
            },
            "template": TEMPLATE,
            "methods": {"full": {"method": "full", "train": few}},
            "shots": 4,
            "seeds": 2,
        }
        return make_matrix(given | changes)

    return build


@pytest.fixture(scope="module")
def done(folder: Path, settings: Callable[..., matrix.MatrixSettings]) -> tuple[dict[str, Any], Path]:
    """A finished matrix and its folder."""
    place = folder / "done"
    return run_matrix(settings(), place, SILENT), place


Done = tuple[dict[str, Any], Path]
Build = Callable[..., matrix.MatrixSettings]


def values(found: dict[str, Any], approach: str, pattern: int, test: str) -> list[float]:
    wanted = {"approach": approach, "pattern": pattern, "test": test}
    return next(entry["values"] for entry in found["accuracies"] if wanted.items() <= entry.items())


def test_cells_are_differences_of_means(done: Done) -> None:
    found, _ = done
    assert len(found["cells"]) == 2 * 2 * 2  # tests, patterns, in-context approaches, methods
    of = {"ICL": "icl", "ICL calibrated": "icl_calibrated", "full": "full"}
    for cell in found["cells"]:
        row = values(found, of[cell["row"]], cell["pattern"], cell["test"])
        column = values(found, of[cell["column"]], cell["pattern"], cell["test"])
        assert len(row) == len(column) == 2
        assert cell["difference"] == pytest.approx(sum(column) / 2 - sum(row) / 2)


def test_in_context_results_are_those_of_few_shot(folder: Path, done: Done) -> None:
    """The base must be what it was after every fine-tuning, so a fresh one gives the same."""
    found, _ = done
    base, tokenizer = str(folder / "llama"), load_tokenizer("embedded")
    model = load_base(base, precision="fp32")
    pool, rows = load_rows(str(folder / "train.jsonl")), load_rows(str(folder / "far.jsonl"))[:7]
    template = Template.from_dict(TEMPLATE)
    for pattern in (0, 1):
        for calibrate, name in ((False, "icl"), (True, "icl_calibrated")):
            right = [
                few_shot(model, tokenizer, rows, pool, template, shots=4, seed=s, pattern=pattern, calibrate=calibrate)
                for s in range(2)
            ]
            assert values(found, name, pattern, "far") == [each.scores["base"]["accuracy"] for each in right]
        zero = few_shot(model, tokenizer, rows, (), template, shots=0, pattern=pattern).scores["base"]["accuracy"]
        assert values(found, "zero_shot", pattern, "far") == [zero]


def test_both_sides_see_the_same_examples(folder: Path, done: Done) -> None:
    _, place = done
    pool = load_rows(str(folder / "train.jsonl"))
    results = [json.loads(file.read_text()) for file in (place / "results").iterdir()]
    assert len(results) == 2 * (1 + 2 * 2)
    for result in results:
        drawn = [] if result["approach"] == "zero_shot" else draw(pool, 4, result["seed"])
        assert result["shots"] == [row.index for row in drawn]
    trained = sorted((place / "runs").iterdir())
    assert len(trained) == 2 * 2 and all(file.suffix == ".jsonl" for file in trained), "adapters are removed"
    for file in trained:
        seed = int(file.stem.split("seed")[1].split("-")[0])
        assert [row.question for row in load_rows(str(file))] == [row.question for row in draw(pool, 4, seed)]


def test_fine_tuning_learns_with_the_pattern(folder: Path, settings: Build, tmp_path: Path) -> None:
    """One word decides, and all of them were shown; `examine`, with the end token, chooses the same."""
    eight = (folder / "train.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "rows.jsonl").write_text("".join(eight))
    few = {"epochs": 25, "batch_size": 8, "lr": 0.004}
    made = settings(
        bases=["embedded"],
        train=str(tmp_path / "rows.jsonl"),
        tests={"near": {"source": str(folder / "near.jsonl")}},
        methods={"lora": {"method": {"method": "lora", "targets": "all-linear"}, "train": few}},
        patterns=[1],
        shots=8,
        seeds=1,
        keep_adapters=True,
        calibrated=False,
    )
    found = run_matrix(made, tmp_path / "out", SILENT)
    assert values(found, "lora", 1, "near") == [1.0]
    assert found["cells"][0]["p"] is None and "1 cells have no test" in " ".join(found["notes"])
    adapter = next((tmp_path / "out" / "runs").glob("*/adapter"))
    model = load_base("embedded", precision="fp32")
    load(model, adapter, "lora")
    rows, template = load_rows(str(folder / "near.jsonl")), one_pattern(Template.from_dict(TEMPLATE), 1)
    told = examine(model, load_tokenizer("embedded"), rows, template, ["lora"], ["accuracy"])
    assert told.scores["lora"]["accuracy"] == 1.0


def test_one_after_another_gives_what_each_gives_alone(
    folder: Path, settings: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, on one base that is loaded once, also behind a training that failed; alone is a plain training and a
    fresh base."""
    seen: list[torch.Tensor] = []
    loaded: list[Any] = []

    def scores(*given: Any) -> Any:
        found = label_scores(*given)
        seen.append(found.log_NC)
        return found

    def loads(*given: Any, **more: Any) -> Any:
        loaded.append(load_base(*given, **more))
        return loaded[-1]

    monkeypatch.setattr(matrix, "label_scores", scores)
    for module in (matrix, base):
        monkeypatch.setattr(module, "load_base", loads)
    few, lora = {"epochs": 2, "batch_size": 4, "lr": 0.01}, {"method": "lora", "dropout": 0.3}
    methods = {"full": {"method": "full", "train": few}, "lora": {"method": lora, "train": few}}
    methods["again"] = methods["full"]
    failing = {"method": "full", "train": few | {"lr": 1e30}}
    tests = {"near": {"source": str(folder / "near.jsonl")}}
    made = settings(
        methods={"failing": failing, **methods},
        tests=tests,
        patterns=[0],
        seeds=1,
        keep_adapters=True,
        calibrated=False,
    )
    assert [each["approach"] for each in run_matrix(made, tmp_path, SILENT)["failed"]] == ["failing"]
    (used,) = loaded
    rows, template = load_rows(tests["near"]["source"]), one_pattern(Template.from_dict(TEMPLATE), 0)
    asked: list[Any] = [load_tokenizer("embedded"), rows, [], template]
    fresh = load_base(str(folder / "llama"), precision="fp32")
    assert not hasattr(used, "adapters") and torch.equal(label_scores(used, *asked).log_NC, seen[0])
    for found, right in zip(used.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(found, right) and found.requires_grad
    for name, there in zip(methods, seen[2:], strict=True):
        (place,) = (tmp_path / "runs").glob(f"llama-{name}-*/adapter")
        plain = train(load_run(place.parent / "run.yaml", [f"output={tmp_path / name}"]), console=SILENT).adapter
        for file in place.glob("*.safetensors"):
            assert file.read_bytes() == (plain / file.name).read_bytes()
        model = load_base(str(folder / "llama"), precision="fp32")
        load(model, plain, name)
        assert torch.equal(label_scores(model, *asked, name).log_NC, there)


def test_a_training_that_breaks_off_leaves_nothing_on_the_base(
    settings: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def breaks(run: Run, console: Console, opened: Opened) -> None:
        model: Any = opened.model
        attach(model, run.method, run.name)
        ids = torch.tensor([[5, 6, 7]])
        model(input_ids=ids, labels=ids).loss.backward()
        raise TrainingError("the loss is not finite")

    def scores(model: Any, *given: Any) -> Any:
        asked.append(hasattr(model, "adapters") or any(each.grad is not None for each in model.parameters()))
        return label_scores(model, *given)

    monkeypatch.setattr(matrix, "train", breaks)
    monkeypatch.setattr(matrix, "label_scores", scores)
    found = run_matrix(settings(patterns=[0], calibrated=False), tmp_path, SILENT)
    assert len(found["failed"]) == 2 and asked == [False] * 6  # the pattern alone and two seeds, two sets each


def test_without_room_a_method_is_skipped_before_the_base_takes_its_part(
    settings: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[int] = []
    order: list[str] = []

    def loads(*given: Any, **more: Any) -> Any:
        order.append("base")
        return load_base(*given, **more)

    def left() -> int:
        order.append("room")
        return rooms.pop()

    monkeypatch.setattr(matrix, "load_base", loads)
    monkeypatch.setattr("graft.planning.devices.available", left)
    few = {"max_steps": 1}
    methods = {name: {"method": name, "train": few} for name in ("full", "lora")}
    rooms[:] = [2**40, 1000, 1000]  # from the end: full asks twice, for it looks for settings that would fit
    found = run_matrix(settings(methods=methods, patterns=[0], seeds=1), tmp_path, SILENT)
    assert [each["approach"] for each in found["failed"]] == ["full"]
    assert found["failed"][0]["why"].startswith("train: this needs ") and "--force" not in found["failed"][0]["why"]
    assert {cell["column"] for cell in found["cells"]} == {"lora"} and order.index("base") == order.count("room")


def test_only_the_draws_that_do_not_fit_are_skipped(
    folder: Path, settings: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 1 alone draws the long row."""
    asked: list[int] = []

    def room(run: Any, config: Any, tokenizer: Any, data: Any, **more: Any) -> None:
        asked.append(run.seed)
        if run.seed == 1:
            raise ConfigError("train: too large; or --force tries it all the same")

    def long(row: Any) -> Any:
        text = row.text + " the cat" * 30
        return replace(row, text=text, fields={**row.fields, "text": text})

    plain = matrix.draw
    drawn: Callable[..., Any] = lambda pool, shots, seed=0, **more: [  # noqa: E731
        long(row) if seed else row for row in plain(pool, shots, seed, **more)
    ]
    monkeypatch.setattr(matrix, "check_room", room)
    monkeypatch.setattr(matrix, "draw", drawn)
    methods = {"lora": {"method": "lora", "train": {"max_steps": 1}}}
    found = run_matrix(settings(methods=methods, patterns=[0], seeds=2), tmp_path / "out", SILENT)
    assert [(each["approach"], each["seed"], each["why"]) for each in found["failed"]] == [
        ("lora", 1, "train: too large")
    ]
    assert asked == [1, 0] or sorted(asked) == [0, 1]


def test_a_base_that_cannot_take_the_template_does_not_stop_the_others(
    folder: Path, settings: Build, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder / "llama", other)
    (other / "chat_template.jinja").unlink()
    made = settings(
        bases=[str(other), str(folder / "llama")],
        template={**TEMPLATE, "kind": "chat"},
        methods={"lora": {"method": "lora", "train": {"max_steps": 1}}},
        patterns=[0],
        seeds=1,
    )
    found = run_matrix(made, tmp_path / "out", SILENT)
    assert {(each["base"], "chat template" in each["why"]) for each in found["failed"]} == {("other", True)}
    assert len(found["failed"]) == 3
    assert {each["base"] for each in found["accuracies"]} == {"llama"}


def test_only_the_columns_that_are_read_are_trained_on(folder: Path, settings: Build, tmp_path: Path) -> None:
    """JSON has no dates, and a column `adapter` would split the training."""
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    more = {"when": datetime(2020, 2, 3), "tone": "plain"}
    table = [
        {"sentence": row["text"], "label": row["label"], "adapter": f"of_{n % 2}"} | more for n, row in enumerate(lines)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "train.parquet")
    methods = {"lora": {"method": "lora", "train": {"max_steps": 1}}}
    template = {**TEMPLATE, "templates": ["A {tone} one, {{so}}: {sentence}\nMood:"]}
    asked = {"sentence": "the fox is warm", "label": "good", "tone": "dry"}
    (tmp_path / "near.jsonl").write_text(json.dumps(asked))
    tests = {"near": {"source": str(tmp_path / "near.jsonl")}}
    made = settings(train=str(tmp_path / "train.parquet"), methods=methods, template=template, tests=tests, seeds=1)
    found = run_matrix(made, tmp_path / "out", SILENT)
    assert not found["failed"] and {cell["column"] for cell in found["cells"]} == {"lora"}
    (file,) = (tmp_path / "out" / "runs").glob("*.jsonl")
    assert set(json.loads(file.read_text().splitlines()[0])) == {"text", "label", "sentence", "tone"}
    template["templates"] = ["{when} {sentence}\nMood:"]
    (tmp_path / "near.jsonl").write_text(json.dumps(asked | {"when": "today"}))
    found = run_matrix(made.model_copy(update={"template": template}), tmp_path / "when", SILENT)
    assert {each["approach"] for each in found["failed"]} == {"icl", "lora"} and len(found["accuracies"]) == 1
    assert all("'{when}' is a datetime" in each["why"] for each in found["failed"])


def test_the_same_call_does_nothing_again(
    done: Done, settings: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, place = done
    before = {file.name: file.stat().st_mtime_ns for file in (place / "results").iterdir()}
    calls: list[Any] = []
    monkeypatch.setattr(matrix, "_measure", lambda *given: calls.append(given))
    assert run_matrix(settings(), place, SILENT) == found
    assert {file.name: file.stat().st_mtime_ns for file in (place / "results").iterdir()} == before and not calls


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"shots": 5}, 2 * 2 * 2),
        ({"seeds": 3}, 2 * 2),
        ({"batch_size": 3}, 0),
        ({"methods": {"full": {"method": "full", "train": {"lr": 0.5}}}}, 2 * 2),
    ],
    ids=str,
)
def test_a_changed_setting_makes_new_results(done: Done, settings: Build, changes: Any, new: int) -> None:
    _, place = done
    made = settings(**changes)
    sets = matrix._sets(made)
    names = {
        matrix._file_name(made, sets, made.bases[0], approach, pattern, seed)
        for pattern, seed, approach in matrix._units(made, sets)
    }
    assert len(names - {file.stem for file in (place / "results").iterdir()}) == new


def test_killed_in_the_middle_it_goes_on(done: Done, settings: Build, tmp_path: Path) -> None:
    found, _ = done
    less = settings(patterns=[1])
    process = multiprocessing.get_context("fork").Process(target=run_matrix, args=(less, tmp_path, SILENT))
    process.start()
    while process.is_alive() and len(list((tmp_path / "results").glob("*.json"))) < 2:
        time.sleep(0.01)
    process.kill()
    process.join()
    there = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "results").glob("*.json")}
    assert 2 <= len(there) < 5 and not (tmp_path / "matrix.json").exists()
    again = run_matrix(less, tmp_path, SILENT)
    assert there.items() <= {f.name: f.stat().st_mtime_ns for f in (tmp_path / "results").glob("*.json")}.items()
    assert len(again["accuracies"]) == 4 * 2
    assert all(entry in found["accuracies"] for entry in again["accuracies"]), "as in an undisturbed one"


def test_a_method_that_cannot_is_skipped_by_name(settings: Build, tmp_path: Path) -> None:
    few = {"max_steps": 1}
    long = {"method": {"method": "prompt_tuning", "length": 500}, "train": few}
    methods = {"far_too_long": long, "lora": {"method": "lora", "train": few}}
    made = settings(methods=methods, seeds=1, patterns=[0])
    found = run_matrix(made, tmp_path, SILENT)
    assert [each["approach"] for each in found["failed"]] == ["far_too_long"]
    assert {cell["column"] for cell in found["cells"]} == {"lora"}
    assert any("Skipped: far_too_long on llama: method.length" in note for note in found["notes"])
    assert "far_too_long" in (tmp_path / "matrix.html").read_text()


def shorter(folder: Path, context: int) -> str:
    """A base that takes so many tokens."""
    tiny("llama", **{**IDS, "max_position_embeddings": context}).save_pretrained(folder / "small")
    load_tokenizer("embedded").save_pretrained(folder / "small")
    return str(folder / "small")


def test_a_base_that_cannot_hold_the_examples_stops_no_other(folder: Path, settings: Build, tmp_path: Path) -> None:
    methods = {"lora": {"method": "lora", "train": {"max_steps": 1}}}
    bases = [shorter(tmp_path, 30), str(folder / "llama")]
    found = run_matrix(settings(bases=bases, methods=methods, patterns=[0]), tmp_path / "out", SILENT)
    assert [(each["base"], each["approach"]) for each in found["failed"]] == [("small", "icl")] * 2  # two seeds
    there = {(entry["base"], entry["approach"]) for entry in found["accuracies"]}
    assert there == {("small", "zero_shot"), ("small", "lora")} | {
        ("llama", approach) for approach in ("zero_shot", "icl", "icl_calibrated", "lora")
    }
    assert sum("Skipped: icl on small" in note and "demonstrations" in note for note in found["notes"]) == 1
    alone = settings(bases=[shorter(tmp_path, 4)], methods=methods, seeds=1, patterns=[0])
    with pytest.raises(DataError, match="the context has 4"):
        run_matrix(alone, tmp_path / "none", SILENT)
    assert not list((tmp_path / "none").glob("matrix.*"))


def test_without_fine_tuning_there_is_no_picture(settings: Build, tmp_path: Path) -> None:
    few = {"max_steps": 1}
    methods = {"far_too_long": {"method": {"method": "prompt_tuning", "length": 500}, "train": few}}
    for kind in ("png", "svg"):
        (tmp_path / f"matrix.{kind}").write_text("of an earlier call")
    found = run_matrix(settings(methods=methods, seeds=1, patterns=[0]), tmp_path, SILENT)
    assert found["cells"] == [] and any("There is no cell" in note for note in found["notes"])
    assert not list(tmp_path.glob("matrix.png")) and not list(tmp_path.glob("matrix.svg"))
    assert "There is no cell" in (tmp_path / "matrix.html").read_text()


def test_all_approaches_choose_among_the_words_of_the_pool(folder: Path, settings: Build, tmp_path: Path) -> None:
    """Also where a set has one label, and the template names no words."""
    goods = [line for line in (folder / "far.jsonl").read_text().splitlines(keepends=True) if '"good"' in line]
    (tmp_path / "goods.jsonl").write_text("".join(goods))
    few = {"lora": {"method": "lora", "train": {"max_steps": 1}}}
    tests = {"goods": {"source": str(tmp_path / "goods.jsonl"), "out_of_domain": True}}
    template = {key: value for key, value in TEMPLATE.items() if key != "verbalizer"}
    made = settings(methods=few, tests=tests, template=template, seeds=1, patterns=[0])
    run_matrix(made, tmp_path / "out", SILENT)
    for file in (tmp_path / "out" / "results").iterdir():
        for chosen in json.loads(file.read_text())["chosen"].values():
            assert list(chosen["goods"]) == ["bad", "good"]
    odd = {"text": "the cat is odd", "label": "odd"}
    (tmp_path / "goods.jsonl").write_text("".join(goods) + json.dumps(odd) + "\n")
    with pytest.raises(DataError, match="row 5: label 'odd' has no word"):
        run_matrix(made, tmp_path / "odd", SILENT)
    assert not (tmp_path / "odd").exists(), "nothing may have run"


def test_another_base_at_the_same_place_makes_new_results(folder: Path, settings: Build, tmp_path: Path) -> None:
    shutil.copytree(folder / "llama", tmp_path / "llama")
    made, names = settings(bases=[str(tmp_path / "llama")]), []
    for spread in (0.2, 0.2, 0.1):
        tiny("llama", **IDS, initializer_range=spread).save_pretrained(tmp_path / "llama")
        names.append(matrix._file_name(made, matrix._sets(made), made.bases[0], "icl", 0, 0))
    assert names[0] == names[1] != names[2]


def test_another_kind_of_device_makes_new_results(settings: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is fp32 here and bf16 there; a device by its name is what it would be without."""

    def name(device: str | None) -> str:
        made = settings(device=device, precision="auto")
        return matrix._file_name(made, matrix._sets(made), made.bases[0], "icl", 0, 0)

    here = name(None)
    assert name("cpu") == here
    for asked, answer in (("is_available", True), ("is_bf16_supported", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, asked, lambda *_, answer=answer, **__: answer)
    assert name("cpu") == here != name(None)
    assert name(None) == name("cuda") == name("cuda:1")


# ------------------------------------------------------------------------------------------------- what is said


def planted(icl: list[float], tuned: list[float]) -> dict[str, Any]:
    """A summary of given accuracies, of one pattern and a test with labels at .3, .3 and .4."""
    tests = {"t": {"rows": 100, "left_out": 0, "out_of_domain": False, "shares": {"a": 0.3, "b": 0.3, "c": 0.4}}}
    facts = {"patterns": {"0": "<p> & {text}"}, "pool": {"rows": 50, "left_out": {}}, "tests": tests}
    results = [
        {"base": "b", "approach": approach, "pattern": 0, "seed": seed, "accuracy": {approach: {"t": value}}}
        for approach, each in (("icl", icl), ("lora", tuned))
        for seed, value in enumerate(each)
    ]
    return summary({"bases": ["b"], "shots": 16, "seeds": len(icl)}, facts, results, [])


def test_near_chance_is_said() -> None:
    near = planted([0.31, 0.35, 0.40, 0.36], [0.33, 0.41, 0.38, 0.36])
    assert "Every accuracy is near chance" in near["notes"][0]
    half = planted([0.31, 0.35, 0.40, 0.36], [0.81, 0.84, 0.79, 0.80])
    assert "1 of 2 accuracies are near chance" in half["notes"][0]
    assert "Of 1 cells fine-tuning is better in 1 and in-context learning in 0" in half["notes"][1]
    far = planted([0.7, 0.71, 0.72], [0.81, 0.84, 0.79])
    assert "near chance" not in " ".join(far["notes"])
    assert near_chance({"low": 0.4, "high": 0.5}, 0.3, 0.4) and not near_chance({"low": 0.41, "high": 0.5}, 0.3, 0.4)
    assert not near_chance({"low": 0.1, "high": 0.29}, 0.3, 0.4)


def test_intervals_and_tests_by_hand_and_scipy() -> None:
    entry = planted([0.6, 0.7, 0.8], [0.5, 0.5, 0.5])["accuracies"][0]
    half = 4.302653 * 0.1 / 3**0.5  # t of 2 degrees of freedom, standard deviation .1
    assert (entry["low"], entry["high"]) == pytest.approx((0.7 - half, 0.7 + half), abs=1e-6)
    alone = planted([0.5], [0.5])["accuracies"][0]
    assert (alone["low"], alone["high"]) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson's of 50 of 100
    a, b = [0.31, 0.35, 0.4, 0.36], [0.41, 0.44, 0.36]
    right = stats.ttest_ind(b, a, equal_var=False)
    (cell,) = planted(a, b)["cells"]
    assert (cell["t"], cell["p"]) == pytest.approx((right.statistic, right.pvalue), rel=1e-9)
    assert t_and_p([0.5, 0.5], [0.7, 0.7]) == (None, None) and t_and_p([0.5], [0.7, 0.8]) == (None, None)


def test_pages(tmp_path: Path) -> None:
    found = planted([0.31, 0.35, 0.40, 0.36], [0.81, 0.84, 0.79, 0.80])
    write_page(found, tmp_path)
    assert json.loads((tmp_path / "matrix.json").read_text()) == found
    lines = list(csv.DictReader((tmp_path / "matrix.csv").read_text(encoding="utf-8").splitlines()))
    assert len(lines) == 8 and lines[0]["accuracy"] == "0.31" and lines[0]["approach"] == "icl"
    assert (tmp_path / "matrix.png").read_bytes()[:4] == b"\x89PNG"
    assert ElementTree.parse(tmp_path / "matrix.svg").getroot().tag.endswith("svg")
    page = ElementTree.fromstring(matrix_html(found))  # closed and escaped
    text = "".join(page.itertext())
    cell = found["cells"][0]
    assert f"{cell['difference']:+.3f}***" in text and "<p> & {text}" in text and "near chance" in text
    assert not list(tmp_path.glob("*.partial"))


def test_several_bases_are_rows_and_columns(folder: Path, settings: Build, tmp_path: Path) -> None:
    small = tmp_path / "small"
    tiny("llama", **{**IDS, "num_hidden_layers": 1}).save_pretrained(small)
    load_tokenizer("embedded").save_pretrained(small)
    methods = {"lora": {"method": "lora", "train": {"max_steps": 1}}}
    made = settings(bases=[str(folder / "llama"), str(small)], methods=methods, seeds=1, patterns=[0], calibrated=False)
    found = run_matrix(made, tmp_path / "out", SILENT)
    pairs = {(cell["row"], cell["column"]) for cell in found["cells"]}
    names = ("llama", "small")
    assert pairs == {(f"ICL, {a}", f"lora, {b}") for a in names for b in names}


# ------------------------------------------------------------------------------------------------- refusals


def test_rows_are_chosen_by_length_and_apart(folder: Path, settings: Build, tmp_path: Path) -> None:
    more = (folder / "near.jsonl").read_text().splitlines()[:2] + (folder / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(more) + "\n")
    tokenizer = load_tokenizer("embedded")
    rows = load_rows(str(folder / "near.jsonl"))
    length = {
        row.index: max(
            len(tokenizer(text.format(text=row.text) + f" {TEMPLATE['verbalizer'][row.label]}").input_ids)  # type: ignore[index]
            for text in TEMPLATE["templates"]
        )
        + 1
        for row in rows
    }
    most = sorted(length.values())[len(length) // 2]
    sets = matrix._sets(settings(train=str(tmp_path / "train.jsonl"), max_question_tokens=most))
    kept = [index for index, each in length.items() if each <= most]
    assert [row.index for row in sets.tests["near"]] == kept and 0 < len(kept) < len(rows)
    assert sets.left_out["near"] == len(rows) - len(kept)
    assert sets.left_out["train_tested"] == sum(index in kept for index in (1, 2)) and len(sets.pool) >= 24


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shots": 25}, "24 rows for 25 shots"),
        ({"shots": 0}, "matrix: shots"),
        ({"sots": 3}, "matrix: sots: unknown key"),
        ({"template": {"kind": "plane"}}, "matrix.template kind 'plane' is unknown"),
        ({"template": {"mode": "classification", "kind": "plain"}}, "needs labels, and words"),
        ({"template": {**TEMPLATE, "verbalizer": {"good": "fine"}}}, "label 'bad' has no word"),
        ({"patterns": [2]}, "pattern 2: the template has 2"),
        ({"methods": {"icl": {"method": "lora"}}}, "matrix.methods.icl: take another name"),
        ({"bases": ["a/b", "c/b"]}, "two are called b"),
        ({"max_question_tokens": 2}, "no row has at most 2 tokens"),
    ],
    ids=str,
)
def test_refusals(settings: Build, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        run_matrix(settings(**changes), tmp_path, SILENT)
    assert not list(tmp_path.glob("results/*"))


def test_settings_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text(
        "matrix: {bases: [embedded], train: a.jsonl, tests: {t: {source: b}}, template: {}, methods: {m: {}}}"
    )
    with pytest.raises(ConfigError, match=r"compare.yaml: matrix: methods.m.method: missing"):
        load_matrix(file)
    file.write_text(file.read_text().replace("m: {}", "m: {method: lora, train: {lr: 1e-3}}"))
    assert load_matrix(file).methods["m"].train.lr == 1e-3
    file.write_text("base: embedded")
    with pytest.raises(ConfigError, match="no key 'matrix'"):
        load_matrix(file)
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_matrix(tmp_path / "none.yaml")


def test_a_gpu_that_no_training_takes_is_refused_first(settings: Build, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^device: cuda:1: "):
        run_matrix(settings(device="cuda:1"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
