"""A comparison is read, its table holds the right numbers, and what is missing is a dash."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from made_comparison import comparison, entry, run, write
from rich.console import Console

from graft.compare.field import Compared, read
from graft.compare.table import COSTS, Summary, csv_text, markdown, record, summarize, summary_json, terminal
from graft.errors import ConfigError, DataError


def summary_of(found: dict[str, Any], folder: Path, **options: Any) -> Summary:
    return summarize(read(write(folder, found) / "compare.json"), **options)


def record_of(found: Summary, label: str) -> dict[str, Any]:
    return next(record(row) for row in found.rows if row.entry.label == label)


def test_numbers_by_hand(tmp_path: Path) -> None:
    runs = [run(seed, score, 1000, 4000) for seed, score in enumerate((10.0, 12.0, 14.0))]
    runs[1] |= {"peak_bytes": 5e8, "latency": {"base": 0.004, "unmerged": 0.006, "merged": None}}
    runs[1] |= {"counts": {"total": 4000, "trainable": 1000}, "forgetting": {"loss": 3.5, "base_loss": 3.0, "kl": 0.2}}
    for other in (runs[0], runs[2]):
        other |= {"counts": {"total": 4000, "trainable": 1000}, "latency": None, "forgetting": None}
    found = record_of(summary_of(comparison() | {"entries": [entry("a", runs)]}, tmp_path), "a")
    assert found["quality"] == 12 and found["quality_high"] == pytest.approx(12 + 4.302653 * 2 / 3**0.5)
    assert (found["seeds"], found["share"], found["peak_bytes"]) == (3, 0.25, 5e8)
    assert found["latency_unmerged"] == pytest.approx(0.5) and found["latency_merged"] is None
    assert (found["forgetting"], found["kl"]) == (0.5, 0.2)


def test_rows_stand_best_first_and_those_without_quality_last(tmp_path: Path) -> None:
    found = summary_of(comparison(), tmp_path)
    qualities = [row.quality.mean for row in found.rows if row.quality]
    assert qualities == sorted(qualities, reverse=True) and len(qualities) == 11
    assert {row.entry.label for row in found.rows[-2:]} == {"vera", "adalora"}
    other = summary_of(comparison() | {"higher_is_better": False}, tmp_path / "low")
    assert other.verdict.best == "base" and other.rows[0].entry.label == "base"


def test_skipped_and_failed_say_why(tmp_path: Path) -> None:
    found = summary_of(comparison(), tmp_path)
    assert record_of(found, "vera")["note"] == "skipped: vera needs sites of one shape; this base has two"
    assert record_of(found, "adalora")["note"] == "failed: the loss is not finite at step 31"
    assert record_of(found, "lora")["note"] == ""


def test_a_partial_entry_counts_its_finished_runs(tmp_path: Path) -> None:
    runs = [
        run(0, 5.0, 10, 10),
        run(1, 7.0, 10, 10),
        run(2, 0, 10, 10, status="failed", why="out of memory", quality={}),
    ]
    found = record_of(summary_of(comparison() | {"entries": [entry("a", runs, status="partial")]}, tmp_path), "a")
    assert (found["quality"], found["seeds"], found["note"]) == (6.0, 2, "2 of 3 runs: out of memory")


def test_a_partial_entry_is_named_as_left_out(tmp_path: Path) -> None:
    """It may stand first in the table: the verdict that names another best says that it was not judged."""
    failed = run(2, 0, 10, 10, status="failed", why="out of memory", quality={})
    made = comparison()
    made["entries"][1] |= {"runs": [run(0, 98.0, 10, 10), run(1, 99.0, 10, 10), failed], "status": "partial"}
    found = summary_of(made, tmp_path)
    assert found.rows[0].entry.label == "lora" and found.verdict.best != "lora"
    assert found.verdict.lines[1] == "Left out, some of its runs failed: lora (2 of 3)."
    alone = summary_of(made | {"entries": made["entries"][1:2]}, tmp_path / "alone")
    assert alone.verdict.lines == [
        "Nothing to compare: no entry came to its end with every seed.",
        "Left out, some of its runs failed: lora (2 of 3).",
    ]
    made["entries"] = [*made["entries"][1:3], entry("a", [run(0, 1.0, 10, 10), failed], status="partial")]
    assert summary_of(made, tmp_path / "one").verdict.lines[1:] == [
        "Left out, some of their runs failed: lora (2 of 3) and a (1 of 2).",
        "It is the only one that is left, so there is nothing to test it against.",
    ]


def test_nan_becomes_null_with_its_key(tmp_path: Path) -> None:
    made = comparison()
    made["entries"][1]["runs"][2]["quality"]["bleu"] = float("nan")
    made["entries"][1]["runs"][0]["training_its"] = float("inf")
    found = summary_of(made, tmp_path)
    text = summary_json(found)
    parsed = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert parsed["notes"] == ["entries.1.runs.0.training_its was inf", "entries.1.runs.2.quality.bleu was nan"]
    line = record_of(found, "lora")
    assert line["seeds"] == 2 and line["status"] == "partial" and "bleu is not a finite number" in line["note"]


def test_one_seed_and_no_variance(tmp_path: Path) -> None:
    found = summary_of(comparison(seeds=1), tmp_path)
    assert record_of(found, "lora")["quality_low"] is None and "(one seed)" in markdown(found)
    same = [entry(name, [run(seed, 5.0, 10 + k, 10) for seed in range(3)]) for k, name in enumerate("ab")]
    found = summary_of(comparison() | {"entries": same}, tmp_path / "same")
    assert record_of(found, "a")["quality_low"] == 5.0 and found.verdict.cheapest == "a"
    assert found.verdict.pairs[0].test is not None and found.verdict.pairs[0].test.p == 1.0


def test_all_failed(tmp_path: Path) -> None:
    made = comparison() | {
        "entries": [entry("a", [], status="failed", why="no memory"), entry("b", [], status="skipped")]
    }
    found = summary_of(made, tmp_path)
    assert found.verdict.best is None and "no run has a value" in found.verdict.lines[0]
    assert "failed: no memory" in csv_text(found) and "no reason is known" in markdown(found)


def test_cost_decides_the_cheapest(tmp_path: Path) -> None:
    made = comparison() | {"entries": [entry(n, [run(s, 5.0, 10, 10) for s in range(3)]) for n in ("a", "b")]}
    for one in made["entries"][0]["runs"]:
        one |= {"seconds": 90.0, "peak_bytes": 1}
    assert summary_of(made, tmp_path, cost="seconds").verdict.cheapest == "b"
    assert summary_of(made, tmp_path, cost="peak_bytes").verdict.cheapest == "a"
    with pytest.raises(ConfigError, match="unknown cost 'price'; take one of trainable"):
        summary_of(made, tmp_path, cost="price")
    assert set(COSTS) <= set(record_of(summary_of(made, tmp_path), "a"))


def test_csv_reads_back(tmp_path: Path) -> None:
    made = comparison()
    made["entries"][0]["label"] = '=1+1,"x"\ny'
    found = summary_of(made, tmp_path)
    lines = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert len(lines) == 13 and {line["label"] for line in lines} >= {"lora", '\'=1+1,"x"\ny'}
    lora = next(line for line in lines if line["label"] == "lora")
    assert float(lora["quality"]) == record_of(found, "lora")["quality"]
    assert next(line for line in lines if line["label"] == "base")["total"] == ""


def test_terminal_and_markdown_show_labels_as_they_are(tmp_path: Path) -> None:
    made = comparison()
    made["entries"][0]["label"] = "[red]a|b[/red]*"
    found = summary_of(made, tmp_path)
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(terminal(found))
    shown = console.export_text()
    assert "[red]a|b[/red]*" in shown and "55.19 ± 0.79" in shown and "skipped: vera needs sites" in shown
    table = [line for line in markdown(found).splitlines() if line.startswith("|")]
    assert len(table) == 15 and {line.replace("\\|", "").count("|") for line in table} == {table[0].count("|")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, this program reads 1"),
        ({"metric": None}, "metric: Field required"),
        ({"entries": []}, "entries: List should have at least 1 item"),
        ({"entries": [{"label": "a", "status": "odd"}]}, "entries.0.status"),
        ({"entries": [{"label": "a"}, {"label": "a"}]}, "the label 'a' stands twice"),
    ],
)
def test_a_broken_file_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path, comparison() | change) / "compare.json")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_missing_or_cut_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "compare.json")
    (tmp_path / "compare.json").write_text('{"version": 1, "ent')
    with pytest.raises(DataError, match="no JSON"):
        read(tmp_path / "compare.json")


def test_other_keys_are_allowed(tmp_path: Path) -> None:
    made = comparison() | {"later": 1}
    made["entries"][0]["runs"][0]["later"] = {"a": None}
    assert isinstance(read(write(tmp_path, made) / "compare.json"), Compared)
