"""The verb `graft data` with a recipe: its exit codes, its one-line errors, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from serving import Reply, answer, serving
from typer.testing import CliRunner

from graft.cli import guarded
from graft.cli_data import data

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(guarded(data))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    Path("rows.jsonl").write_text("".join(json.dumps({"question": f"What is {n}?"}) + "\n" for n in range(20)))
    source = {"data": "rows.jsonl", "templates": ["{question}"], "answer": "endpoint"}
    asked = {"endpoint": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}
    Path("recipe.yaml").write_text(json.dumps({"sources": [source], "generate": asked, "output": "out"}))
    Path("run.yaml").write_text("base: embedded\ndata: {train: rows.jsonl}\noutput: run\n")


def called(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_an_endpoint_of_the_command_line() -> None:
    with serving(lambda body, before: answer("That.")) as server:
        code, out, _ = called("recipe.yaml", "generate.max_tokens=7", "--endpoint", server.url)
        assert code == 0 and "20 rows for training" in out and {body["max_tokens"] for body in server.bodies} == {7}
        code, out, _ = called("recipe.yaml", "generate.max_tokens=7", "--json")
        assert code == 0 and json.loads(out)["train"] == 20
    code, _, err = called("recipe.yaml")
    assert code == 2 and err.startswith("error: generate.max_tokens: out was begun with 7, not 512")


def test_one_line_and_exit_2_for_garbage() -> None:
    with serving(lambda body, before: Reply(200, b"<html>")) as server:
        code, out, err = called("recipe.yaml", "--endpoint", server.url)
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith("error: generate: ") and "most often: garbage: not JSON" in err


def test_preview_asks_nobody_and_writes_nothing() -> None:
    code, out, _ = called("recipe.yaml", "--preview", "2")
    assert code == 0 and out.count("m is asked: What is") == 2 and not Path("out").exists()


@pytest.mark.parametrize("option", [["--preview", "1"], ["--endpoint", "http://x/v1"], ["--fresh"]])
def test_a_run_takes_no_option_of_recipes(option: list[str]) -> None:
    code, _, err = called("run.yaml", *option)
    assert code == 2 and err.startswith(f"error: {option[0]}: run.yaml is a run")


def test_an_unknown_key_names_the_nearest() -> None:
    code, _, err = called("recipe.yaml", "dedupliacte=near")
    assert code == 2 and err == "error: recipe.yaml: dedupliacte: unknown key; did you mean 'deduplicate'?\n"
    code, _, err = called("none.yaml")
    assert code == 2 and err.startswith("error: none.yaml: no such file")
