"""`graft compare` on real tasks: the tables, a comparison that is killed twice, and halving against the whole grid.

    python bench/compare.py e2e            bench/compare_e2e.yaml, undisturbed
    python bench/compare.py sst2           bench/compare_sst2.yaml, undisturbed
    python bench/compare.py killed         SST-2 again, killed twice (SIGKILL), against the undisturbed one
    python bench/compare.py halving        E2E, three methods: successive halving against every rate and seed

Each writes `bench/results/compare_<what>.json`; the reports lie in `out/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import common

ROOT, RESULTS = common.ROOT, common.RESULTS
TIMES = ("seconds", "training_its", "evaluation_its", "peak_bytes", "latency", "folder", "adapter_bytes")
KILLS = (20, 60)
"""Finished runs at which the comparison is killed."""
FEW = {"lora r=16 all-linear", "ia3", "prompt tuning"}


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("what", choices=["e2e", "sst2", "killed", "halving"])
    made.add_argument("--threads", type=int, default=2)
    asked = made.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    if asked.what in ("sst2", "killed") and not common.DATA.is_dir():
        sys.exit(f"{common.DATA} is not there: SST-2 cannot be measured")
    found = {"e2e": e2e, "sst2": sst2, "killed": killed, "halving": halving}[asked.what]()
    found |= {"machine": common.facts(), "command": f"python bench/compare.py {asked.what}"}
    file = RESULTS / f"compare_{asked.what}.json"
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{file} written")


def e2e() -> dict[str, Any]:
    """The E2E comparison; forgetting on stories, where they are there."""
    text = common.DATA / "pretrain" / "tinystories_valid.txt"
    return _compared("compare_e2e", "out/compare_e2e", *([f"forgetting={text}"] if text.is_file() else []))


def sst2() -> dict[str, Any]:
    """The SST-2 comparison."""
    return _compared("compare_sst2", "out/compare_sst2")


def killed() -> dict[str, Any]:
    """SST-2, killed twice, and whether every figure but the times is that of the undisturbed one."""
    whole, folder = ROOT / "out" / "compare_sst2", ROOT / "out" / "compare_sst2_killed"
    if not (whole / "report.html").is_file():
        sys.exit("run `python bench/compare.py sst2` before")
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    for count in KILLS:
        process = _start("compare_sst2", f"output={folder}")
        while len(list(folder.glob("runs/*/*/row.json"))) < count:
            if process.poll() is not None:
                sys.exit("the comparison ended before it was killed")
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if _start("compare_sst2", f"output={folder}").wait():
        sys.exit("the comparison failed")
    first, second = (_lasting(json.loads((each / "compare.json").read_text())["entries"]) for each in (whole, folder))
    return {"equal": first == second, "kills": KILLS, "entries": len(first), "seconds": time.perf_counter() - start}


def halving() -> dict[str, Any]:
    """The winner's rate of each method, and the wall time, by successive halving and by the whole grid."""
    import yaml

    settings = yaml.safe_load((ROOT / "bench" / "compare_e2e.yaml").read_text())
    settings["methods"] = {label: each for label, each in settings["methods"].items() if label in FEW}
    settings |= {"baselines": {"base": False, "full": False, "icl": False}, "latency": False, "forgetting": None}
    settings |= {"train": {"max_steps": 45, "batch_size": 16}, "test_limit": 50}
    found: dict[str, Any] = {}
    for kind in ("halving", "exhaustive"):
        folder = ROOT / "out" / f"compare_{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        file = ROOT / "out" / f"{kind}.yaml"
        file.parent.mkdir(exist_ok=True)
        search = {"kind": kind, "least_steps": 5}
        file.write_text(yaml.safe_dump(settings | {"search": search, "output": str(folder)}, sort_keys=False))
        start = time.perf_counter()
        if subprocess.run([sys.executable, "-m", "graft", "compare", str(file)], cwd=ROOT, env=_env()).returncode:
            sys.exit("the comparison failed")
        entries = json.loads((folder / "compare.json").read_text())["entries"]
        best = json.loads((folder / "summary.json").read_text())["verdict"]["best"]
        rates = {entry["label"]: entry["lr"] for entry in entries}
        quality = {entry["label"]: [run["quality"]["bleu"] for run in entry["runs"]] for entry in entries}
        found[kind] = {"seconds": time.perf_counter() - start, "best": best, "rates": rates, "bleu": quality}
    found["share of the wall time"] = found["halving"]["seconds"] / found["exhaustive"]["seconds"]
    return found


def _compared(name: str, output: str, *overrides: str) -> dict[str, Any]:
    shutil.rmtree(ROOT / output, ignore_errors=True)
    start = time.perf_counter()
    if _start(name, f"output={output}", *overrides).wait():
        sys.exit("the comparison failed")
    seconds = time.perf_counter() - start
    shutil.copy(ROOT / output / "report.md", RESULTS / f"{name}.md")
    return {"seconds": seconds, "summary": json.loads((ROOT / output / "summary.json").read_text())}


def _start(name: str, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "graft", "compare", f"bench/{name}.yaml", *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=_env())


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}


def _lasting(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _lasting(value) for key, value in found.items() if key not in TIMES}
    return [_lasting(each) for each in found] if isinstance(found, list) else found


if __name__ == "__main__":
    main()
