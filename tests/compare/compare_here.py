"""An executor for tests: units run in the test's own process."""

from __future__ import annotations

import json

from graft.compare.grid import Row, Unit
from graft.compare.work import Worker

ANIMALS = ("cat", "dog", "bird", "fish", "horse", "mouse", "frog", "bear")


class Here:
    """An executor in this process: no unit is under way while another ends."""

    def __init__(self) -> None:
        self.worker, self.units = Worker(), list[Unit]()
        self.done: list[Unit] = []

    @property
    def free(self) -> int:
        return 1 - len(self.units)

    def start(self, unit: Unit) -> None:
        self.units.append(json.loads(json.dumps(unit)))

    def next(self) -> tuple[Unit, Row]:
        unit = self.units.pop()
        self.done.append(unit)
        return unit, self.worker.do(unit)

    def close(self) -> None: ...
