"""What an endpoint answered, line by line on the disk before anything else happens with it.

| line | fields |
|---|---|
| an answer | key, source, row, template, sample, text, and where it comes from (see `PROVENANCE`) |
| a failure | key, source, row, template, sample, failed: why |
| a charge | charged: why |

Each may have a cost.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from graft.errors import DataError

PROVENANCE = (
    *("endpoint", "model_asked", "model", "settings", "prompt_hash", "finish_reason", "usage", "time", "request_id"),
)
"""Fields of an answer's line that are written beside each generated row."""


class Journal:
    """A JSONL file that only grows; each line is on the disk when `add` returns.

    Attributes:
        answers: the last answer for each key.
        failed: keys of requests that failed in this or an earlier start, answered since or not.
        cost: the sum of all lines.
        repaired: a half-written last line, left by a kill, was removed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.answers, self.failed, self.cost = path, dict[str, dict[str, Any]](), set[str](), 0.0
        self.repaired = self._repair()
        if path.exists():
            for number, text in enumerate(path.read_bytes().splitlines(), start=1):
                self._take(self._line(text, number))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line and wait for the disk."""
        content = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8")
        while content:
            content = content[os.write(self._file, content) :]
        os.fsync(self._file)
        self._take(line)

    def close(self) -> None:
        """Let the file go."""
        os.close(self._file)

    def _take(self, line: dict[str, Any]) -> None:
        self.cost += line.get("cost", 0.0)
        if "text" in line:
            self.answers[line["key"]] = line
        elif "key" in line:
            self.failed.add(line["key"])

    def _repair(self) -> bool:
        if not self.path.exists():
            return False
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return False
        with self.path.open("r+b") as file:
            file.truncate(whole)
        return True

    def _line(self, text: bytes, number: int) -> dict[str, Any]:
        try:
            line = json.loads(text)
            if (
                isinstance(line, dict)
                and isinstance(line.get("text", ""), str)
                and ("key" in line or "charged" in line)
            ):
                return line
        except ValueError:
            pass
        raise DataError(f"{self.path} line {number}: not an answer that Graft wrote; mend or remove the line")
