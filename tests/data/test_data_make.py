"""Recipes over annotated data: what is mixed, what is left out, that nothing leaks, and what is refused."""

from __future__ import annotations

import itertools
import json
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from graft.data.make import make, preview
from graft.data.mixing import contaminated, repeated, split
from graft.data.recipe import Recipe, load_recipe, make_recipe
from graft.data.rows import load_rows
from graft.data.similar import jaccard, normalised
from graft.errors import ConfigError, DataError, GraftError

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "hazel", "islet", "jewel", "knoll", "lotus"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(file: str, rows: list[dict[str, Any]]) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def reviews(file: str = "reviews.jsonl", count: int = 40, start: int = 0) -> str:
    """Reviews of which no two are near each other."""
    triples = list(itertools.permutations(WORDS, 3))[start * 7 : (start + count) * 7 : 7]
    rows = [{"text": " ".join(each), "label": ["bad", "good"][i % 2], "film": i // 4} for i, each in enumerate(triples)]
    return write(file, rows)


def recipe(**settings: Any) -> Recipe:
    settings.setdefault("sources", [{"data": reviews(), "templates": ["{text}?", "Is it good: {text}"]}])
    return make_recipe({"output": "out", **settings})


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def test_rows_are_templates_filled_and_train_reads_them() -> None:
    source = {
        "data": reviews(),
        "templates": ["{text}?", "Is it good: {text}"],
        "verbalizer": {"bad": "no", "good": "yes"},
    }
    made = make(recipe(sources=[source | {"per_row": "all"}], split={"train": 0.75, "eval": 0.25}))
    written = lines("out/train.jsonl") + lines("out/eval.jsonl")
    data = {i: row for i, row in enumerate(lines("reviews.jsonl"), start=1)}
    expected = Counter()
    for i, row in data.items():
        word = {"bad": "no", "good": "yes"}[row["label"]]
        expected[(f"{row['text']}?", word, "reviews", i, 1)] += 1
        expected[(f"Is it good: {row['text']}", word, "reviews", i, 2)] += 1
    found = Counter((r["prompt"], r["completion"], r["source"], r["row"], r["template"]) for r in written)
    assert found == expected
    assert made.report["train"] == 60 and made.report["eval"] == 20
    assert {row.form for row in load_rows("out/train.jsonl")} == {"prompt"}


def test_one_template_is_drawn_for_each_row_by_the_seed() -> None:
    make(recipe())
    drawn = {row["row"]: row["template"] for row in lines("out/train.jsonl")}
    assert len(drawn) == 40 and set(drawn.values()) == {1, 2}
    make(recipe(output="again"))
    assert Path("again/train.jsonl").read_bytes() == Path("out/train.jsonl").read_bytes()
    make(recipe(output="other", seed=1))
    assert {row["row"]: row["template"] for row in lines("other/train.jsonl")} != drawn


def test_completions_are_templates_too() -> None:
    pair = {"prompt": "Write a {answer} review.", "completion": "{text}"}
    source = {"data": reviews(), "templates": [pair], "verbalizer": {"bad": "poor", "good": "kind"}}
    make(recipe(sources=[source]))
    row = next(row for row in lines("out/train.jsonl") if row["row"] == 2)
    assert row["prompt"] == "Write a kind review." and row["completion"] == lines("reviews.jsonl")[1]["text"]
    free = write("free.jsonl", [{"title": f"T {word}", "body": f"B {word}"} for word in WORDS])
    make(
        recipe(
            sources=[{"data": free, "templates": [{"prompt": "On {title}:", "completion": "{body}"}]}], output="free"
        )
    )
    assert {(r["prompt"], r["completion"]) for r in lines("free/train.jsonl")} == {
        (f"On T {word}:", f"B {word}") for word in WORDS
    }


def test_messages_hold_the_system_message() -> None:
    make(recipe(sources=[{"data": reviews(), "task": "topic", "system": "Be brief."}], form="messages"))
    row = lines("out/train.jsonl")[0]
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][0]["content"] == "Be brief." and row["messages"][2]["content"] in ("good", "bad")
    assert load_rows("out/train.jsonl")[0].form == "chat"


MIXES = [
    # weights, settings, what is taken of 40, 20 and 10 rows
    ((None, None, None), {}, (40, 20, 10)),
    ((1, 1, 2), {}, (5, 5, 10)),  # the third gives all, which are 2 of 4 parts
    ((1, 1, 2), {"repeat": True}, (40, 40, 80)),  # the first is used once, the others more often
    ((1, 1, 2), {"size": 20}, (5, 5, 10)),
    ((1, 1, 2), {"size": 40}, (15, 15, 10)),  # the third gives all, the others fill up
    ((1, 1, 2), {"size": 60}, (30, 20, 10)),
    ((1, 1, 2), {"size": 100}, (40, 20, 10)),
    ((1, 1, 2), {"size": 100, "repeat": True}, (25, 25, 50)),
    ((None, None, None), {"size": 10}, (4, 3, 3)),  # largest remainders of 3.33, the first source first
]


@pytest.mark.parametrize(("weights", "settings", "taken"), MIXES)
def test_weights(weights: tuple[float | None, ...], settings: dict[str, Any], taken: tuple[int, ...]) -> None:
    counts, sources = (40, 20, 10), []
    for name, count, weight in zip("abc", counts, weights, strict=True):
        sources.append(
            {"data": reviews(f"{name}.jsonl", count, start=ord(name) - 97), "task": "topic", "weight": weight}
        )
        sources[-1]["columns"] = {"text": "text"}
    made = make(recipe(sources=sources, deduplicate=None, **settings))
    found = Counter(row["source"] for row in lines("out/train.jsonl"))
    assert tuple(found[name] for name in "abc") == taken
    assert [source["taken"] for source in made.report["sources"]] == list(taken)
    if not settings.get("repeat"):
        rows = [(row["source"], row["row"]) for row in lines("out/train.jsonl")]
        assert len(set(rows)) == len(rows)


def test_a_repeated_row_stands_once_in_evaluation_and_on_one_side() -> None:
    make(recipe(size=200, repeat=True, split={"train": 0.8, "eval": 0.2}))
    train, held = ({row["row"] for row in lines(f"out/{part}.jsonl")} for part in ("train", "eval"))
    assert not train & held and len(lines("out/eval.jsonl")) == len(held) == 8


def test_no_row_is_left_out_when_rows_may_repeat() -> None:
    sources = []
    for name, count, weight in (("a", 1, 1), ("b", 17, 3)):  # 22.67 rows: 22 would be 5.5 and 16.5, so 6 and 16
        rows = [{"prompt": f"{name}{i}", "completion": "x"} for i in range(count)]
        sources.append({"data": write(f"{name}.jsonl", rows), "weight": weight})
    made = make(recipe(sources=sources, repeat=True))
    assert [source["taken"] for source in made.report["sources"]] == [6, 17]


def sentences(*texts: str) -> list[Any]:
    return load_rows(write("s.jsonl", [{"prompt": text, "completion": "x"} for text in texts]))


def test_duplicates() -> None:
    rows = sentences(
        "The quick brown fox jumps over the lazy dog.",
        "The quick brown fox jumps over the lazy dog.",
        "the quick brown fox jumps over the lazy dog",
        "The quick brown fox jumps over the lazy dogs",
        "Another thing altogether",
    )
    assert repeated(rows, None, 0.8) == {}
    assert repeated(rows, "exact", 0.8) == {1: 0}
    assert repeated(rows, "normalised", 0.8) == {1: 0, 2: 0}
    assert repeated(rows, "near", 0.8) == {1: 0, 2: 0, 3: 0}
    assert jaccard(rows[0].prompt, rows[3].prompt) > 0.9


def test_a_near_text_with_another_label_is_no_duplicate() -> None:
    text = "a long and winding tale of a man and of his dog"
    rows = load_rows(write("l.jsonl", [{"text": text, "label": "a"}, {"text": f"{text}s", "label": "b"}]))
    assert repeated(rows, "near", 0.8) == {}


def test_test_questions_are_left_out() -> None:
    source = lines(reviews())
    test = [
        {"sentence": source[3]["text"].upper() + "!"},
        {"sentence": source[5]["text"] + "s"},
        {"sentence": "unlike all"},
    ]
    made = make(recipe(against=[write("test.jsonl", test)]))
    assert {row["row"] for row in lines("out/train.jsonl")} == set(range(1, 41)) - {4, 6}
    assert made.report["against"] == {"test.jsonl": 2}
    texts = [[row.text] for row in load_rows("reviews.jsonl")]
    assert contaminated(texts, [each["sentence"] for each in test], None) == {3}


@pytest.mark.parametrize("group", [None, "film"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_leaks(seed: int, group: str | None) -> None:
    rows = []
    for i, each in enumerate(itertools.islice(itertools.permutations(WORDS, 4), 0, 4000, 97)):
        text = " ".join(each)
        rows += [
            {"text": text, "label": "a", "film": i % 20},
            {"text": f"{text.title()}!", "label": "b", "film": i % 20},
        ]
        rows += [{"text": f"{text} {string.ascii_lowercase[i % 26]}", "label": "a", "film": i % 20}]
    source = {"data": write("leaky.jsonl", rows), "templates": ["{text}?", "So: {text}"], "per_row": "all"}
    made = make(recipe(sources=[source], split={"train": 0.7, "eval": 0.3, "group": group}, seed=seed))
    train, held = lines("out/train.jsonl"), lines("out/eval.jsonl")
    assert len(train) + len(held) == 2 * len(rows) and 0.2 < len(held) / (2 * len(rows)) <= 0.3
    films = [{rows[row["row"] - 1]["film"] for row in part} for part in (train, held)]
    assert group is None or not films[0] & films[1]
    texts = [{rows[row["row"] - 1]["text"] for row in part} for part in (train, held)]
    assert max(jaccard(one, other) for one in texts[0] for other in texts[1]) < 0.8
    prompts = [{normalised(row["prompt"]) for row in part} for part in (train, held)]
    assert not prompts[0] & prompts[1]
    assert made.report["split"]["groups"] == (20 if group else len(rows) // 3)


def test_prompts_that_hide_what_differs_stay_together() -> None:
    rows = [{"premise": WORDS[i // 4], "hypothesis": f"{WORDS[i % 12]} {i}", "label": "x"} for i in range(48)]
    source = {"data": write("p.jsonl", rows), "templates": ["About {premise}:"]}
    make(recipe(sources=[source], split={"train": 0.75, "eval": 0.25}))
    train, held = ({row["prompt"] for row in lines(f"out/{part}.jsonl")} for part in ("train", "eval"))
    assert held and not train & held


def test_the_same_command_says_finished_and_another_recipe_is_refused() -> None:
    assert not make(recipe()).finished_before
    before = {file.name: file.stat().st_mtime_ns for file in Path("out").iterdir()}
    assert set(before) == {"train.jsonl", "report.json", "recipe.yaml", "inputs.json"}
    again = make(recipe())
    assert again.finished_before and "finished" in str(again)
    assert {file.name: file.stat().st_mtime_ns for file in Path("out").iterdir()} == before
    with pytest.raises(ConfigError, match="seed: out was begun with 0, not 5"):
        make(recipe(seed=5))
    assert make(recipe(seed=5), fresh=True).folder == Path("out-2")
    other = [{"data": "reviews.jsonl", "templates": ["{text}?", "Else: {text}"]}]
    with pytest.raises(ConfigError, match=r"sources.0.templates.1: out was begun with 'Is it good"):
        make(recipe(sources=other))
    same = recipe()
    reviews(count=39)
    with pytest.raises(ConfigError, match=r"sources.0.data: the content changed since out was begun"):
        make(same)


def test_a_folder_of_something_else_is_left_alone() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        make(recipe())
    Path("out/thesis.tex").rename("out/recipe.yaml")
    with pytest.raises(ConfigError, match="not written by Graft"):
        make(recipe())
    assert [file.name for file in Path("out").iterdir()] == ["recipe.yaml"]


def test_what_was_cut_off_before_the_report_is_done_again() -> None:
    make(recipe())
    whole = Path("out/train.jsonl").read_bytes()
    Path("out/report.json").unlink()
    Path("out/train.jsonl").write_text("half")
    assert not make(recipe()).finished_before
    assert Path("out/train.jsonl").read_bytes() == whole


def test_preview_writes_nothing() -> None:
    shown = preview(recipe(), 2)
    assert shown.count("prompt:") == 4 and "template 2" in shown and not Path("out").exists()
    assert [file.name for file in Path().iterdir()] == ["reviews.jsonl"]


BAD = [
    ({"sourcs": []}, "sourcs: unknown key; did you mean 'sources'"),
    ({"sources": [{"data": "a.jsonl", "wieght": 1}]}, "sources.0.wieght: unknown key; did you mean 'weight'"),
    ({"generate": {"endpont": "x"}}, "generate.endpont: unknown key; did you mean 'endpoint'"),
    ({"sources": [{"data": "a.jsonl"}, {"data": "b/a.csv"}]}, "two are called 'a'"),
    ({"split": {"train": 0.9, "eval": 0.2}}, "split: 0.9 and 0.2 are not shares of 1"),
    ({"sources": [{"data": "a.jsonl", "task": "nli", "templates": ["x"]}]}, "give task or templates"),
    ({"sources": [{"data": "a.jsonl", "system": "x"}]}, "form: messages"),
    ({"sources": [{"data": "a.jsonl", "answer": "endpoint"}]}, "generate: missing"),
    ({"sources": []}, "sources: list should have at least 1 item"),
    ({"size": 0}, "size: input should be greater than or equal to 1, not 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


BAD_DATA = [
    ({"sources": [{"data": "none.jsonl"}]}, "none.jsonl: no such file"),
    ({"sources": [{"data": "reviews.jsonl", "templates": ["{txt}"]}]}, "did you mean 'text'"),
    ({"sources": [{"data": "reviews.jsonl", "templates": ["{text} {slots:2}"]}]}, "pseudo-tokens"),
    ({"sources": [{"data": "reviews.jsonl", "templates": ["{text}"], "per_row": 2}]}, "per_row 2, but there are 1"),
    (
        {"sources": [{"data": "reviews.jsonl", "templates": ["{text}"], "verbalizer": {"bad": "x"}}]},
        "'good' has no word",
    ),
    ({"split": {"train": 0.9, "eval": 0.1, "group": "movie"}}, "no column 'movie'"),
    ({"against": ["reviews.jsonl"]}, "no rows are left"),
    ({"against": ["films.jsonl"]}, "no prompt, instruction or text in columns film"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_DATA)
def test_data_that_cannot_be_used_is_refused(settings: dict[str, Any], message: str) -> None:
    reviews()
    write("films.jsonl", [{"film": 3}])
    with pytest.raises(GraftError) as error:
        make(recipe(**settings))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("out/train.jsonl").exists()


def test_one_question_cannot_be_split() -> None:
    rows = [{"prompt": "Same?", "completion": f"{i}"} for i in range(5)]
    with pytest.raises(DataError, match=r"split\.eval"):
        make(recipe(sources=[{"data": write("one.jsonl", rows)}], split={"train": 0.8, "eval": 0.2}))


def test_overrides_reach_into_lists() -> None:
    Path("r.yaml").write_text("sources:\n  - data: a.jsonl\noutput: out\n")
    found = load_recipe("r.yaml", ["sources.0.limit=3", "size=7", "split={train: .5, eval: .5}"])
    assert found.sources[0].limit == 3 and found.size == 7 and found.split.eval == 0.5
    for bad in ("sources.1.limit=3", "size.x=1", "size"):
        with pytest.raises(ConfigError):
            load_recipe("r.yaml", [bad])


def test_split_takes_all_for_training_when_nothing_is_held_out() -> None:
    assert split([], recipe().split, 0.8, 0) == ([], [], 0)
