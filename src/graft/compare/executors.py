"""Where units run: processes of this machine, or Ray tasks. Both take units and give their rows back as they come."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from graft.compare.grid import Row, Unit
from graft.compare.settings import Executor as Settings
from graft.errors import ConfigError

LOST = 2
"""Workers that a unit may lose before it counts as failed."""
PATIENCE = 60.0
"""Seconds that an interrupted worker has to save its checkpoint."""
INTERRUPTED = "interrupted"
SEEN = "CUDA_VISIBLE_DEVICES"
"""The GPUs that a process sees, by number or UUID: the first is its `cuda:0`."""


class Executor(Protocol):
    """Does units; several may be under way at once."""

    @property
    def free(self) -> int:
        """How many more units would start at once."""

    def start(self, unit: Unit) -> None:
        """Begin a unit."""

    def next(self) -> tuple[Unit, Row]:
        """Wait for the next unit that ends. A row says "lost" where its process died, with why."""

    def close(self) -> None:
        """Stop what is under way; it keeps its checkpoints."""


def executor(settings: Settings, device: str | None = None) -> Executor:
    """The executor that the settings ask for.

    Args:
        settings: of the executor.
        device: of the comparison; `cuda:1` names the GPU of this machine that all its workers get. Ray chooses itself.

    Raises:
        ConfigError: Ray is asked for and not installed, or its cluster does not answer.
    """
    return Local(settings.workers, device) if settings.kind == "local" else OnRay(settings)


@contextlib.contextmanager
def opened(settings: Settings, device: str | None = None) -> Iterator[Executor]:
    """The executor while the block runs."""
    found = executor(settings, device)
    try:
        yield found
    finally:
        found.close()


# ------------------------------------------------------------------------------------------------- processes


class _Process:
    """A process that does units (see `graft.compare.worker`): JSON lines in, JSON lines out."""

    def __init__(self, env: dict[str, str]) -> None:
        command = [sys.executable, "-P", "-m", "graft.compare.worker"]  # -P: a queue.py of the user's is not Python's
        own: dict[str, Any] = {} if sys.platform == "win32" else {"start_new_session": True}  # Ctrl-C is for us alone
        own |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, **own)
        self.unit: Unit | None = None

    def start(self, unit: Unit) -> None:
        assert self.process.stdin is not None
        self.unit = unit
        with contextlib.suppress(BrokenPipeError):  # it died between two units: `row` says so
            self.process.stdin.write(json.dumps(unit) + "\n")
            self.process.stdin.flush()

    def row(self) -> Row:
        """Wait for what comes of the unit."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        with contextlib.suppress(ValueError):  # a broken line: it died while it wrote, or something else wrote
            if line.endswith("\n"):
                return json.loads(line)
        self.process.kill()
        return {"status": "lost", "why": _died(self.process.wait())}


class Local:
    """Processes of this machine. They outlive a unit, so that the base is loaded once; one that dies is replaced."""

    def __init__(self, workers: int, device: str | None) -> None:
        self.workers: list[_Process | None] = [None] * workers
        self.device = device
        self.rows: queue.SimpleQueue[tuple[int, Row]] = queue.SimpleQueue()

    @property
    def free(self) -> int:
        return sum(worker is None or worker.unit is None for worker in self.workers)

    def start(self, unit: Unit) -> None:
        number = next(i for i, worker in enumerate(self.workers) if worker is None or worker.unit is None)
        env = _environment(number, len(self.workers), self.device)
        worker = self.workers[number] = self.workers[number] or _Process(env)
        worker.start(unit)
        threading.Thread(target=lambda: self.rows.put((number, worker.row())), daemon=True).start()

    def next(self) -> tuple[Unit, Row]:
        number, row = self.rows.get()
        worker = self.workers[number]
        assert worker is not None and worker.unit is not None
        unit, worker.unit = worker.unit, None
        if row["status"] == "lost":
            self.workers[number] = None
        if row["status"] == INTERRUPTED:
            raise KeyboardInterrupt
        return unit, row

    def close(self) -> None:
        going = [worker for worker in self.workers if worker is not None]
        for worker in going:
            if worker.unit is not None:
                worker.process.terminate()  # it saves a checkpoint
            elif worker.process.stdin is not None:
                worker.process.stdin.close()
        for worker in going:
            try:
                worker.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.process.kill()
            for pipe in (worker.process.stdin, worker.process.stdout):
                with contextlib.suppress(OSError):
                    pipe and pipe.close()
        self.workers = [None] * len(self.workers)


