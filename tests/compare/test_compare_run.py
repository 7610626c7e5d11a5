"""Whole comparisons of tiny models: what is found, what is skipped, and that killed ones come to the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from compare_here import ANIMALS, Here
from rich.console import Console

from graft.base import load_config, load_tokenizer
from graft.compare.before import checked
from graft.compare.executors import Local
from graft.compare.run import compare
from graft.compare.settings import Compare, Icl, make_compare
from graft.errors import ConfigError, DataError

QUIET = Console(quiet=True)
SOURCE = Path(__file__).parents[2] / "src"
TIMES = ("seconds", "training_its", "evaluation_its", "peak_bytes", "latency", "wall_seconds", "folder")


def by_label(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["label"]: entry for entry in found["entries"]}


def lasting(found: Any) -> Any:
    """Findings without what the machine's load changes."""
    if isinstance(found, dict):
        return {key: lasting(value) for key, value in found.items() if key not in TIMES}
    return [lasting(each) for each in found] if isinstance(found, list) else found


def test_methods_seeds_and_baselines(settings: Callable[..., Compare], here: Here, tmp_path: Path) -> None:
    methods = {
        "lora": {"method": "lora", "rank": 4},
        "bitfit": "bitfit",
        "wild": {"method": "lora", "lrs": [1e38]},
        "ia3": "ia3",
    }
    asked = settings(methods=methods, baselines={"icl": False}, latency=True)
    found = compare(asked, console=QUIET)
    entries = by_label(found)
    assert list(entries) == ["lora", "bitfit", "wild", "ia3", "full", "base"]
    assert entries["bitfit"]["status"] == "skipped" and "bias" in entries["bitfit"]["why"]
    assert entries["wild"]["status"] == "failed" and "the loss is nan" in entries["wild"]["why"]
    run = entries["lora"]["runs"][1]
    assert entries["lora"]["lr"] in (1e-3, 1e-2, 1e-1) and run["seed"] == 1
    adapter = tmp_path / "out" / run["folder"] / "run" / "adapter"
    assert run["adapter_bytes"] == sum(file.stat().st_size for file in adapter.rglob("*") if file.is_file())
    assert run["latency"]["merged"] > 0 and run["latency"]["unmerged"] > 0 and run["peak_bytes"] > 10**7
    assert run["counts"]["trainable"] < entries["full"]["runs"][0]["counts"]["trainable"]
    best = min(entry["runs"][0]["quality"]["loss"] for label, entry in entries.items() if label in ("lora", "full"))
    assert best < entries["base"]["runs"][0]["quality"]["loss"]
    assert found["budget"]["steps"] == 4 and found["data"]["rows"] == {"train": 40, "eval": 12, "test": 12}
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == found


def test_again_runs_nothing_and_a_change_runs_what_it_changes(settings: Callable[..., Compare], here: Here) -> None:
    first = compare(settings(), console=QUIET)
    count = len(here.done)
    assert count == 3 + 2 + 1
    assert lasting(compare(settings(), console=QUIET)) == lasting(first) and len(here.done) == count
    compare(settings(seeds=3), console=QUIET)
    assert [unit["seed"] for unit in here.done[count:]] == [2]
    count = len(here.done)
    found = compare(settings(methods=["lora", "ia3"]), console=QUIET)
    assert {unit["label"] for unit in here.done[count:]} == {"ia3"} and len(found["entries"]) == 3


def test_failed_runs_are_done_again_on_request(settings: Callable[..., Compare], here: Here) -> None:
    asked = settings(methods={"wild": {"method": "lora", "lrs": [1e38]}})
    compare(asked, console=QUIET)
    count = len(here.done)
    compare(asked, console=QUIET)
    assert len(here.done) == count
    compare(asked, console=QUIET, retry=True)
    assert [unit["label"] for unit in here.done[count:]] == ["wild", "wild"]


def test_a_held_out_share_is_the_same_for_every_seed(
    settings: Callable[..., Compare], rows: dict[str, str], here: Here
) -> None:
    asked = settings(data={"train": rows["train"], "eval": 0.2, "template": "plain"}, test=None, search={"lrs": [1e-2]})
    found = compare(asked, console=QUIET)
    assert {unit["run"]["data"]["eval_seed"] for unit in here.done} == {0}
    assert any("too good" in note for note in found["notes"])


