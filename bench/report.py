"""docs/benchmarks.md from the results of all scripts.

    python bench/report.py [--measure] [--only train_step sft]

With --measure the scripts run first, one after the other; what this code has measured on this machine is not measured
again. Nothing else should run meanwhile: cells measured under load are marked.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common

PAGE = common.ROOT / "docs" / "benchmarks.md"
SCRIPTS = {
    "train_step": "One training step, beside peft and full fine-tuning",
    "sft": "Instruction tuning, beside TRL with peft",
    "loss_memory": "The loss on labelled rows",
    "trunk": "The frozen trunk",
    "mixed_batch": "Many adapters in one batch",
    "startup": "Start",
}
Row = dict[str, Any]


def _is(part: str, adapters: Sequence[str], dtype: str, name: str, row: Row) -> bool:
    return any(row.get("case") == f"{part}, {each}" for each in adapters) and row.get("dtype") == dtype


def _seconds(row: Row) -> float:
    return float(row["seconds"])


TARGETS: list[tuple[str, str, Callable[[str, Row], bool], Callable[[Row], float | None], float]] = [
    (
        "train_step",
        "LoRA on all linears against peft, fp32: at most 0.85",
        lambda name, row: row["method"] == "lora-all" and row["dtype"] == "fp32",
        lambda row: row.get("of_peft"),
        0.85,
    ),
    (
        "train_step",
        "LoRA on all linears against peft, bf16: at most 0.9",
        lambda name, row: row["method"] == "lora-all" and row["dtype"] == "bf16",
        lambda row: row.get("of_peft"),
        0.9,
    ),
    ("train_step", "every cell against peft: at most 1", lambda name, row: True, lambda row: row.get("of_peft"), 1.0),
    (
        "train_step",
        "LoRA on all linears against full fine-tuning: at most 0.70",
        lambda name, row: row["method"] == "lora-all",
        lambda row: row.get("of_full"),
        0.7,
    ),
    (
        "sft",
        "against TRL's default, vocabulary 32,000: at most 1/5 of its time",
        lambda name, row: row["vocabulary"] == 32_000,
        lambda row: 1 / row["variants"]["trl-default"]["speedup"],
        1 / 5,
    ),
    (
        "sft",
        "against TRL's best setting, vocabulary 32,000: at most 1/2.5",
        lambda name, row: row["vocabulary"] == 32_000,
        lambda row: 1 / row["variants"]["trl-best"]["speedup"],
        1 / 2.5,
    ),
    (
        "sft",
        "against TRL's default, vocabulary 151,936: at most 1/7",
        lambda name, row: row["vocabulary"] == 151_936,
        lambda row: 1 / row["variants"]["trl-default"]["speedup"],
        1 / 7,
    ),
    (
        "loss_memory",
        "memory of the loss, 30 % labelled, vocabulary 32,768: at most 1/6 of the plain form's",
        lambda name, row: name.startswith("loss/32768/") and row["labelled"] == 0.3,
        lambda row: row["memory"],
        1 / 6,
    ),
    (
        "trunk",
        "LoRA in the top half with kept states against full fine-tuning: at most 0.40",
        lambda name, row: True,
        lambda row: row["kept_of_full"],
        0.4,
    ),
    *(
        (
            "mixed_batch",
            f"{part} with {what} against the bare base, {dtype}: at most {limit}",
            functools.partial(_is, part, adapters, dtype),
            lambda row: row["of_base"],
            limit,
        )
        for part, what, adapters, dtype, limit in (
            ("decode", "16 or 64 adapters", ("16", "64", "16, ranks 4 to 32"), "fp32", 1.35),
            ("decode", "16 or 64 adapters", ("16", "64", "16, ranks 4 to 32"), "bf16", 1.6),
            ("prefill", "16 or 64 adapters", ("16", "64", "16, ranks 4 to 32"), "fp32", 1.15),
            ("prefill", "16 or 64 adapters", ("16", "64", "16, ranks 4 to 32"), "bf16", 1.15),
            ("decode of one row", "DoRA", ("DoRA",), "fp32", 1.4),
            ("decode of one row", "DoRA", ("DoRA",), "bf16", 1.4),
        )
    ),
    (
        "mixed_batch",
        "64 rows with no adapter among those attached, on the frozen base, against the bare one: at most 1/0.97",
        lambda name, row: str(row.get("case", "")).endswith("none acts"),
        lambda row: row["of_base"],
        1 / 0.97,
    ),
    (
        "mixed_batch",
        "64 adapters against peft's adapter_names: at most 1/3 of its time",
        lambda name, row: str(row.get("case", "")).endswith(", 64"),
        lambda row: 1 / row["peft_of_graft"],
        1 / 3,
    ),
    (
        "mixed_batch",
        "loading one adapter more, ms: at most 20",
        lambda name, row: row["case"] == "loading, graft",
        lambda row: max(row["first"], row["last"]),
        20,
    ),
    ("startup", "import graft, s: at most 0.3", lambda name, row: "import graft" in name, _seconds, 0.3),
    ("startup", "graft --help, s: at most 0.5", lambda name, row: "--help" in name, _seconds, 0.5),
]

LIMITS = {
    "against full fine-tuning": (
        "A LoRA step has two of full fine-tuning's three products on each linear, and thin ones of rank 16 beside: in "
        "bf16 six of them take 330 microseconds where the two take 1,010 (384 tokens, 512 x 512, two cores). With the "
        "larger vocabulary, and in fp32, the target holds."
    ),
    "TRL's best": (
        "60 % of Graft's step are matrix products that run at 380 of the 430 GFLOP/s that 2048-cubed bf16 products "
        "reach here; without anything else they would take 1.8 s for 24 rows, where Graft takes 3.2 and TRL's best "
        "6.9. Tried: attention by products for texts of up to 384 tokens in place of 256 (within noise), compiled "
        "blocks (0.93 to 0.97 of a step, with a cold start of half a minute)."
    ),
    "prefill": (
        "A and B of 64 adapters are 150 MB in bf16 (300 in fp32), which a prefill of 16 tokens a row reads for 6 % "
        "more arithmetic: in bf16 the batched products take about 50 ms beside a base of 290. Tried: a loop of "
        "products over views (2.0 to 2.5 ms a site, batched 0.35 to 0.7), padding of ranks, one gather in place of an "
        "index_add."
    ),
    "adapter_names": (
        "Decode holds. At this prefill peft takes 2.4 times the bare base's time, so nothing that runs the base can "
        "be three times as fast."
    ),
    "loading": (
        "A load is one search of the model, 112 parameters and their pages, a SHA-256 of 6 MB (3 ms) and reading them "
        "(2.5 ms); what grows from the first to the last is the set of names that are kept out of the base's own "
        "files. On this virtual machine the price of fresh pages varies by itself."
    ),
}
"""Why a target is not reached, by a part of its text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="run the scripts first")
    parser.add_argument("--only", nargs="*", choices=list(SCRIPTS), default=list(SCRIPTS), help="with --measure: which")
    options = parser.parse_args()
    failed = []
    for name in options.only if options.measure else ():
        print(f"python bench/{name}.py", flush=True)
        file = Path(__file__).with_name(f"{name}.py")
        if file.is_file() and subprocess.run([sys.executable, str(file)], check=False).returncode:
            failed.append(name)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(common.ROOT)} is written")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def page() -> str:
    """The whole page."""
    found = {name: cells_of(name) for name in SCRIPTS}
    lines = [
        "# Benchmarks",
        "",
        "Written by `python bench/report.py` from `bench/results/`; do not edit by hand. `python bench/report.py "
        "--measure` measures all of it anew, on a machine with nothing else to do.",
        "",
        "Times are medians, variants in turn in one process; ratios are medians of the ratios of the rounds. Losses "
        "are asserted to be the same on both sides before any time counts: in fp32 within 1e-4 over 50 steps, in bf16 "
        "at the first one within 2 %; the held-out losses beside TRL within 2 %. "
        "Bases are random Llamas with a tied head; 30M and 60M are their parameters at a "
        "vocabulary of 32,000.",
        "",
        *targets(found),
        *behind(found),
    ]
    for name, title in SCRIPTS.items():
        lines += [f"## {title}", "", *section(name, found[name]), ""]
    return "\n".join(lines).rstrip() + "\n"


