"""Sources and forms: what is read, and that each bad input is one line that says what, where and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.data.rows import Message, hold_out, label_names, load_rows
from graft.errors import ConfigError, DataError, GraftError

Write = Callable[..., str]
QA = [{"prompt": "a?", "completion": "b"}, {"prompt": "c?", "completion": "d"}]


def test_same_rows_from_every_format(write: Write, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    parquet = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QA), parquet)
    sources = [
        write("a.jsonl", *QA),
        write("a.ndjson", "\ufeff" + json.dumps(QA[0]) + "\n\n" + json.dumps(QA[1])),
        write("a.json", json.dumps(QA)),
        write("b.json", json.dumps({"data": QA})),
        write("c.csv", 'prompt,completion\na?,b\n"c?",d\n'),
        write("c.tsv", "prompt\tcompletion\na?\tb\nc?\td\n"),
        str(parquet),
    ]
    for source in sources:
        rows = load_rows(source)
        assert [(r.form, r.prompt, r.completion) for r in rows] == [("prompt", "a?", "b"), ("prompt", "c?", "d")]
        assert rows[1].where == f"{source} row {3 if 'ndjson' in source else 2}"
        assert [r.prompt for r in load_rows(source, limit=1)] == ["a?"]


def test_folder_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QA))
    (folder / "test.jsonl").write_text(json.dumps(QA[1]) + "\n")
    assert [r.prompt for r in load_rows(str(folder))] == ["a?", "c?"]
    assert [r.prompt for r in load_rows(str(folder), split="test")] == ["c?"]
    with pytest.raises(DataError, match="split 'dev'"):
        load_rows(str(folder), split="dev")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "i", "input": "x", "output": "y", "text": "t"}, ("instruction", "i", "x", "y")),
        ({"instruction": "i", "context": "", "response": "y", "category": "qa"}, ("instruction", "i", "", "y")),
        ({"prompt": "p", "completion": "c"}, ("prompt", "p", "", "c")),
        ({"prompt": "p", "references": ["c", "d"]}, ("prompt", "p", "", "c")),
    ],
)
def test_forms_with_prompts(write: Write, record: dict[str, Any], expected: tuple[str, ...]) -> None:
    row = load_rows(write("a.jsonl", record))[0]
    assert (row.form, row.prompt, row.context, row.completion) == expected
    assert row.references == tuple(record.get("references", ()))


def test_columns_are_mapped_and_kept(write: Write) -> None:
    source = write("e2e.jsonl", {"meaning_representation": "m", "references": ["r", "s"], "adapter": "x"}, *[])
    row = load_rows(source, columns={"prompt": "meaning_representation", "completion": "references"}, adapter="y")[0]
    assert (row.prompt, row.completion, row.references, row.adapter) == ("m", "r", ("r", "s"), "x")
    assert row.fields["meaning_representation"] == row.fields["prompt"] == "m"
    plain = load_rows(write("b.jsonl", *QA), adapter="y")
    assert {row.adapter for row in plain} == {"y"}


def test_conversations(write: Write) -> None:
    openai = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
        ]
    }
    sharegpt = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "u"},
            {"from": "gpt", "value": "a"},
        ]
    }
    rows = [load_rows(write(f"{i}.jsonl", record))[0] for i, record in enumerate((openai, sharegpt))]
    assert (
        rows[0].messages
        == rows[1].messages
        == (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    )
    assert rows[0].completion == "a" and rows[0].question == rows[1].question


def test_labels_are_numbers_or_words(write: Write) -> None:
    words = load_rows(write("w.jsonl", {"sentence": "x", "label": "pos"}, {"sentence": "y", "label": "neg"}))
    assert label_names(words) == ("neg", "pos") and words[0].text == "x"
    numbers = load_rows(write("n.csv", "premise,hypothesis,label\na,b,2\nc,d,0\n"))
    assert [row.label for row in numbers] == [2, 0] and label_names(numbers) == ("0", "1", "2")
    assert numbers[0].pair == "b" and numbers[0].question != numbers[1].question
    assert load_rows(write("f.jsonl", {"text": "x", "label": 1.0}))[0].label == 1
    assert load_rows(write("t.jsonl", {"text": "x"}))[0].form == "text"


BAD_FILES = [
    ("empty.jsonl", "", "no rows"),
    ("blank.json", "[]", "no rows"),
    ("head.csv", "prompt,completion\n", "no rows"),
    ("wrong.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2: not valid JSON"),
    ("wrong.json", '[\n{"prompt": "a",]', "line 2, column 16"),
    ("object.json", '{"rows": []}', "expected a list of objects"),
    ("half.jsonl", '{"text": "a"}\n{"text": "b \\ud83d"}\n', "half.jsonl row 2: half a character (\\ud83d)"),
    (
        "half.json",
        '[{"text": "a"}, {"text": "\\ud83d\\ude00", "\\uDE00": 1}]',
        "half.json row 2: half a character (\\ude00)",
    ),
    ("list.jsonl", "[1]\n", "row 1: expected a JSON object"),
    ("latin.jsonl", b'{"text": "caf\xe9"}\n', "line 1: not UTF-8"),
    ("latin.csv", b"text\ncaf\xe9\n", "not UTF-8"),
    ("short.csv", "prompt,completion\na,b\nc\n", "row 2: 1 cells, but the first line names 2"),
    ("quote.csv", 'prompt,completion\na,"b"x\n', "not valid CSV"),
    ("twice.csv", "prompt,prompt\na,b\n", "name each column once"),
    ("broken.parquet", b"PAR1 no", "not a readable Parquet file"),
    ("data.xlsx", "x", "unknown kind of data file '.xlsx'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_files(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        load_rows(write(name, content))
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


BAD_ROWS = [
    ("column", [{"promt": "a", "completion": "b"}], "did you mean 'prompt'?"),
    ("no answer column", [{"prompt": "a"}], "row 1: no known form in columns prompt"),
    ("row without answer", [*QA, {"prompt": "e"}], "row 3: no 'completion', which the first row has"),
    ("empty answer", [*QA, {"prompt": "e", "completion": "  "}], "row 3: no answer, 'completion' is empty"),
    ("null answer", [{"prompt": "e", "completion": None}], "row 1: no answer"),
    ("no references", [{"prompt": "e", "references": []}], "row 1: no answer, 'references' is empty"),
    ("number for text", [{"prompt": 3, "completion": "b"}], "'prompt' is a int, a string is needed"),
    ("number among references", [{"prompt": "e", "references": [1]}], "'references' is a int"),
    ("mixed forms", [*QA, {"text": "t"}], "row 3: form 'text', but the first row has form 'prompt'"),
    ("two answers", [{"prompt": "a", "output": "b", "response": "c"}], "both 'output' and 'response'"),
    ("null label", [{"text": "a", "label": None}], "row 1: no label ('label' is None)"),
    ("minus one", [{"text": "a", "label": 1}, {"text": "a", "label": -1}], "row 2: no label ('label' is -1)"),
    ("missing label", [{"text": "a", "label": 1}, {"text": "a"}], "row 2: no 'label', which the first row has"),
    ("late label", [{"text": "a"}, {"text": "a", "label": 1}], "row 2: has a label, the rows before it have none"),
    ("half a label", [{"text": "a", "label": 0.5}], "label 0.5 must be a whole number or a word"),
    ("empty text", [{"text": " "}], "'text' is empty"),
    ("adapter", [{"text": "a", "adapter": 3}], "adapter must be a name, not 3"),
    ("no messages", [{"messages": []}], "must be a list of messages"),
    ("role", [{"messages": [{"role": "asistant", "content": "a"}]}], "did you mean 'assistant'?"),
    ("content", [{"messages": [{"role": "user", "content": ["a"]}]}], "message 1: content must be a string"),
    ("user last", [{"messages": [{"role": "user", "content": "a"}]}], "ends with a user turn"),
    ("empty turn", [{"messages": [{"role": "assistant", "content": ""}]}], "the last assistant turn is empty"),
    ("turn", [{"messages": ["hello"]}], "message 1: expected an object"),
]


@pytest.mark.parametrize(("rows", "message"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS])
def test_bad_rows(write: Write, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        load_rows(write("data.jsonl", *rows))
    assert message in str(error.value) and "data.jsonl row" in str(error.value) and "\n" not in str(error.value)


def test_bad_settings(write: Write, tmp_path: Path) -> None:
    source = write("train.jsonl", *QA)
    cases: list[tuple[dict[str, Any], type[GraftError], str]] = [
        ({"columns": {"prompt": "promt"}}, DataError, r"no column 'promt' \(columns.prompt\) \(did you mean 'prompt'"),
        ({"columns": {"promt": "prompt"}}, ConfigError, "unknown name 'promt' .did you mean 'prompt'"),
        ({"columns": {"prompt": 3}}, ConfigError, "expected the name of a column"),
        ({"limit": 0}, ConfigError, "give at least 1"),
        ({"split": "test"}, DataError, "a file has no split 'test'"),
    ]
    for settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            load_rows(source, **settings)
    with pytest.raises(DataError, match=r"no such file \(did you mean 'train.jsonl'"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="does not exist either"):
        load_rows(str(tmp_path / "no" / "train.jsonl"))


def test_hub_name_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="Couldn't reach the Hub") as error:
        load_rows("nobody/nothing:config")
    assert "\n" not in str(error.value)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"sentence": "x", "label": 1, "idx": 0}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_rows("nyu-mll/glue:sst2", split="validation")
    assert asked == [(("nyu-mll/glue", "sst2"), {"split": "validation"})]
    assert (rows[0].text, rows[0].label, rows[0].where) == ("x", 1, "nyu-mll/glue:sst2 row 1")


def test_hold_out_leaks_nothing(write: Write) -> None:
    rows = load_rows(write("a.jsonl", *({"prompt": f"q{i // 3}", "completion": str(i)} for i in range(60))))
    train, held = hold_out(rows, 0.2, seed=1)
    assert len(train) + len(held) == 60 and len(held) == 12
    assert not {r.question for r in train} & {r.question for r in held}
    assert (train, held) == hold_out(rows, 0.2, seed=1) != hold_out(rows, 0.2, seed=2)
    with pytest.raises(ConfigError):
        hold_out(rows, 1.5)
    with pytest.raises(DataError):
        hold_out(rows[:1], 0.5)


def test_rows_and_templates_need_no_torch() -> None:
    heavy = {"torch", "transformers", "datasets"}
    code = f"import sys, graft.data.rows, graft.data.report; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "src"}, cwd=Path(__file__).parents[2])


def test_a_conversation_may_have_several_right_answers(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": turns, "references": ["Hello", "Hey"]}) + "\n")
    (row,) = load_rows(file)
    assert (row.completion, row.references) == ("Hello", ("Hello", "Hey"))
    file.write_text(json.dumps({"messages": turns, "references": [1]}) + "\n")
    with pytest.raises(DataError, match="row 1: 'references'"):
        load_rows(file)