def _environment(number: int, of: int, device: str | None) -> dict[str, str]:
    """A worker's share of the cores, and one GPU alone: of several that it sees `Trainer` would take all at once. Units
    then say `cuda` (see `Grid`), whichever it is."""
    import torch

    own = dict(os.environ)
    if of > 1:
        own.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // of)))
    asked, count = torch.device(device or "cuda"), torch.cuda.device_count()
    if asked.type == "cuda" and count > 1:
        seen = own.get(SEEN, ",".join(map(str, range(count)))).split(",")
        own[SEEN] = seen[number % count if asked.index is None else asked.index].strip()
    return own


def _died(code: int) -> str:
    if code == -9:
        return "its process was killed, as the system does when memory runs out; see graft plan"
    return f"its process ended with code {code}"


# ------------------------------------------------------------------------------------------------- Ray


class OnRay:
    """Ray tasks; a run whose machine is lost is done again, from its last checkpoint."""

    def __init__(self, settings: Settings) -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError:
            raise ConfigError("executor.kind: ray is not installed; pip install ray, or take local") from None
        self.workers = settings.workers
        self.going: dict[Any, Unit] = {}
        self.ours = not self.ray.is_initialized()
        if self.ours:
            asked: dict[str, Any] = {"address": settings.address}
            if settings.address is None:
                asked |= {"num_cpus": max(settings.workers, int(settings.workers * settings.cpus))}
                asked |= {"include_dashboard": False}
            try:
                self.ray.init(**asked, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(f"executor.address: {' '.join(str(error).split())}") from None
        self._check(settings)
        options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "max_retries": 0}
        self.task = self.ray.remote(**options)(_on_ray)

    def _check(self, settings: Settings) -> None:
        """Refuse what no machine of the cluster has: such a task would wait for ever."""
        for each in self.ray.nodes():
            has = each["Resources"]
            if each["Alive"] and has.get("CPU", 0) >= settings.cpus and has.get("GPU", 0) >= settings.gpus:
                return
        self.close()
        raise ConfigError(
            f"executor: no machine of the cluster has {settings.cpus:g} CPUs and {settings.gpus:g} GPUs for a run; ask "
            "for fewer"
        )

    @property
    def free(self) -> int:
        return self.workers - len(self.going)

    def start(self, unit: Unit) -> None:
        self.going[self.task.remote(unit, os.getcwd())] = unit

    def next(self) -> tuple[Unit, Row]:
        (done,), _ = self.ray.wait(list(self.going), num_returns=1)
        unit = self.going.pop(done)
        try:
            return unit, self.ray.get(done)
        except self.ray.exceptions.RayError as error:
            why = " ".join(str(getattr(error, "cause", None) or error).split())[:200]
            return unit, {"status": "lost", "why": f"Ray lost it ({type(error).__name__}: {why})"}

    def close(self) -> None:
        for task in self.going:
            with contextlib.suppress(Exception):
                self.ray.cancel(task, force=True)
        if self.ours:
            self.ray.shutdown()


_worker: Any = None


def _on_ray(unit: Unit, folder: str) -> Row:
    """A unit in a process of Ray's, which keeps the base for the next one; `folder`: where relative paths begin."""
    global _worker
    os.chdir(folder)
    from graft.compare.work import Worker

    _worker = _worker or Worker()
    return _worker.do(unit)