def cells_of(name: str) -> dict[str, Row]:
    file = common.RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))["cells"] if file.is_file() else {}


def targets(found: dict[str, dict[str, Row]]) -> list[str]:
    """What was aimed at, and the worst cell of each."""
    lines, reasons = [], []
    for script, text, belongs, value, limit in TARGETS:
        values = {name: value(row) for name, row in found[script].items() if belongs(name, row)}
        known = {name: number for name, number in values.items() if number is not None}
        if not known:
            lines.append([text, "not measured", "", "", "0"])
            continue
        worst = max(known, key=known.__getitem__)
        state = "reached" if known[worst] <= limit else "**not reached**"
        which = worst + (" (provisional)" if provisional(found[script][worst]) else "")
        lines.append([text, f"{known[worst]:.3f}", state, which, str(len(known))])
        if known[worst] > limit:
            reasons += [f"- {text}. {why}" for part, why in LIMITS.items() if part in text]
    table = common.table(["target", "worst cell", "", "which", "of cells"], lines)
    why = ["What limits those that are not reached:", "", *reasons, ""] if reasons else []
    return ["## Targets", "", table, "", *why]


def behind(found: dict[str, dict[str, Row]]) -> list[str]:
    """Where another is faster."""
    lines = [f"- {text}" for text in _behind(found)]
    return ["## Where another is faster", "", *(lines or ["In no cell that is measured."]), ""]