def test_killed_twice_comes_to_the_same(settings: Callable[..., Compare], here: Here, tmp_path: Path) -> None:
    """SIGKILL to the command in the middle of runs; its workers end by themselves, and the next start goes on."""
    whole = compare(settings(output=str(tmp_path / "whole")), console=QUIET)
    file = tmp_path / "killed.yaml"
    asked = settings(output=str(tmp_path / "killed")).model_dump(mode="json")
    file.write_text(yaml.safe_dump(asked), encoding="utf-8")
    for kills in (1, 3):
        process = _started(file)
        _wait_for(tmp_path / "killed", kills, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = _started(file)
    assert process.wait(300) == 0
    killed = json.loads((tmp_path / "killed" / "compare.json").read_text())
    assert lasting(killed["entries"]) == lasting(whole["entries"])
    assert len(list((tmp_path / "killed").glob("runs/*/*/row.json"))) == 6


def _started(file: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "graft", "compare", str(file)], env=env, stdout=subprocess.DEVNULL)


def _wait_for(folder: Path, rows: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 200
    while len(list(folder.glob("runs/*/*/row.json"))) < rows:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"methods": {"base": "lora"}}, "cannot be a label"),
        ({"methods": {"x": {"method": "lora", "rnk": 3}}}, "methods.x"),
        ({"methods": {"x": {"method": "lora", "lrs": [0]}}}, "methods.x"),
        ({"methods": {"x": {"method": "lora", "lrs": [1e-3, 0.001]}}}, "different rates"),
        ({"methods": {"x": {"method": "lora", "lrs": [1e-3], "train": {"lr": 1}}}}, "give one of them"),
        ({"methods": {"full": "lora"}, "baselines": {}}, "full fine-tuning's label"),
        ({"methods": {"x": {"method": "lora", "lrs": [1, 2]}}, "search": {"kind": "none"}}, "one rate"),
        ({"metrics": ["accuracy"]}, "label"),
        ({"search": {"metric": "accuracy"}}, "search.metric"),
        ({"train": {"max_steps": 3, "warmup": 5}}, "train.warmup"),
        ({"methods": ["lora", "lora"]}, "twice"),
        ({"methods": [], "baselines": {"full": False}}, "name at least one"),
        ({"seeds": [1, 1]}, "different seeds"),
        ({"metrics": ["blue"]}, "bleu"),
        ({"serch": {}}, "search"),
        ({"search": {"lrs": []}}, "search.lrs"),
        ({"methods": {"x": {"method": "lora", "train": {"lr": "fast"}}}}, "methods.x"),
    ],
)
def test_bad_settings(settings: Callable[..., Compare], parts: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        compare(settings(**parts), console=QUIET)


def test_test_rows_that_were_trained(settings: Callable[..., Compare], rows: dict[str, str]) -> None:
    with pytest.raises(DataError, match="which is trained"):
        compare(settings(test=rows["train"]), console=QUIET)


def test_an_entry_s_own_rate_and_budget(settings: Callable[..., Compare], here: Here) -> None:
    methods = {"long": {"method": "lora", "train": {"lr": "5e-3", "max_steps": 6}}, "short": "lora"}  # YAML: a text
    found = by_label(compare(settings(methods=methods, seeds=1, search={"kind": "none"}), console=QUIET))
    assert [(unit["label"], unit["lr"], unit["steps"]) for unit in here.done[:2]] == [
        ("long", 5e-3, 6),
        ("short", 2e-4, 4),
    ]
    assert found["long"]["lr"] == 5e-3


def test_what_an_entry_has_of_its_own_is_said(settings: Callable[..., Compare], here: Here) -> None:
    own = {"method": "lora", "train": {"max_steps": 6, "weight_decay": "1e-2"}, "peft_compat": True}
    methods = {"long": own, "short": "lora", "slow": {"method": "lora", "lrs": [1e-5]}}
    asked = settings(methods=methods, seeds=1, search={"lrs": [1e-2]}, baselines={"full": False, "icl": False})
    found = compare(asked, console=QUIET)
    entries = by_label(found)
    assert entries["long"]["settings"]["train"] == {"max_steps": 6, "weight_decay": 0.01}
    assert entries["long"]["settings"]["peft_compat"] is True
    assert not {"train", "peft_compat"} & set(entries["short"]["settings"])
    assert found["budget"]["except"] == ["long: max_steps, weight_decay"] and found["search"]["except"] == ["slow"]
    assert found["search"]["metric"] == "loss"


def test_another_base_at_the_same_place_runs_anew(
    settings: Callable[..., Compare], here: Here, base: str, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    asked = settings(base=str(tmp_path / "base"), seeds=1, search={"lrs": [1e-2]})
    compare(asked, console=QUIET)
    count = len(here.done)
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    compare(asked, console=QUIET)
    assert len(here.done) == 2 * count


def test_a_classification_head(settings: Callable[..., Compare], here: Here, tmp_path: Path) -> None:
    """Soft prompts are timed too; the untouched base has a random head for each seed; demonstrations need words."""
    texts = [{"text": f"the {a} likes the {b}", "label": ["good", "bad"][len(a) % 2]} for a in ANIMALS for b in ANIMALS]
    file, test = tmp_path / "labels.jsonl", tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in texts[:50]))
    test.write_text("".join(json.dumps(row) + "\n" for row in texts[50:]))
    data = {"train": str(file), "eval": 0.2, "template": {"mode": "classification"}}
    asked = settings(
        methods=["prompt_tuning"], data=data, test=str(test), latency=True, metrics=None, search={"lrs": [1e-2]},
        baselines={"full": False},
    )  # fmt: skip
    entries = by_label(compare(asked, console=QUIET))
    run = entries["prompt_tuning"]["runs"][0]
    assert entries["prompt_tuning"]["status"] == "ok" and run["latency"]["unmerged"] > 0 and run["note"] is None
    assert entries["icl"]["status"] == "skipped" and "baselines.icl.template" in entries["icl"]["why"]
    assert len(entries["base"]["runs"]) == 2 and run["batch_size"] == 4
    words = {"templates": ["{text} is"], "verbalizer": {"good": "good", "bad": "bad"}, "kind": "plain"}
    asked = asked.model_copy(
        update={"baselines": asked.baselines.model_copy(update={"icl": Icl(shots=2, template=words)})}
    )
    entries = by_label(compare(asked, console=QUIET))
    assert entries["icl"]["status"] == "ok" and entries["icl"]["runs"][0]["latency"]["unmerged"] > 0
    assert entries["icl"]["runs"][0]["evaluation_its"] > 0
    assert len(entries["base"]["runs"]) == 1


