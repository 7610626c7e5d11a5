"""A comparison on a local Ray cluster of two workers; a worker that is lost in the middle of a run."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from test_compare_run import SOURCE, lasting

from graft.compare.run import compare
from graft.compare.settings import Compare

pytest.importorskip("ray")


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_lost_worker(settings: Callable[..., Compare], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    asked = settings(search={"kind": "none"}, train={"max_steps": 6, "batch_size": 4, "save_every": 2, "lr": 1e-2})
    killed: list[int] = []
    killer = threading.Thread(target=_kill_one, args=(tmp_path / "out", killed), daemon=True)
    killer.start()
    found = compare(asked.model_copy(update={"executor": on_ray(asked)}), console=Console(quiet=True))
    killer.join()
    assert killed, "no worker was killed"
    again = compare(asked.model_copy(update={"output": str(tmp_path / "again")}), console=Console(quiet=True))
    assert lasting(found["entries"]) == lasting(again["entries"])
    assert all(run["status"] == "ok" for entry in found["entries"] for run in entry["runs"])


def on_ray(settings: Compare) -> object:
    return settings.executor.model_copy(update={"kind": "ray", "workers": 2})


def _kill_one(folder: Path, killed: list[int]) -> None:
    """SIGKILL to a Ray worker once a run has a checkpoint."""
    until = time.monotonic() + 120
    while not killed and time.monotonic() < until:
        if list(folder.glob("runs/*/*/run/checkpoints/checkpoint-*")):
            busy = [
                each for each in psutil.process_iter(["cmdline"]) if "_on_ray" in " ".join(each.info["cmdline"] or ())
            ]
            if busy:
                killed.append(busy[0].pid)
                busy[0].kill()
        time.sleep(0.02)
