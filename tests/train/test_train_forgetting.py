"""`data.general` and `train.max_forgetting`: what is logged, what is kept at the bound, and what regularising holds."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_train_resume import adapter
from test_train_run import lines
from torch import Tensor
from trainers import arguments, started
from transformers import TrainerCallback

import graft
from graft.base import load_tokenizer
from graft.errors import ConfigError, DataError, GraftError, TrainingError
from graft.evaluate.forgetting import Forgetting, forgetting
from graft.evaluate.opening import open_base
from graft.fast import cross_entropy
from graft.methods.lora import LoRA
from graft.train import forgetting as guarding
from graft.train import state as states
from graft.train.config import Run
from graft.train.forgetting import KEPT, Guard
from graft.train.run import Result, train
from graft.train.saving import SavingTrainer
from graft.train.trainer import GraftTrainer
from tiny import batch

Settings = Callable[..., Run]
LORA = {"method": "lora", "dropout": 0.1, "targets": "all-linear"}


def quiet(run: Run, **more: Any) -> Result:
    return train(run, console=Console(quiet=True), **more)


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("general") / "general.txt"
    words = ["Once", "upon", "a", "time", "there", "was", "old", "river", "and", "nobody", "knew", "why"]
    drawn = torch.randint(len(words), (300,), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text(" ".join(words[i] for i in drawn), encoding="utf-8")
    return str(file)


def test_each_evaluation_measures_and_the_files_say_so(settings: Settings, general: str) -> None:
    run = settings(method=LORA, data={"general": general})
    result = quiet(run)
    measured = [line for line in lines(result.folder) if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 3, 6]
    assert measured[0]["forgetting_kl"] == 0 and 0 < measured[1]["forgetting_kl"] < measured[2]["forgetting_kl"]
    stored = json.loads((result.folder / "result.json").read_text())
    for key in ("forgetting_kl", "general_loss"):
        assert stored["metrics"][key] == measured[-1][key]
    assert stored["metrics"]["general_loss_before"] == measured[0]["general_loss"]
    assert "general" in stored["data"]["sha256"]
    opened = open_base(run.base, {"a": str(result.adapter)}, precision="fp32")
    (found,) = forgetting(opened.model, opened.tokenizer, general, ["a"])
    assert found.kl == pytest.approx(measured[-1]["forgetting_kl"], rel=1e-4)
    assert found.base_loss == pytest.approx(measured[0]["general_loss"], rel=1e-5)


def test_measuring_changes_no_run(settings: Settings, general: str, tmp_path: Path) -> None:
    results = []
    for name, source in (("with", general), ("without", None)):
        results.append(quiet(settings(method=LORA, data={"general": source}, output=str(tmp_path / name))))
    assert adapter(results[0].folder) == adapter(results[1].folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stop_keeps_the_adapter_of_the_last_evaluation_within(
    settings: Settings, general: str, tmp_path: Path, method: str
) -> None:
    chosen = {**LORA, "method": method} if method == "lora" else {"method": method}
    pace = {"max_steps": 12, "eval_every": 2, "save_every": 2, "keep": 9, "schedule": "constant", "warmup": 0}
    free = quiet(settings(method=chosen, data={"general": general}, train=pace, output=str(tmp_path / "free")))
    kls = {line["step"]: line["forgetting_kl"] for line in lines(free.folder) if "eval_loss" in line}
    last = 4
    assert kls[2] < kls[last] < kls[6], "the bound stands between two evaluations"
    bound = {**pace, "max_forgetting": (kls[last] + kls[6]) / 2}
    said = Console(record=True, file=io.StringIO(), width=300)
    run = settings(method=chosen, data={"general": general}, train=bound, output=str(tmp_path / "held"))
    held = train(run, console=said)
    assert held.metrics["kept_step"] == last and held.metrics["stopped_step"] == 6 == held.metrics["steps"]
    assert held.metrics["forgetting_kl"] == kls[last]
    assert [line["step"] for line in lines(held.folder) if "eval_loss" in line] == [0, 2, 4, 6]
    assert f"the run stopped, and the adapter of step {last} (" in said.export_text()
    found, expected = tensors(held.adapter), tensors(free.folder / "checkpoints" / f"checkpoint-{last}")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    there = {file.name for file in (held.folder / "checkpoints").iterdir()}
    assert there == {"checkpoint-2", "checkpoint-4", f"{KEPT}2.safetensors", f"{KEPT}4.safetensors"}
    best = {**bound, "keep_best": "loss"}
    run = settings(method=chosen, data={"general": general}, train=best, output=str(tmp_path / "best"))
    assert quiet(run).metrics["kept_step"] <= last


def test_what_is_regularised_forgets_less_and_learns(settings: Settings, general: str, tmp_path: Path) -> None:
    pace = {"max_steps": 16, "eval_every": 1, "schedule": "constant", "warmup": 0, "lr": 5e-3}
    free = quiet(settings(method=LORA, data={"general": general}, train=pace, output=str(tmp_path / "free")))
    bound = free.metrics["forgetting_kl"] / 4
    more = {**pace, "max_forgetting": bound, "on_forgetting": "regularise"}
    held = quiet(settings(method=LORA, data={"general": general}, train=more, output=str(tmp_path / "held")))
    measured = [line for line in lines(held.folder) if "eval_loss" in line]
    assert measured[0]["forgetting_weight"] == 0 and max(line["forgetting_weight"] for line in measured) >= 1
    assert measured[-1]["forgetting_kl"] < free.metrics["forgetting_kl"] / 2
    assert held.metrics["forgetting_kl"] <= bound and held.metrics["steps"] == 16
    assert held.metrics["eval_loss"] < held.metrics["eval_loss_before"]


def test_regularising_adds_the_kl_of_the_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loss and gradients against all logits of the batch, with accumulation, adapter rows and chunks of 5 tokens."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 10)
    for kind in ("llama", "t5"):
        model = started(kind, LoRA(rank=4, dropout=0.0)).double()
        with torch.no_grad():
            for parameter in model.adapters.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        model.train = lambda mode=True, model=model: model
        model.training = True
        trainer = GraftTrainer(model, arguments(tmp_path))
        trainer.guard = _Weighted(3.0)
        inputs = batch(kind, rows=3)
        count = int((inputs["labels"][:, 1:] != -100).sum() if kind == "llama" else (inputs["labels"] != -100).sum())
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(2 * count))
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.adapters.named_parameters() if p.grad is not None}
        model.zero_grad()
        expected = _dense(model, inputs, 3.0, kind) / (2 * count)
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        for name, parameter in model.adapters.named_parameters():
            assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-7), name


class _Weighted:
    """A guard that is past its bound."""

    def __init__(self, weight: float) -> None:
        from graft.train.forgetting import Guard

        self.weight = weight
        self.towards_base = Guard.towards_base.__get__(self)


def _dense(model: Any, inputs: dict[str, Tensor], weight: float, kind: str) -> Tensor:
    plain = {key: value for key, value in inputs.items() if key != "labels" or kind == "t5"}
    with graft.route(model, [None] * 3), torch.no_grad():
        p = model(**plain).logits.log_softmax(-1)
    q = model(**plain).logits.log_softmax(-1)
    target = inputs["labels"]
    if kind == "llama":
        p, q, target = p[:, :-1], q[:, :-1], target[:, 1:]
    kept = target != -100
    loss = -q[kept].gather(-1, target[kept][:, None]).sum()
    return loss + weight * (p[kept].exp() * (p[kept] - q[kept])).sum()


@pytest.fixture
def guard(settings: Settings, general: str, tmp_path: Path) -> tuple[Guard, Any]:
    """A guard that has measured nothing yet, and its model."""
    run = settings(data={"general": general}, train={"max_forgetting": 0.1, "on_forgetting": "regularise"})
    model = started("llama")
    return Guard(run, model, load_tokenizer("embedded"), tmp_path / "kept", ["default"]), model


def shifted(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors after a change."""
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(1.0)
    return {key: value.clone() for key, value in states.tensors(model).items()}