def test_a_start_that_only_measures_keeps_the_peak(settings: Callable[..., Compare], here: Here) -> None:
    asked = settings(seeds=1, search={"lrs": [1e-2]}, baselines={"base": False, "full": False, "icl": False})
    compare(asked, console=QUIET)
    row = Path(here.done[-1]["folder"]) / "row.json"
    peak = json.loads(row.read_text())["peak_bytes"]
    row.unlink()
    compare(asked, console=QUIET)
    assert json.loads(row.read_text())["peak_bytes"] == peak


@pytest.mark.parametrize("text", ["{half", "[]", "{}", '{"status": "ok"}'])
def test_a_row_that_is_none_is_refused_by_its_file(settings: Callable[..., Compare], here: Here, text: str) -> None:
    asked = settings(methods=["ia3"], seeds=1, search={"lrs": [1e-2]}, baselines={"full": False, "icl": False})
    compare(asked, console=QUIET)
    row = Path(here.done[0]["folder"]) / "row.json"
    row.write_text(text)
    with pytest.raises(ConfigError, match=r"cannot be read.*remove it, and its run is done again") as caught:
        compare(asked, console=QUIET)
    assert str(caught.value).startswith(str(row)) and "\n" not in str(caught.value)


def test_bad_data_is_said_once_and_nothing_is_written(settings: Callable[..., Compare], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing"):
        compare(settings(data={"train": str(tmp_path / "nothing.jsonl"), "eval": 0.1}), console=QUIET)
    assert not (tmp_path / "out").exists()


def written(folder: Path, pairs: list[tuple[str, str]]) -> str:
    """A file of prompts and completions."""
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "rows.jsonl")


