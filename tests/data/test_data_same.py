"""What counts as the same: rows that repeat others, and rows whose question stands in a test set."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from serving import answer, prompt_of, serving

from graft.data.make import Made, make
from graft.data.mixing import _near_in_all
from graft.data.recipe import make_recipe
from graft.data.similar import jaccard, normalised

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "hazel", "islet"]
GENERATE = {"endpoint": "http://x/v1", "model": "m", "duplicates": "none"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")


def write(file: str, rows: list[dict[str, Any]]) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def made(*sources: dict[str, Any], **settings: Any) -> Made:
    return make(make_recipe({"sources": list(sources), "output": "out", **settings}))


def lines(file: str = "out/train.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


KINDS = pytest.mark.parametrize("kind", ["exact", "normalised", "near"])


@KINDS
def test_another_template_over_the_same_rows_asks_something_else(kind: str) -> None:
    source = {"data": write("docs.jsonl", [{"text": word} for word in WORDS]), "answer": "endpoint"}
    asked = [
        source | {"templates": [text], "name": text[:5]} for text in ("Summarise: {text}", "Write a title: {text}")
    ]
    with serving(lambda body, before: answer("Well.")) as server:
        report = made(*asked, deduplicate=kind, generate=GENERATE | {"endpoint": server.url}).report
    assert [each["rendered"] for each in report["sources"]] == [9, 9]


@KINDS
def test_the_same_templates_and_rows_repeat(kind: str) -> None:
    source = {"data": write("a.jsonl", [{"text": word, "label": "x"} for word in WORDS]), "templates": ["{text}?"]}
    report = made(source, source | {"name": "again"}, deduplicate=kind).report
    assert [each["duplicates"] for each in report["sources"]] == [0, 9]


@KINDS
def test_other_words_for_labels_are_other_answers(kind: str) -> None:
    rows = [{"text": word, "label": i % 2} for i, word in enumerate(WORDS)]
    source = {"data": write("a.jsonl", rows), "templates": ["{text}?"], "verbalizer": {0: "bad", 1: "good"}}
    other = source | {"name": "b", "verbalizer": {0: "objective", 1: "subjective"}}
    assert made(source, other, deduplicate=kind).report["duplicates"]["dropped"] == 0


@KINDS
@pytest.mark.parametrize("asker", ["data", "endpoint"])
def test_what_only_a_template_shows_counts(kind: str, asker: str) -> None:
    text = "The soup was cold, the waiter was rude, and all of it was far too dear for what it was."
    rows = [{"text": text, "aspect": word, "label": "positive"} for word in ("food", "service", "price", "food")]
    source = {"data": write("a.jsonl", rows), "templates": ["{text}\nOn {aspect}?"], "answer": asker}
    with serving(lambda body, before: answer("Well.")) as server:
        generate = GENERATE | {"endpoint": server.url} if asker == "endpoint" else None
        report = made(source, deduplicate=kind, generate=generate).report
    assert report["duplicates"]["first"] == [["a row 4", "a row 1"]]


@KINDS
@pytest.mark.parametrize("what", ["system", "adapter"])
def test_system_message_and_adapter_count(kind: str, what: str) -> None:
    turns = [{"role": "user", "content": "Buy now!"}, {"role": "assistant", "content": "no"}]
    rows = [{"messages": [{"role": "system", "content": text}, *turns]} for text in ("Is it spam?", "Is it toxic?")]
    if what == "adapter":
        rows = [{"messages": turns, "adapter": name} for name in "ab"]
    report = made({"data": write("a.jsonl", [*rows, rows[0]])}, deduplicate=kind, form="messages").report
    assert report["duplicates"]["first"] == [["a row 3", "a row 1"]]


def test_a_source_with_a_system_message_of_its_own_asks_something_else() -> None:
    source = {"data": write("a.jsonl", [{"prompt": word, "completion": "x"} for word in WORDS]), "system": "Be brief."}
    assert made(source, source | {"name": "b", "system": "Be long."}, form="messages").report["train"] == 18


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("x != y", "x = y", False),
        ("!a", "a", False),
        (".5", "5", False),
        ("Is it 5?", "is it 5", True),
        ('He said: "Why (not)?"', "he said why not", True),
    ],
)
def test_signs_that_mean_something_stay(one: str, other: str, same: bool) -> None:
    assert (normalised(one) == normalised(other)) == same


def test_two_test_sets_in_one_file() -> None:
    rows = [{"a": f"{word} {word[::-1]}", "b": f"{word[::-1]} of {word}"} for word in WORDS]
    test = write("t.jsonl", rows[:4])
    data = write("s.jsonl", [{"prompt": row[name], "completion": "x"} for row in rows for name in "ab"])
    against = [{"data": test, "columns": {"text": name}} for name in "ab"]
    report = made({"data": data}, against=against).report
    assert {row["row"] for row in lines()} == set(range(9, 19))
    assert report["against"] == {"t.jsonl (text: a)": 4, "t.jsonl (text: b)": 4}
    assert {"against.0", "against.1"} <= set(report["sha256"])


CHATGPT = [{"from": "human", "value": "{}?"}, {"from": "chatgpt", "value": "{}!"}]
TEXT = "It was {} all over"
SAME_FILE: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt and context": ({"prompt": "Say {}", "context": "c {}", "completion": "x"}, {}),
    "the same, answered by a model": ({"prompt": "Say {}", "context": "c {}"}, {"answer": "endpoint"}),
    "instruction and input": ({"instruction": "Say {}", "input": "c {}", "output": "x"}, {}),
    "instruction, answered by a model": ({"instruction": "Say {}", "input": "c {}"}, {"answer": "endpoint"}),
    "ShareGPT": ({"conversations": CHATGPT}, {}),
    "a pair through a prompt": (
        {"premise": TEXT, "hypothesis": "A {}", "label": "x"},
        {"answer": "endpoint", "templates": ["{premise} {hypothesis}?"]},
    ),
    "a text beside a short column": (
        {"text": TEXT, "aspect": "zz top", "label": "x"},
        {"answer": "endpoint", "templates": ["{text} {aspect}?"]},
    ),
    "texts as completions": (
        {"text": TEXT, "label": "good"},
        {"templates": [{"prompt": "Write a {label} review.", "completion": "{text}"}]},
    ),
    "a text of two": ({"prompt": "p {}", "text": TEXT, "label": "x"}, {"columns": {"text": "text"}, "task": "topic"}),
}


@pytest.mark.parametrize("case", SAME_FILE)
def test_a_file_against_itself_leaves_nothing(case: str) -> None:
    record, settings = SAME_FILE[case]
    rows = [json.loads(json.dumps(record).replace("{}", word)) for word in WORDS]
    test, other = write("test.jsonl", rows), {name: f"Quite different {name}" for name in record}
    if "conversations" in record:
        other = {"conversations": [{"from": "human", "value": "Else"}, {"from": "gpt", "value": "y"}]}
    data = write("data.jsonl", [*rows, other])
    against = {"data": test, "columns": settings.get("columns", {})}
    with serving(lambda body, before: answer("Well.")) as server:
        generate = GENERATE | {"endpoint": server.url} if settings.get("answer") else None
        made({"data": data, **settings}, against=[against], near=None, generate=generate)
    assert [row["row"] for row in lines()] == [10]


def test_completions_of_columns_without_a_known_name_are_compared_too() -> None:
    rows = [{"title": f"T {word}", "body": TEXT.format(word)} for word in WORDS]
    source = {"data": write("data.jsonl", rows), "templates": [{"prompt": "On {title}:", "completion": "{body}"}]}
    made(source, against=[write("test.jsonl", [{"text": TEXT.format(word)} for word in WORDS[:4]])], near=None)
    assert {row["row"] for row in lines()} == set(range(5, 10))


def test_questions_without_answers_are_a_test_set() -> None:
    chats = [{"messages": [{"role": "user", "content": f"{word}?"}]} for word in WORDS[:2]]
    rows = [*chats, {"prompt": f"{WORDS[2]}?"}, {"conversations": [{"from": "human", "value": f"{WORDS[3]}?"}]}]
    data = write("data.jsonl", [{"prompt": f"{word}?", "completion": "x"} for word in WORDS])
    made({"data": data}, against=[write("test.jsonl", rows)], near=None)
    assert {row["row"] for row in lines()} == set(range(5, 10))


def test_an_instruction_with_a_text_beside_it_is_not_one_question() -> None:
    rows = [{"instruction": "Translate to German.", "text": f"{word} {word[::-1]} is here"} for word in WORDS]
    source = {"data": write("a.jsonl", rows), "templates": ["{instruction}\n{text}"], "answer": "endpoint"}
    with serving(lambda body, before: answer(f"Well, {prompt_of(body)}.")) as server:
        generate = GENERATE | {"endpoint": server.url}
        report = made(source, generate=generate, split={"train": 2 / 3, "eval": 1 / 3}).report
    assert (report["train"], report["eval"]) == (6, 3)


def test_sources_that_a_teacher_is_asked_otherwise_are_not_compared() -> None:
    text = "What is the name of the longest river that flows through the city of Cologne?"
    own = {"data": write("own.jsonl", [{"prompt": text, "completion": "Rhine"}])}
    asked = {"data": write("asked.jsonl", [{"prompt": text}]), "answer": "endpoint"}
    with serving(lambda body, before: answer("Rhine")) as server:
        generate = GENERATE | {"endpoint": server.url, "prompt": "Answer in one word: {prompt}"}
        assert made(own, asked, deduplicate="near", generate=generate).report["train"] == 2


def test_near_rows_are_found_behind_a_repeated_text() -> None:
    one = "The soup was cold, the waiter was rude, and all of it was far too dear for what it was."
    rows = [(one, "food"), (one, "service"), (one.replace("rude", "rudest"), "service"), (one + " No!", "price")]
    data = write("a.jsonl", [{"text": text, "aspect": aspect, "label": "bad"} for text, aspect in rows])
    report = made({"data": data, "templates": ["{text}\nOn {aspect}?"]}, deduplicate="near", near=0.8).report
    assert report["duplicates"]["first"] == [["a row 3", "a row 2"]]


def test_pairs_that_are_near_in_all_parts() -> None:
    """Against a comparison of all with all."""
    chance = random.Random(4)
    texts, aspects = [" ".join(chance.choices(WORDS, k=9)) for _ in range(4)], ["the food", "the foods", "service"]
    parts = []
    for _ in range(60):
        words = chance.choice(texts).split()
        words[chance.randrange(9)] = chance.choice(WORDS)
        parts.append((" ".join(words), chance.choice(aspects)))
    every = combinations(range(60), 2)
    right = {(i, j) for i, j in every if all(jaccard(a, b) >= 0.7 for a, b in zip(parts[i], parts[j], strict=True))}
    found = list(_near_in_all(parts, 0.7))
    assert set(found) == right and len(found) == len(right) and 10 < len(right) < 1000


def test_a_split_without_evaluation_leaves_no_older_one() -> None:
    source = {"data": write("a.jsonl", [{"prompt": f"Say {word}", "completion": word} for word in WORDS])}
    made(source, split={"train": 0.75, "eval": 0.25})
    assert lines("out/eval.jsonl")
    Path("out/report.json").unlink()
    made(source, split={"train": 1.0, "eval": 0.0})
    assert len(lines()) == 9 and not Path("out/eval.jsonl").exists()
