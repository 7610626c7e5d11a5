"""A process that does units: JSON lines on stdin, a row for each on stdout, until stdin ends; then it ends at once."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import warnings
from typing import TextIO


def main() -> None:
    """Do units until nobody hands out any. A run that nobody waits for would hold its folder's lock: it ends too."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())  # rows say what matters
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    units: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, units), daemon=True).start()
    from graft.compare.executors import INTERRUPTED
    from graft.compare.work import Worker
    from graft.train.run import Interrupted

    worker = Worker()
    while True:
        try:
            row = worker.do(json.loads(units.get()))
        except (Interrupted, KeyboardInterrupt):
            row = {"status": INTERRUPTED, "why": None}
        out.write(json.dumps(row) + "\n")
        out.flush()
        if row["status"] == INTERRUPTED:
            os._exit(0)


def _listen(lines: TextIO, units: queue.SimpleQueue[str]) -> None:
    for line in lines:
        units.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