def test_answers_without_latin_letters_have_no_rouge(
    settings: Callable[..., Compare], here: Here, tmp_path: Path
) -> None:
    test = written(tmp_path / "test", [("What is it?", "кот"), ("And this?", "собака")])
    asked = settings(
        methods=["ia3"], metrics=None, test=test, seeds=1, max_new_tokens=2, search={"kind": "none"},
        baselines={"full": False, "icl": False},
    )  # fmt: skip
    found = compare(asked, console=QUIET)
    assert found["metrics"] == ["bleu", "loss", "perplexity", "exact_match"]
    assert {entry["status"] for entry in found["entries"]} == {"ok"}
    with pytest.raises(DataError, match="rouge-score reads only Latin"):
        compare(asked.model_copy(update={"metrics": ("loss", "rouge_l")}), console=QUIET)


def test_prompts_without_room_for_an_answer_are_refused_though_rows_may_be_cut(
    settings: Callable[..., Compare], rows: dict[str, str], here: Here, tmp_path: Path
) -> None:
    """Losses are measured on cut rows; nothing can be written behind a prompt that fills the context."""
    data = {"train": rows["train"], "eval": rows["eval"], "template": "plain", "truncate": True}
    asked = settings(methods=["ia3"], seeds=1, search={"kind": "none"}, baselines={"full": False}, data=data)
    context = load_config(asked.base).max_position_embeddings

    def having(tokens: int, metric: str) -> Compare:
        prompt = "cat" + " cat" * (tokens - 1 - extra)
        test = written(tmp_path / "test", [(prompt, "dog"), ("A cat", "bird")])
        return asked.model_copy(update={"test": test, "metrics": (metric,)})

    extra = 0
    _, found, (row, _) = checked(having(20, "loss"))
    extra = len(found.template.prompt_ids(row, load_tokenizer(asked.base))) - 20
    checked(having(context - 1, "bleu"))
    with pytest.raises(DataError, match=f"{context + 1} tokens, the context has {context}"):
        compare(having(context, "bleu"), console=QUIET)
    assert not here.done
    cut = compare(having(context + 9, "loss"), console=QUIET)
    assert by_label(cut)["ia3"]["status"] == "ok"


def test_a_worker_imports_nothing_of_the_folder_it_starts_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit(3)")
    (tmp_path / "row.json").write_text('{"kind": "final", "status": "ok", "why": null}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    local = Local(1, None)
    local.start({"folder": str(tmp_path)})
    _, row = local.next()
    local.close()
    assert row["status"] == "ok"


def test_evaluation_rows_are_needed(base: str, rows: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval"):
        make_compare({"base": base, "methods": ["lora"], "data": {"train": rows["train"]}, "output": "out"})


def test_a_folder_of_something_else(settings: Callable[..., Compare], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        compare(settings(), console=QUIET)


@pytest.mark.parametrize("how", ["stop", "regularise"])
def test_a_trial_over_the_forgetting_bound_is_scored_as_what_it_keeps(
    settings: Callable[..., Compare], rows: dict[str, str], here: Here, tmp_path: Path, how: str
) -> None:
    """Of the low rate the last adapter, of the middle one the first, of the high one the base, as in the whole run."""
    text = tmp_path / "general.txt"
    text.write_text("Once there was an old river that nobody knew. " * 20, encoding="utf-8")
    bound = {"max_forgetting": 2e-3, "on_forgetting": how}
    asked = settings(
        data={"train": rows["train"], "eval": rows["eval"], "template": "plain", "general": str(text)},
        train={"max_steps": 6, "batch_size": 4, "warmup": 0, "eval_every": 1} | bound,
        search={"lrs": [1e-3, 3e-2, 1.0], "least_steps": 3},
        seeds=1,
        baselines={"base": False, "full": False, "icl": False},
    )
    found = by_label(compare(asked, console=QUIET))["lora"]
    assert [each["status"] for each in found["tried"]] == ["ok", "ok", "ok"] and found["lr"] == 3e-2
    low, middle, high, whole = (json.loads((Path(unit["folder"]) / "row.json").read_text()) for unit in here.done)
    kept = [row["training"]["kept_step"] for row in (low, middle, high, whole)]
    assert kept == [3, 1, 0, 1] and max(low["score"], high["score"]) < middle["score"]
    assert low["training"]["forgetting_kl"] <= 2e-3 and high["training"]["forgetting_kl"] == 0
    assert "the adapter has not trained" in high["note"] and "note" not in middle
    assert high["score"] == -low["training"]["eval_loss_before"]
    assert all(("stopped_step" in row["training"]) == (how == "stop") for row in (middle, high, whole))
