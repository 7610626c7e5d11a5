"""How long it takes until something happens: `import graft`, `graft --help`, and peft's import beside it.

    python bench/startup.py            # medians of 5 new processes each, in turn
    python bench/startup.py --quick    # one of each

The limits: `import graft` under 0.3 s without torch, `graft --help` under 0.5 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import common

NO_TORCH = "import graft, sys; sys.exit('torch' in sys.modules)"
CASES = {
    "python alone": ["-c", "pass"],
    "import graft, without torch": ["-c", NO_TORCH],
    "graft --help": ["-m", "graft", "--help"],
    "import torch": ["-c", "import torch"],
    "import peft": ["-c", "import peft"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="measured again in any case")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(1 if options.quick else options.repeats):
        for name, arguments in CASES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    results = common.Results("startup", options)
    for name, values in seconds.items():
        results.put(name, process=name, seconds=round(statistics.median(values), 3), repeats=len(values))
    print(show(results.cells))


def show(cells: dict[str, dict[str, Any]]) -> str:
    """The table: seconds of each process."""
    return common.table(["process", "seconds"], [[row["process"], row["seconds"]] for row in cells.values()])


if __name__ == "__main__":
    main()
