"""What is looked at before an endpoint is asked, and which settings may change until the data is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving import Server, answer, prompt_of, serving

from graft.data.make import Made, make
from graft.data.recipe import make_recipe
from graft.errors import ConfigError, DataError, GraftError

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "hazel"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    write("rows.jsonl", [{"name": word, "page": i // 2} for i, word in enumerate(WORDS)])
    write("one.jsonl", [{"name": "amber", "page": i} for i in range(4)])
    write("odd.jsonl", [{"name": "amber", "page": 1}, {"name": "birch", "page": None}])
    write("seeds.jsonl", [{"instruction": f"Say something about {word}."} for word in WORDS])


def write(file: str, rows: list[dict[str, Any]]) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def asked(server: Server, data: str = "rows.jsonl", generate: dict[str, Any] | None = None, **more: Any) -> Made:
    source = {"data": data, "templates": ["Describe {name}."], "answer": "endpoint"}
    told = {"endpoint": server.url, "model": "m", "backoff": 0.001, **(generate or {})}
    return make(make_recipe({"sources": [source], "generate": told, "output": "out", **more}))


EVAL = {"train": 0.75, "eval": 0.25}
INVENT = [{"data": "seeds.jsonl", "answer": "endpoint", "self_instruct": {"count": 2, "shots": 2, "requests": 1}}]
HOPELESS: dict[str, tuple[dict[str, Any], str]] = {
    "no such column": ({"split": EVAL | {"group": "doc"}}, "split.group: rows.jsonl row .* has no column 'doc'"),
    "one group": ({"data": "one.jsonl", "deduplicate": None, "split": EVAL}, "split.eval: no group"),
    "a later row": ({"data": "odd.jsonl", "generate": {"prompt": "{page}: {prompt}"}}, "odd.jsonl row 2: .*page"),
    "a group of new instructions": ({"sources": INVENT, "split": EVAL | {"group": "doc"}}, "has no column 'doc'"),
    "templates of new instructions": ({"sources": [INVENT[0] | {"per_row": 2}]}, "per_row 2"),
    "a column of new instructions": ({"sources": INVENT, "generate": {"prompt": "{topic}: {prompt}"}}, "topic"),
}


@pytest.mark.parametrize("case", HOPELESS)
def test_what_cannot_work_is_refused_before_anybody_is_asked(case: str) -> None:
    settings, message = HOPELESS[case]
    with serving(lambda body, before: answer(f"Well: {prompt_of(body)}")) as server:
        with pytest.raises(GraftError, match=message):
            asked(server, **settings)
        assert not server.bodies and not Path("out/recipe.yaml").exists()
        assert asked(server).report["train"] == 8


def test_several_answers_of_a_row_count_for_its_side() -> None:
    write("few.jsonl", [{"name": word} for word in WORDS[:4]])
    with serving(lambda body, before: answer(f"Well {before}: {prompt_of(body)}")) as server:
        with pytest.raises(DataError, match=r"split\.eval: no group"):  # 3 of 12 rows for a quarter of 4 and a tenth
            asked(server, "few.jsonl", {"n": 3}, split={"train": 0.9, "eval": 0.1})
        assert not server.bodies
        made = asked(server, "few.jsonl", {"n": 3}, split=EVAL)
    assert (made.report["train"], made.report["eval"]) == (9, 3)


FILTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "keep_cut": ({}, {"keep_cut": True}),
    "refusals": ({"refusals": ["short"], "keep_cut": True}, {"refusals": [], "keep_cut": True}),
}


@pytest.mark.parametrize("case", FILTERS)
def test_filters_may_change_until_the_data_is_finished(case: str) -> None:
    before, after = FILTERS[case]
    with serving(lambda body, count: answer(f"Short: {prompt_of(body)}", reason="length")) as server:
        with pytest.raises(DataError, match="no rows are left to write"):
            asked(server, generate=before)
        assert asked(server, generate=after).report["train"] == len(server.bodies) == 8
        with pytest.raises(ConfigError, match=rf"generate\.{case}.*: out was begun with"):
            asked(server, generate=before)
        Path("out/report.json").unlink()
        assert asked(server, generate=after | {"duplicates": "all"}, split=EVAL).report["eval"] == 2
        assert len(server.bodies) == 8 and len(lines("out/eval.jsonl")) == 2


def test_a_label_without_a_word_leaves_no_recipe_behind() -> None:
    rows = [{"text": word, "label": i % 3} for i, word in enumerate(WORDS)]
    source = {"data": write("labels.jsonl", rows), "templates": ["{text}?"], "verbalizer": {0: "x", 1: "y"}}
    with pytest.raises(DataError, match="label '2' has no word"):
        make(make_recipe({"sources": [source], "output": "out"}))
    source["verbalizer"] = {0: "x", 1: "y", 2: "z"}
    assert make(make_recipe({"sources": [source], "output": "out"})).report["train"] == 8


def test_a_split_that_cannot_be_made_leaves_no_recipe_behind() -> None:
    write("one.jsonl", [{"prompt": "Same?", "completion": f"{i}"} for i in range(5)])
    settings = {"sources": [{"data": "one.jsonl"}], "output": "out", "split": EVAL}
    with pytest.raises(DataError, match=r"split\.eval: no group"):
        make(make_recipe(settings))
    write("one.jsonl", [{"prompt": f"{word}?", "completion": "x"} for word in WORDS])
    assert make(make_recipe(settings)).report["eval"] == 2


def test_columns_beside_prompt_and_answer_are_kept() -> None:
    rows = [
        {"prompt": "say birch", "references": ["birch", "BIRCH"], "adapter": "a"},
        {"prompt": "say cedar", "completion": "cedar"},
    ]
    for form in ("prompt", "messages"):
        make(make_recipe({"sources": [{"data": write("r.jsonl", rows)}], "output": form, "form": form}))
        first, second = sorted(lines(f"{form}/train.jsonl"), key=lambda row: row["row"])
        assert (first["references"], first["adapter"]) == (["birch", "BIRCH"], "a")
        assert "references" not in second and "adapter" not in second
    source = {"data": "r.jsonl", "templates": ["{prompt}!"], "answer": "endpoint", "columns": {"adapter": "who"}}
    write("r.jsonl", [{"prompt": "say birch", "references": ["birch"], "who": "a"}])
    with serving(lambda body, before: answer("well")) as server:
        made = {"endpoint": server.url, "model": "m"}
        make(make_recipe({"sources": [source], "generate": made, "output": "asked"}))
    (row,) = lines("asked/train.jsonl")
    assert row["adapter"] == "a" and row["completion"] == "well" and "references" not in row


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Translate.\nBe exact.", "input": "hello"}, "Translate.\nBe exact.\n\nhello"),
        ({"instruction": "Line one\nLine two", "input": ""}, "Line one\nLine two"),
        ({"premise": "It rains.", "hypothesis": "It is wet."}, "It rains.\nIt is wet."),
    ],
)
def test_a_row_asks_the_same_of_a_model_as_of_its_data(row: dict[str, Any], prompt: str) -> None:
    source = {"data": write("r.jsonl", [row]), "answer": "endpoint"}
    with serving(lambda body, before: answer("well")) as server:
        told = {"endpoint": server.url, "model": "m"}
        make(make_recipe({"sources": [source], "generate": told, "output": "out"}))
    assert [row["prompt"] for row in lines("out/train.jsonl")] == [prompt]
    if "instruction" in row:
        write("r.jsonl", [row | {"output": "well"}])
        make(make_recipe({"sources": [{"data": "r.jsonl"}], "output": "data"}))
        assert [row["prompt"] for row in lines("data/train.jsonl")] == [prompt]