def _behind(found: dict[str, dict[str, Row]]) -> Iterator[str]:
    for name, row in found["train_step"].items():
        for key, other in (("of_peft", "peft"), ("of_full", "full fine-tuning")):
            if (row.get(key) or 0.0) > 1.0:
                yield f"train_step {name}: {row[key]:.3f} of {other}'s time"
    for name, row in found["sft"].items():
        for variant, one in row["variants"].items():
            if one["speedup"] < 1.0:
                yield f"sft {name}: {variant} is {1 / one['speedup']:.2f} times as fast"
    for name, row in found["loss_memory"].items():
        for key in ("memory", "time"):
            if row[key] > 1.0:
                yield f"loss_memory {name}: {row[key]:.3f} of the plain form's {key}"


def section(name: str, cells: dict[str, Row]) -> list[str]:
    """One script's results, a table for each machine."""
    if not cells:
        return [f"Not measured yet: `python bench/{name}.py`."]
    lines = []
    show = importlib.import_module(name).show
    for machine in dict.fromkeys(json.dumps(row["machine"], sort_keys=True) for row in cells.values()):
        own = {key: row for key, row in cells.items() if json.dumps(row["machine"], sort_keys=True) == machine}
        lines += [
            *(f"`{text}`  " for text in dict.fromkeys(row["command"] for row in own.values())),
            about(machine, own),
            "",
        ]
        lines += [show(own), ""]
        if hints := [key for key, row in own.items() if provisional(row)]:
            lines += [f"Provisional (other work ran meanwhile, or less than 5 rounds): {', '.join(hints)}.", ""]
    return lines


def about(machine: str, cells: dict[str, Row]) -> str:
    """The machine, the versions, the days and commits."""
    facts = json.loads(machine)
    versions = ", ".join(f"{package} {facts[package]}" for package in common.PACKAGES if facts.get(package))
    where = ", ".join(
        [facts["cpu"], f"{facts['cores']} cores, threads {facts['threads']}, {facts['memory_gb']} GB"]
        + ([facts["gpu"]] if facts.get("gpu") else [])
    )
    days = ", ".join(dict.fromkeys(row["date"] for row in cells.values()))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in cells.values()))
    repeats = ", ".join(dict.fromkeys(str(row.get("repeats", "?")) for row in cells.values()))
    return f"{where}; {versions}; medians of {repeats}; {days}, commit {commits}"


def provisional(row: Row) -> bool:
    """Whether more ran than the threads of the measurement, or too few rounds were measured."""
    return row["load"] > row["machine"]["threads"] + 0.7 or row.get("repeats", 0) < common.REPEATS


if __name__ == "__main__":
    main()