def test_a_checkpoint_has_its_own_kept_adapter(guard: tuple[Guard, Any], tmp_path: Path) -> None:
    """Training that goes on from it may come to other evaluations than before."""
    guarded, model = guard
    at = {}
    for step, saved in ((0, False), (2, True), (4, True), (6, False)):
        at[step] = shifted(model)
        guarded._keep(model, step)
        if saved:
            checkpoint = tmp_path / "kept" / f"{states.PREFIX}{step}"
            checkpoint.mkdir()
            guarded.write(checkpoint)
            guarded.prune()
    assert {file.name for file in (tmp_path / "kept").glob("*.safetensors")} == {
        f"{KEPT}{n}.safetensors" for n in (2, 4, 6)
    }
    for step in (2, 4):
        guarded.read(tmp_path / "kept" / f"{states.PREFIX}{step}")
        shifted(model)
        guarded.restore(model)
        assert all(torch.equal(value, at[step][key]) for key, value in states.tensors(model).items())
    (tmp_path / "kept" / "checkpoint-4" / "forgetting.json").write_text("{")
    states.remove(tmp_path / "kept" / "checkpoint-2")
    guarded.prune()
    there = {file.name for file in (tmp_path / "kept").glob("*.safetensors")}
    assert there == {f"{KEPT}4.safetensors"}, "what this run goes back to stays"


