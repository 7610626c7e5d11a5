"""docs/field.md from the results of `compare.py`, `plan_accuracy.py`, `icl_matrix.py` and `forgetting.py`.

    python bench/report_field.py

It measures nothing: each part names the command that does.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
import forgetting
import plan_accuracy

PAGE = common.ROOT / "docs" / "field.md"
HEAD = """# The field, measured

Written by `python bench/report_field.py` from `bench/results/`; do not edit by hand. What `graft plan` and
`graft compare` say of the embedded base (5.5 million parameters, so the order of the methods is its own and no law),
and how far they can be trusted.
"""
NEAR = 0.1
"""A plan is right if it is off by at most this share."""


def main() -> None:
    parts = [HEAD, *e2e(), *sst2(), *killed(), *halving(), *plans(), *matrix(), *forgot()]
    PAGE.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    print(f"{PAGE} written")


def e2e() -> list[str]:
    """Methods on E2E."""
    return ["## Text from facts: E2E NLG", "", *_compared("compare_e2e")]


def sst2() -> list[str]:
    """Methods on SST-2."""
    return ["## Labels: SST-2", "", *_compared("compare_sst2")]


def _compared(name: str) -> list[str]:
    found = _read(name)
    if found is None:
        return _unmeasured(f"bench/compare.py {name.removeprefix('compare_')}")
    told = (common.RESULTS / f"{name}.md").read_text(encoding="utf-8").split("\n", 1)[1].strip()
    rows = found["summary"]["rows"]
    runs = sum(row["seeds"] for row in rows if row["status"] == "ok")
    about = f"{len(rows)} entries, {runs} runs that count, {found['seconds']:,.0f} s with the search of the rates"
    note = found.get("note", "")
    return [_by(found), "", f"{about}; settings: `bench/{name}.yaml`. {note}".rstrip(), "", told, ""]


def killed() -> list[str]:
    """A comparison that is killed, against one that is not."""
    title, found = ["## Killed on the way", ""], _read("compare_killed")
    if found is None:
        return [*title, *_unmeasured("bench/compare.py killed")]
    after = " and ".join(str(kill) for kill in found["kills"])
    same = "**equal**" if found["equal"] else "**not equal**"
    return [
        *title,
        _by(found),
        "",
        f"SST-2 again, killed (SIGKILL) after {after} finished runs and started again: all figures of the "
        f"{found['entries']} entries but times, memory and bytes on disk are {same} to those of the undisturbed one. "
        f"{found['seconds']:,.0f} s in all. {found.get('note', '')}".rstrip(),
        "",
    ]


def halving() -> list[str]:
    """Successive halving of the rates, against all of them."""
    title, found = ["## Successive halving against the whole grid", ""], _read("compare_halving")
    if found is None:
        return [*title, *_unmeasured("bench/compare.py halving")]
    kinds = ("halving", "exhaustive")
    lines = [
        [label, *(f"{found[kind]['rates'][label]:g}" for kind in kinds), *(_mean(found[kind], label) for kind in kinds)]
        for label in found["halving"]["rates"]
    ]
    seconds, best = ([found[kind][key] for kind in kinds] for key in ("seconds", "best"))
    return [
        *title,
        _by(found),
        "",
        f"{seconds[0]:,.0f} s against {seconds[1]:,.0f} s, **{found['share of the wall time']:.2f}** of the time; "
        f"the winner is {best[0]} with the one and {best[1]} with the other. {found.get('note', '')}".rstrip(),
        "",
        common.table(["method", "rate, halving", "rate, whole grid", "BLEU, halving", "BLEU, whole grid"], lines),
        "",
    ]


def _mean(found: dict[str, Any], label: str) -> str:
    return f"{statistics.mean(found['bleu'][label]):.1f}"


def plans() -> list[str]:
    """Predicted against measured peak memory."""
    title, found = ["## Planned and measured peak memory", ""], _read("plan_accuracy")
    if found is None:
        return [*title, *_unmeasured("bench/plan_accuracy.py")]
    cells = found["cells"]
    near = sum(abs(row["off"]) <= NEAR for row in cells.values())
    most = max(abs(row["off"]) for row in cells.values())
    commands = "  \n".join(dict.fromkeys(f"`{row['command']}`" for row in cells.values()))
    return [
        *title,
        commands,
        "",
        f"{near} of {len(cells)} within {NEAR:.0%}; the largest difference is {most:.2%}. CPU, all live tensors; "
        "**on a GPU: not measured**.",
        "",
        plan_accuracy.show(cells),
        "",
    ]


def matrix() -> list[str]:
    """Few-shot fine-tuning against in-context learning."""
    title, file = ["## Fine-tuning against in-context learning", ""], common.RESULTS / "icl_matrix" / "matrix.json"
    if not file.is_file():
        return [*title, *_unmeasured("bench/icl_matrix.py")]
    found = json.loads(file.read_text(encoding="utf-8"))
    asked = found["settings"]
    lines = [
        [
            entry["test"],
            entry["pattern"],
            entry["label"],
            f"{entry['mean']:.3f}",
            f"{entry['low']:.3f} to {entry['high']:.3f}",
        ]
        for entry in found["accuracies"]
    ]
    tests = ", ".join(
        f"{name} ({'out of' if each['out_of_domain'] else 'in'} domain)" for name, each in asked["tests"].items()
    )
    return [
        *title,
        f"`python bench/icl_matrix.py`: {tests}; {asked['shots']} shots, {asked['seeds']} seeds, "
        f"{found['seconds']:,.0f} s for all. After Mosbach et al. (2023).",
        "",
        *(f"- {note}" for note in found["notes"]),
        "",
        "![Differences of the mean accuracies](../bench/results/icl_matrix/matrix.png)",
        "",
        common.table(["test", "pattern", "approach", "accuracy", "95 %"], lines),
        "",
    ]


def forgot() -> list[str]:
    """What full fine-tuning and LoRA forget at equal task loss."""
    title, found = ["## Forgetting at equal task loss", ""], _read("forgetting")
    if found is None:
        return [*title, *_unmeasured("bench/forgetting.py")]
    table, *pairs = forgetting.show(found["cells"]).rsplit("|\n", 1)
    return [
        *title,
        "`python bench/forgetting.py`: E2E until the evaluation loss first reaches "
        f"{forgetting.TARGET} (the base has 4.0), two rates of each method, {len(forgetting.SEEDS)} seeds.",
        "",
        table + "|",
        "",
        *(f"- {line}" for text in pairs for line in text.strip().splitlines()),
        "",
    ]


def _read(name: str) -> dict[str, Any] | None:
    file = common.RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _unmeasured(command: str) -> list[str]:
    return [f"Not measured yet: `python {command}`.", ""]


def _by(found: dict[str, Any]) -> str:
    facts = found["machine"]
    cores = f"{facts['cores']} cores, threads {facts['threads']}"
    return f"`{found['command']}`: {facts['cpu']}, {cores}; torch {facts['torch']}."


if __name__ == "__main__":
    main()
