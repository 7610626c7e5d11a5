"""The quickstart from the outside with a few steps: it trains, compares, resumes, and its next commands work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import graft
from graft import quickstart
from graft.data.rows import load_rows
from graft.errors import ConfigError
from graft.quickstart import next_commands, run_quickstart, settings
from graft.train.run import train

SOURCES = str(Path(graft.__file__).parents[1])
ENV = os.environ | {"PYTHONPATH": SOURCES, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "TERM": "dumb"}


def start(*arguments: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "graft", "quickstart", *arguments]
    return subprocess.Popen(program, env=ENV, stdout=-1, stderr=-1, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (out, err)
    return out, err


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short answers, where their text does not matter."""
    monkeypatch.setattr(quickstart, "LONGEST", 3)


@pytest.mark.slow
def test_from_the_first_command_to_the_next_three() -> None:
    out, err = finish(start("--steps", "12", "--output", "q"))
    assert err == "", "something of a library reached the screen"
    found = json.loads(Path("q/quickstart.json").read_text(encoding="utf-8"))
    before, after = found["bleu"]["before"], found["bleu"]["after"]
    assert f"BLEU on 100 held-out rows: {before:.1f} before, {after:.1f} after" in out
    assert after > before, "twelve steps are enough to be better than nothing"
    assert len(found["examples"]) == 3 and out.count("before  ") == out.count("after   ") == 3
    assert "is in q/adapter" in out

    again, err = finish(start("--steps", "12", "--output", "q"))
    assert err == "" and "q is finished" in again
    assert again[again.index("BLEU on") :] == out[out.index("BLEU on") :]

    commands = [line.strip() for line in out[out.index("Next:") :].splitlines()[1:]]
    assert len(commands) == 3
    for command in commands:
        # What is being trained is shortened; everything else is as it was printed.
        command += " train.max_steps=1" if " train " in command else ""
        done = subprocess.run(command, shell=True, env=ENV, input="hello\n/exit\n", capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]  # of another precision
        assert (done.returncode, said) == (0, []), (command, done.stderr)
    assert Path("q-merged/model.safetensors").exists() and Path("q-rank4/adapter/graft.json").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_and_the_next_start_goes_on() -> None:
    process = start("--steps", "400", "--output", "q")
    until = time.monotonic() + 120
    metrics = Path("q/metrics.jsonl")
    while time.monotonic() < until and not (metrics.exists() and metrics.read_text(encoding="utf-8").strip()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 130)
    assert "is saved, the same command goes on from there" in err and "Traceback" not in err
    checkpoint = next(Path("q/checkpoints").glob("checkpoint-*"))
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < step < 400

    process = start("--steps", "400", "--output", "q")
    seen = ""
    assert process.stdout is not None
    while "going on from" not in seen:
        line = process.stdout.readline()
        assert line, (seen, process.stderr and process.stderr.read())
        seen += line
    assert f"going on from q/checkpoints/checkpoint-{step}" in seen
    process.send_signal(signal.SIGINT)
    finish(process, 130)


def test_fresh_starts_over_in_another_folder(short: None) -> None:
    quiet = Console(quiet=True)
    first = run_quickstart("q", steps=1, console=quiet)
    content = Path("q/adapter/adapter_model.safetensors").read_bytes()
    second = run_quickstart("q", steps=1, fresh=True, console=quiet)
    assert first == second, "the same run twice"
    assert Path("q-2/quickstart.json").exists()
    assert Path("q/adapter/adapter_model.safetensors").read_bytes() == content


def test_a_run_that_was_cut_before_the_comparison_compares(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Console(quiet=True)
    result = train(settings("q", 1), console=quiet)
    stamp = (result.adapter / "adapter_model.safetensors").stat().st_mtime_ns
    found = run_quickstart("q", steps=1, console=quiet)
    assert found["rows"] == 100 and (result.adapter / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    monkeypatch.setattr(quickstart, "compare", None)  # the second time it only reads
    assert run_quickstart("q", steps=1, console=quiet) == found
    Path("q/quickstart.json").write_text("{")
    with pytest.raises(ConfigError, match=r"q/quickstart.json: cannot be read .*delete it to compare again"):
        run_quickstart("q", steps=1, console=quiet)


def test_other_steps_in_the_same_folder_are_refused(short: None) -> None:
    quiet = Console(quiet=True)
    run_quickstart("q", steps=1, console=quiet)
    with pytest.raises(ConfigError, match="max_steps"):
        run_quickstart("q", steps=2, console=quiet)


def test_the_program_is_called_as_this_shell_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(settings("a folder", 1), console=Console(quiet=True))
    scripts = tmp_path / "env" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    assert next_commands(result)[0].startswith(f"{scripts}/python -m graft chat embedded --adapter 'a folder/adapter'")
    (scripts / "graft").write_text("#!/bin/sh\n")
    (scripts / "graft").chmod(0o755)
    assert next_commands(result)[0].startswith("env/bin/graft chat")
    monkeypatch.setenv("PATH", str(scripts))
    assert next_commands(result)[0].startswith("graft chat")


def test_no_held_out_row_was_trained() -> None:
    run = settings("q")
    trained = {row.question for row in load_rows(run.data.train, columns=run.data.columns)}
    held = load_rows(run.data.train.replace("train.jsonl", "dev.jsonl"), columns={"prompt": "meaning_representation"})
    assert len(trained) == 1875 and len(held) == 100 and not trained & {row.question for row in held}