def test_the_first_process_writes_what_is_kept(
    guard: tuple[Guard, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The others wait for it before they read."""
    guarded, model = guard
    right = shifted(model)
    monkeypatch.setenv("RANK", "1")
    guarded._keep(model, 2)
    assert guarded.kept_step == 2 and not (tmp_path / "kept").exists()

    def first() -> None:
        monkeypatch.setenv("RANK", "0")
        states.put(model, right, "here")
        guarded._keep(model, 2)
        shifted(model)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", first)
    guarded.restore(model)
    assert all(torch.equal(value, right[key]) for key, value in states.tensors(model).items())


def test_the_weight_has_an_end(guard: tuple[Guard, Any], caplog: pytest.LogCaptureFixture) -> None:
    guarded, _ = guard
    guarded.over, guarded.kl = True, 3.0
    weights = []
    for _ in range(20):
        guarded.weight = guarded._next_weight(0.1)
        weights.append(guarded.weight)
    assert weights == [2.0 ** min(n, 10) for n in range(20)]
    assert [record.getMessage().count("3 nats a token, over 0.1") for record in caplog.records] == [1]


COMBINED: dict[str, dict[str, Any]] = {
    "packing": {"data": {"packing": True, "max_length": 64, "eval": 0.2}},
    "padded": {"data": {"padding_free": False}},
    "accumulation and checkpointing": {"train": {"accumulate": 2, "gradient_checkpointing": True}},
    "trunk": {"method": {**LORA, "layers": 1}, "train": {"trunk_cache": True}},
    "prefix": {"method": {"method": "prefix_tuning", "length": 3}},
    "encoder-decoder": {"base": "t5"},
}


@pytest.mark.parametrize("case", COMBINED)
def test_regularising_goes_with(settings: Settings, general: str, case: str) -> None:
    parts = {"method": LORA, **COMBINED[case]}
    more = {"max_forgetting": 1e-4, "on_forgetting": "regularise", "eval_every": 1, "max_steps": 3}
    if case == "prefix":
        more["max_forgetting"] = 10.0  # it does not start as the base does
    parts["data"] = {"general": general, **parts.get("data", {})}
    parts["train"] = {**more, **parts.get("train", {})}
    measured = [line for line in lines(quiet(settings(**parts)).folder) if "eval_loss" in line]
    assert measured[-1]["forgetting_kl"] > 0 and (measured[-1]["forgetting_weight"] >= 1 or case == "prefix")


@pytest.mark.parametrize("how", ["stop", "regularise"])
def test_a_killed_run_ends_as_one_that_was_not(settings: Settings, general: str, tmp_path: Path, how: str) -> None:
    pace = {"max_steps": 12, "eval_every": 2, "save_every": 3, "schedule": "constant", "warmup": 0}
    bound = {"max_forgetting": 0.005, "on_forgetting": how}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = [settings(method=LORA, data={"general": general}, train={**pace, **bound}, output=str(folder))
            for folder in (whole, killed)]  # fmt: skip
    quiet(runs[0])
    for step in (4, 8):
        with contextlib.suppress(_DeathError):
            quiet(runs[1], callbacks=[_Dies(step)])
    quiet(runs[1])
    assert adapter(killed) == adapter(whole)
    keys = ("forgetting_kl", "general_loss", "forgetting_weight", "eval_loss", "step", "loss")
    for mine, theirs in zip(lines(killed), lines(whole), strict=True):
        assert {key: mine.get(key) for key in keys} == {key: theirs.get(key) for key in keys}
    stored = [json.loads((folder / "result.json").read_text())["metrics"] for folder in (killed, whole)]
    assert stored[0]["kept_step"] == stored[1]["kept_step"] and ("stopped_step" in stored[0]) == (how == "stop")


class _DeathError(Exception):
    """What takes the place of a kill; `test_train_resume` kills."""


class _Dies(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise _DeathError


def test_what_is_refused(settings: Settings, general: str, sources: dict[str, str], tmp_path: Path) -> None:
    def refused(word: str, kind: type[GraftError] = ConfigError, **parts: Any) -> None:
        with pytest.raises(kind, match=word):
            quiet(settings(output=str(tmp_path / "refused"), **parts))
        assert not (tmp_path / "refused").exists()

    hold = {"max_forgetting": 0.1, "on_forgetting": "regularise"}
    text = {"general": general}
    refused("train.max_forgetting: it needs data.general", train={"max_forgetting": 0.1})
    refused("train.on_forgetting: there is no bound", data=text, train={"on_forgetting": "regularise"})
    refused("data.general: it is measured at each evaluation", data={**text, "eval": None})
    refused("full trains the base itself", method={"method": "full"}, data=text, train=hold)
    refused("prompt_tuning puts pseudo-tokens", method={"method": "prompt_tuning"}, data=text, train=hold)
    refused("with train.compile", data=text, train={**hold, "compile": True})
    labels = {"train": sources["labels"], "eval": 0.25, "template": {"mode": "classification"}}
    refused("data.general: a classifier", base="bert", data={**labels, **text})
    refused(r"missing\.txt: no such file", DataError, data={"general": str(tmp_path / "missing.txt")})
    refused("column 'text'", DataError, data={"general": sources["prompts"]})
    drawn = {"method": "prefix_tuning", "length": 3}
    with pytest.raises(TrainingError, match="before the first step the KL"):
        quiet(settings(method=drawn, data=text, train={"max_forgetting": 1e-9}))


def test_the_line_names_the_best_adapter_where_that_is_kept(settings: Settings, general: str) -> None:
    """The best is the first evaluation, the last within the bound another."""
    pace = {"max_steps": 4, "eval_every": 1, "schedule": "constant", "warmup": 0, "keep_best": "loss"}
    run = settings(method=LORA, data={"general": general}, train={**pace, "max_forgetting": 1.0})
    said = Console(record=True, file=io.StringIO(), width=300)
    with pytest.MonkeyPatch.context() as patch:
        rising = iter((0.0, 0.1, 0.2, 0.3, 2.0))
        patch.setattr(guarding, "forgetting", lambda *_: [Forgetting(1.0, 1.0, next(rising), 8)])
        patch.setattr(GraftTrainer, "_determine_best_metric", _first)
        held = train(run, console=said)
    assert held.metrics["kept_step"] == 1
    assert "the run stopped, and the adapter of step 1, the best within it, is kept" in said.export_text()


def _first(trainer: Any, metrics: dict[str, float], trial: Any) -> bool:
    """As if the loss only rose after the first evaluation."""
    rising = metrics | {"eval_loss": float(trainer.state.global_step)}
    return SavingTrainer._determine_best_metric(trainer, rising, trial)


def test_a_stop_that_is_asked_for_at_the_bound_ends_the_run(settings: Settings, general: str) -> None:
    """The bound has ended it: nothing is left to go on from."""
    pace = {"max_steps": 6, "eval_every": 2, "schedule": "constant", "warmup": 0, "max_forgetting": 1e-9}
    held = quiet(settings(method=LORA, data={"general": general}, train=pace), callbacks=[_Asks(2)])
    assert held.metrics["kept_step"] == 0 and held.metrics["stopped_step"] == 2


class _Asks(TrainerCallback):
    """SIGTERM during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            signal.raise_signal(signal.SIGTERM)
