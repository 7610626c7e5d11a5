"""What the scripts of this folder share: the machine's facts, alternating medians, equal losses, random bases, results.

A result is one JSON file in `bench/results/`: the machine, the command, the date, and a row for each cell. A row also
keeps the hash of the code it was measured with, so a cell that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DATA = ROOT.parent / "shared" / "data"
"""Real rows, where this checkout has them beside it."""
REPEATS = 5
TOLERANCE = 1e-4
"""Relative distance of two loss curves in fp32."""
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")
VOCABULARIES = (32_000, 151_936)
SIZES: dict[str, dict[str, int]] = {  # parameters at a vocabulary of 32,000, whose embedding is also the head
    "30M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 6},
    "60M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 14, "num_attention_heads": 8},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ------------------------------------------------------------------------------------------------- the command


def parser(doc: str | None, **more: Any) -> argparse.ArgumentParser:
    """The options that each script has."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0], **more)
    made.add_argument("--quick", action="store_true", help="tiny shapes, to see that the script runs")
    made.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    made.add_argument("--repeats", type=int, help=f"measurements of each variant ({REPEATS}; with --quick 1)")
    made.add_argument("--again", action="store_true", help="measure again what is measured already")
    return made


def begin(options: argparse.Namespace) -> None:
    """Set the threads and the repeats that the options ask for."""
    torch.set_num_threads(options.threads)
    if options.repeats is None:
        options.repeats = 1 if options.quick else REPEATS


# ------------------------------------------------------------------------------------------------- facts


def facts() -> dict[str, Any]:
    """The machine and the versions that a measurement belongs to."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([named[0] if named else platform.processor() or platform.machine(), *known])


def code() -> str:
    """A hash of Graft's source and of the scripts here: what a row was measured with."""
    found = hashlib.sha256()
    for file in sorted([*(ROOT / "src").rglob("*.py"), *Path(__file__).parent.glob("*.py")]):
        if file.name != "report.py":
            found.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:12]


def commit() -> str:
    """The commit that is checked out, with a + if files differ from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# ------------------------------------------------------------------------------------------------- time


def alternate(variants: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each variant, measured in turn in one process; every other round goes backwards.

    Args:
        variants: name to what is timed.
        repeats: measurements of each.
        warmup: rounds before, which do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-warmup, repeats):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            gc.collect()
            _wait()
            start = time.perf_counter()
            variants[name]()
            _wait()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of the rounds: of what loads the machine for a while both have their part."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def assert_same_losses(ours: Sequence[float], theirs: Sequence[float], relative: float = TOLERANCE) -> float:
    """The largest relative distance of two loss curves.

    Raises:
        AssertionError: it is more than `relative`.
    """
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(range(len(apart)), key=apart.__getitem__)
    assert apart[worst] <= relative, (
        f"step {worst + 1} of {len(apart)}: loss {ours[worst]:.6f} and {theirs[worst]:.6f} are {apart[worst]:.1e} apart"
    )
    return apart[worst]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------- bases and rows


def llama_config(size: str, vocabulary: int) -> LlamaConfig:
    """A Llama of about that many parameters at a vocabulary of 32,000; "tiny" is for --quick."""
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **SIZES.get(size, tiny),
    )


def llama(size: str, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random base; the same one for the same arguments."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(size, vocabulary)).to(dtype).eval()


def rows(count: int, length: int, vocabulary: int, seed: int = 0, labelled: float = 1.0) -> dict[str, Tensor]:
    """A batch without padding: `input_ids`, `attention_mask`, `labels` (B, T), the last `labelled` share trained."""
    drawn = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, vocabulary, (count, length), generator=drawn)
    labels = input_ids.clone()
    # The first token has no predictor, except behind a soft prompt, where Trainer does not count it.
    labels[:, : max(1, round(length * (1 - labelled)))] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


# ------------------------------------------------------------------------------------------------- results


class Results:
    """The rows of one script, written after each cell.

    Args:
        name: of the file in `bench/results/`; with --quick nothing is read or written.
        options: of the command line.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.file: Path | None = None if options.quick else RESULTS / f"{name}.json"
        self.again, self.code, self.machine = options.again, code(), facts()
        self.repeats = options.repeats
        self.cells: dict[str, dict[str, Any]] = {}
        if self.file is not None and self.file.is_file():
            self.cells = json.loads(self.file.read_text(encoding="utf-8"))["cells"]

    def done(self, cell: str) -> bool:
        """Whether the cell was measured with this code, on this machine."""
        known = self.cells.get(cell, {})
        return not self.again and known.get("code") == self.code and known.get("machine") == self.machine

    def put(self, cell: str, **row: Any) -> None:
        """Store a cell and write the file."""
        stamp = {
            "code": self.code,
            "commit": commit(),
            "machine": self.machine,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "repeats": self.repeats,
            "load": round(os.getloadavg()[0], 2),
        }
        self.cells[cell] = row | stamp
        if self.file is None:
            return
        self.file.parent.mkdir(exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps({"cells": self.cells}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.file)


def table(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A markdown table; numbers to the right."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "" if value is None else str(value)

    body = [[text(value) for value in line] for line in lines]
    marks = ["---:" if lines and not isinstance(value, str) else "---" for value in (lines[0] if lines else columns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(columns), marks, *body])
