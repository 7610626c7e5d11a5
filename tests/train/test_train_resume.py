"""A killed run, started again with the same command, ends with the very bytes of one that was not killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from graft.train.config import Run

SCRIPT = Path(__file__).parent / "killed.py"
SOURCE = Path(__file__).parents[2] / "src"
STEPS = 14
KILLED = -9
TIMES = ("seconds", "tokens_per_second")


def attempts(*plan: tuple[Run, Path, str]) -> tuple[list[int], str]:
    """How each start of a run in a folder ended, and what they said on stderr."""
    starts = []
    for run, output, how in plan:
        file = output.parent / f"{output.name}.yaml"
        file.write_text(yaml.safe_dump({**run.model_dump(mode="json"), "output": str(output)}), encoding="utf-8")
        starts.append((str(file), how))
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(SCRIPT), json.dumps(starts)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_killed_at_random_steps(settings: Callable[..., Run], tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    steps = [5, *sorted(chance.sample(range(6, STEPS), 2))]  # 5: behind a checkpoint that the best evaluation asked for
    hows = [f"begin:{steps[0]}", f"begin:{steps[1]}", f"begin:{steps[2]}"]
    train = {"max_steps": STEPS, "accumulate": 2, "keep_best": "loss", "save_every": 3, "eval_every": 4, "log_every": 9}
    run = settings(train=train)
    whole, killed, other = tmp_path / "whole", tmp_path / "killed", tmp_path / "other"
    ends, said = attempts(
        (run, whole, ""),
        *((run, killed, how) for how in hows),
        (run, killed, ""),
        (run.model_copy(update={"seed": 1}), other, ""),
    )
    assert ends == [0, KILLED, KILLED, KILLED, 0, 0], f"seed {seed}: {said}"
    assert adapter(killed) == adapter(whole), f"seed {seed}, steps {steps}"
    assert adapter(other) != adapter(whole), "the comparison itself must see a difference"
    for mine, theirs in zip(lines(killed), lines(whole), strict=True):
        assert {k: v for k, v in mine.items() if k not in TIMES} == {k: v for k, v in theirs.items() if k not in TIMES}


def test_killed_while_saving_and_stopped(settings: Callable[..., Run], tmp_path: Path) -> None:
    """Packs, a prefix with its MLP, gradient checkpointing; a kill before a rename; then SIGINT and SIGTERM."""
    run = settings(
        method={"method": "prefix_tuning", "length": 3, "hidden": 8},
        data={"packing": True, "max_length": 64, "eval": 0.2},
        train={"max_steps": None, "epochs": 3.0, "batch_size": 1, "gradient_checkpointing": True, "save_every": 3},
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ends, said = attempts((run, whole, ""), *((run, killed, how) for how in ("save:6", "int:4", "term:7", "")))
    assert ends == [0, KILLED, 130, 130, 0], said
    assert "SIGINT: stopped after step 4 of" in said and "checkpoint-4 is saved" in said
    assert adapter(killed) == adapter(whole)
    assert not list(killed.rglob("*.partial"))


@pytest.mark.slow
def test_killed_on_the_embedded_base(sources: dict[str, str], settings: Callable[..., Run], tmp_path: Path) -> None:
    run = settings(train={"max_steps": 8}).model_copy(update={"base": "embedded", "precision": "auto"})
    seed = random.randrange(10**6)
    steps = sorted(random.Random(seed).sample(range(1, 8), 3))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    hows = (*(f"begin:{step}" for step in steps), "")
    ends, said = attempts((run, whole, ""), *((run, killed, how) for how in hows))
    assert ends == [0, KILLED, KILLED, KILLED, 0], f"seed {seed}: {said}"
    assert adapter(killed) == adapter(whole), f"seed {seed}, steps {steps}"
