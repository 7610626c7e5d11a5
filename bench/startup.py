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
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(1 if options.quick else options.runs):
        for name, arguments in CASES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    print("| process | seconds |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} |")


if __name__ == "__main__":
    main()
