"""What a worker of this machine is given: its cores, one GPU, and units that name no other."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from graft import base
from graft.compare import executors, peak
from graft.compare import run as running
from graft.compare.executors import executor
from graft.compare.settings import Compare, Executor
from graft.errors import ConfigError
from graft.train.run import Interrupted

GIVEN = "CUDA_VISIBLE_DEVICES"


class Started:
    """Stands for a process; what it was started with is in `environments`."""

    def __init__(self, environments: list[dict[str, str]], env: dict[str, str]) -> None:
        environments.append(env)
        self.stdin, self.stdout = io.StringIO(), io.StringIO(json.dumps({"status": "ok"}) + "\n")

    def wait(self, _: float | None = None) -> int:
        return 0

    def terminate(self) -> None: ...


def given(
    monkeypatch: pytest.MonkeyPatch, count: int, seen: str | None, workers: int, device: str | None
) -> list[dict[str, str]]:
    """The environments of so many workers of a machine with `count` GPUs that `seen` leaves."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(executors.subprocess, "Popen", lambda *_, env, **__: Started(found, env))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv(GIVEN, raising=False) if seen is None else monkeypatch.setenv(GIVEN, seen)
    local = executor(Executor(workers=workers), device)
    for number in range(workers):
        local.start({"folder": str(number), "run": {}})
    for _ in range(workers):
        local.next()
    local.close()
    return found


@pytest.mark.parametrize(
    ("count", "seen", "workers", "device", "wanted"),
    [
        (4, None, 1, None, ["0"]),
        (4, None, 1, "cuda", ["0"]),
        (2, None, 3, None, ["0", "1", "0"]),
        (4, None, 2, "cuda:2", ["2", "2"]),
        (2, "5,3", 2, None, ["5", "3"]),
        (2, "5,3", 1, "cuda:1", ["3"]),
        (2, "GPU-8f, GPU-9a", 2, None, ["GPU-8f", "GPU-9a"]),
        (2, "3,5,-1,7", 3, None, ["3", "5", "3"]),  # what follows a number that is none does not count
        (1, None, 2, None, [None, None]),
        (1, "GPU-8f", 2, "cuda:0", ["GPU-8f", "GPU-8f"]),
        (0, "", 2, None, ["", ""]),
        (0, None, 2, "cpu", [None, None]),
        (4, None, 2, "cpu", [None, None]),
    ],
)
def test_a_worker_sees_one_gpu(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    seen: str | None,
    workers: int,
    device: str | None,
    wanted: list[str | None],
) -> None:
    assert [env.get(GIVEN) for env in given(monkeypatch, count, seen, workers, device)] == wanted


def test_the_executor_hears_of_the_device(settings: Callable[..., Compare], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def opened(*given: Any) -> Any:
        asked.extend(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "opened", opened)
    with pytest.raises(Interrupted):
        running.compare(settings(device="cpu"), console=Console(quiet=True))
    assert asked == [Executor(), "cpu"]


def test_several_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [env.get("OMP_NUM_THREADS") for env in given(monkeypatch, 0, None, 2, None)] == ["4", "4"]
    assert [env.get("OMP_NUM_THREADS") for env in given(monkeypatch, 0, None, 1, None)] == [None]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert base.device_of("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="device: cuda:2 is asked for, but the last GPU here is cuda:1"):
        base.device_of("cuda:2")


def test_the_peak_is_counted_anew_before_the_first_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With an index torch refuses it until CUDA is initialised."""
    calls: list[str] = []
    monkeypatch.setattr(peak, "CLEAR", tmp_path / "clear")
    for name in ("init", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: calls.append(name))
    peak.reset(torch.device("cuda:0"))
    assert calls[0] == "init" and "reset_peak_memory_stats" in calls


def test_a_unit_s_row_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, str]] = []
    monkeypatch.setattr(executors.subprocess, "Popen", lambda *_, env, **__: Started(found, env))
    local, unit = executor(Executor()), {"folder": "a", "run": {"device": "cuda"}}
    assert local.free == 1
    local.start(unit)
    assert local.free == 0
    got: tuple[Any, Any] = local.next()
    assert got == (unit, {"status": "ok"}) and local.free == 1
