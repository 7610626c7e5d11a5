"""Whole runs: what they write, what they refuse, and what a fresh base with the saved adapter gives."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import graft
from graft import base, files
from graft.bank import bank_of
from graft.data.encode import IGNORED
from graft.data.rows import load_rows
from graft.data.template import Template
from graft.errors import ConfigError, DataError, GraftError, TrainingError
from graft.train import run as running
from graft.train import state
from graft.train.config import Run, load_run
from graft.train.run import Result, data_report, train
from graft.train.trainer import GraftTrainer
from tiny import tiny

Settings = Callable[..., Run]


def quiet(run: Run, **more: Any) -> Result:
    return train(run, console=Console(quiet=True), **more)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_and_what_it_writes(settings: Settings, sources: dict[str, str]) -> None:
    run = settings()
    result = quiet(run)
    folder = result.folder
    assert {path.name for path in folder.iterdir()} == {
        "run.yaml", "data.json", "metrics.jsonl", "loss.png", "result.json", "checkpoints", "adapter",
    }  # fmt: skip
    assert load_run(folder / "run.yaml") == run
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((folder / "result.json").read_text())
    assert stored["data"]["sha256"]["train"] == hashlib.sha256(Path(sources["prompts"]).read_bytes()).hexdigest()
    assert stored["data"]["train_rows"] == 40 and stored["settings"] == run.model_dump(mode="json")
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    assert result.trainable == result.saved == sum(value.numel() for value in tensors.values())
    assert result.peak_bytes > 10**7 and result.seconds > 0 and stored["versions"]["torch"] == torch.__version__
    seen = lines(folder)
    assert [line["step"] for line in seen if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in seen if "eval_loss" in line] == [0, 3, 6]
    assert result.metrics["eval_loss"] == seen[-1]["eval_loss"] < result.metrics["eval_loss_before"]
    assert [path.name for path in state.checkpoints(folder / "checkpoints")] == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_very_short_run_trains(steps: int, settings: Settings) -> None:
    """Every step has a rate above 0, with the warm-up that is the default."""
    result = quiet(settings(train={"max_steps": steps, "log_every": 1}))
    assert [line["lr"] for line in lines(result.folder) if "loss" in line] == [0.01] * steps
    assert all(value.any() for key, value in load_file(result.adapter / "adapter_model.safetensors").items())


def test_a_warm_up_of_the_whole_run_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.warmup: 6 steps, and the run has 6"):
        quiet(settings(train={"warmup": 6}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"device": "tpu"}, "device: unknown device 'tpu'"),
        ({"device": "tpu", "precision": "bf16"}, "device: unknown device 'tpu'"),
        ({"method": {"method": "lora", "targets": ["q_prj"]}}, "q_prj"),
        ({"method": {"method": "lora", "targets": ["attention.qery"]}, "precision": "nf4"}, "attention.query"),
        ({"method": {"method": "top_layers", "count": 99}}, "99 blocks"),
        ({"method": {"method": "prompt_tuning", "length": 200}}, "method.length: the 200 of prompt_tuning alone fill"),
        ({"method": {"method": "prefix_tuning", "length": 200}}, "method.length: the 200 of prefix_tuning alone fill"),
        ({"data": {"template": {"kind": "chta"}}}, "did you mean 'chat'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_settings_are_checked_before_the_data_are_read(
    parts: dict[str, Any], match: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.train.run.read_data", None)
    with pytest.raises(GraftError, match=match):
        quiet(settings(**parts))


@pytest.mark.parametrize("base_name", ["llama", "t5"])
def test_the_saved_adapter_has_the_loss_that_the_run_says(base_name: str, settings: Settings) -> None:
    """Independent of the trainer: a fresh base, the saved adapter and template, and the mean loss by hand."""
    run = settings(base_name)
    result = quiet(run)
    model, tokenizer = base.load_base(run.base, precision="fp32"), base.load_tokenizer(run.base)
    files.load(model, result.adapter)
    template = Template.from_dict(files.read_card(result.adapter)["template"])
    total, count = 0.0, 0
    for row in load_rows(str(run.data.eval)):
        example = template.example(row, tokenizer)
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        with torch.no_grad():
            logits = model(input_ids=ids, labels=labels).logits
        shifted = (logits[0], labels[0]) if base_name == "t5" else (logits[0, :-1], labels[0, 1:])
        total += float(nn.functional.cross_entropy(*shifted, ignore_index=IGNORED, reduction="sum"))
        count += int((shifted[1] != IGNORED).sum())
    assert result.metrics["eval_loss"] == pytest.approx(total / count, abs=2e-5)


def test_classification_trains_its_head(settings: Settings, sources: dict[str, str]) -> None:
    data = {"train": sources["labels"], "eval": 0.25, "template": {"mode": "classification"}}
    run = settings("bert", data=data, train={"keep_best": "accuracy", "max_steps": 8})
    result = quiet(run)
    model = base.load_base(run.base, precision="fp32", num_labels=2)
    adapter = files.load(model, result.adapter)
    assert any(site.path == "classifier" for site, _ in adapter.items())
    card = files.read_card(result.adapter)
    assert card["template"]["label_names"] == ["bad", "good"]
    best = max(line["eval_accuracy"] for line in lines(result.folder) if line.get("step") and "eval_accuracy" in line)
    assert result.metrics["eval_accuracy"] == best


def test_keep_best_keeps_the_best(settings: Settings) -> None:
    """A rate that is far too high: the last evaluation is not the best."""
    result = quiet(settings(train={"lr": 3.0, "eval_every": 1, "keep_best": "loss", "keep": 1, "schedule": "constant"}))
    losses = {line["step"]: line["eval_loss"] for line in lines(result.folder) if line["step"] and "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best < 6 and result.metrics["kept_step"] == best and result.metrics["eval_loss"] == losses[best]
    kept = result.folder / "checkpoints" / f"checkpoint-{best}"
    for name in ("adapter_model.safetensors",):
        assert (kept / name).read_bytes() == (result.adapter / name).read_bytes()


def test_every_adapter_that_the_rows_name(settings: Settings, sources: dict[str, str], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(sources["prompts"]).read_text().splitlines()]
    mixed = [{**row, "adapter": "odd"} if i % 2 else row for i, row in enumerate(rows)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    result = quiet(settings(data={"train": str(tmp_path / "mixed.jsonl"), "eval": None}))
    model = base.load_base(result.run.base, precision="fp32")
    for name in ("default", "odd"):
        files.load(model, result.adapter / name)
    assert bank_of(model).names == ("default", "odd")
    left, right = (load_file(result.adapter / name / "adapter_model.safetensors") for name in ("default", "odd"))
    assert left.keys() == right.keys() and any(not torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("method", "data"),
    [
        ({"method": "prompt_tuning", "length": 4, "init": "text", "text": "a cat"}, {}),
        ({"method": "prefix_tuning", "length": 3, "hidden": 4}, {"packing": True, "max_length": 48}),
        ({"method": "prompt_tuning", "length": 3, "init": "vocab"}, {"packing": True, "max_length": 48}),
        ({"method": "full"}, {"packing": True, "max_length": 48}),
        ({"method": "top_layers", "count": 1}, {"truncate": True, "max_length": 24, "limits": {"truncated": 1.0}}),
    ],
    ids=lambda value: value.get("method") or "-".join(value) or "plain",
)
def test_methods_and_data(method: dict[str, Any], data: dict[str, Any], settings: Settings) -> None:
    result = quiet(settings(method=method, data=data, train={"gradient_checkpointing": True}))
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


def test_bf16_compute(settings: Settings) -> None:
    run = settings(train={"compute": "bf16"})
    if base.computes_bf16("cpu"):
        assert quiet(run).metrics["eval_loss"] < 9
    else:
        with pytest.raises(ConfigError, match=r"train\.compute"):
            quiet(run)


def test_bf16_where_the_device_has_it_not(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "computes_bf16", lambda device="cpu": False)
    for run, key in ((settings(train={"compute": "bf16"}), "train.compute"), (settings(precision="bf16"), "precision")):
        with pytest.raises(ConfigError, match=f"^{key}: cpu does not compute in bf16"):
            quiet(run)
    assert base.load_base(settings().base).dtype == torch.float32


# ------------------------------------------------------------------------------------------------- again


def test_a_finished_run_is_not_trained_again_and_fresh_starts_over(settings: Settings) -> None:
    run = settings()
    first = quiet(run)
    before = everything(first.folder)
    assert quiet(run) == first
    assert everything(first.folder) == before
    again = quiet(run, fresh=True)
    assert again.folder.name == "run-2" and everything(first.folder) == before
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == before["adapter/adapter_model.safetensors"]


def test_other_settings_or_data_are_refused(settings: Settings, sources: dict[str, str], tmp_path: Path) -> None:
    copied = tmp_path / "rows.jsonl"
    copied.write_text(Path(sources["prompts"]).read_text())
    run = settings(data={"train": str(copied)})
    folder = quiet(run).folder
    before = everything(folder)
    other = run.model_copy(update={"train": run.train.model_copy(update={"lr": 0.5})})
    with pytest.raises(ConfigError, match=r"^train\.lr: .*run was begun with 0\.01, not 0\.5"):
        quiet(other)
    (folder / "result.json").unlink()
    copied.write_text(copied.read_text() + json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(ConfigError, match=r"^data\.train: the content changed"):
        quiet(run)
    del before["result.json"]
    assert everything(folder) == before


def test_a_folder_that_is_no_run_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds something else"):
        quiet(settings())
    assert everything(tmp_path / "run") == {"thesis.tex": b"x"}


# ------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"base": "nowhere/at/all"}, ConfigError, "no such folder"),
        ({"data": {"train": "nowhere.jsonl"}}, DataError, "no such file"),
        ({"data": {"columns": {"prompt": "promt"}}}, DataError, "no column 'promt'"),
        ({"data": {"max_length": 12}}, DataError, "longer than 12 tokens"),
        ({"data": {"max_length": 4096}}, ConfigError, "more than the 128 tokens"),
        ({"data": {"eval": "SAME"}}, DataError, "asked in training too"),
        ({"data": {"template": {"mode": "seq2seq"}}}, ConfigError, "no seq2seq model"),
        ({"data": {"template": "caht"}}, ConfigError, "did you mean 'chat'"),
        ({"data": {"eval": None}, "train": {"keep_best": "loss"}}, ConfigError, "needs data.eval"),
        ({"train": {"keep_best": "accuracy"}}, ConfigError, "accuracy is for classification"),
        ({"method": {"method": "lora", "targets": ["attention.kwery"]}}, GraftError, "kwery"),
        ({"method": {"method": "prompt_tuning", "length": 120}}, ConfigError, "120 of prompt_tuning are more than"),
        ({"method": {"method": "prompt_tuning", "length": 200}}, ConfigError, "the 200 of prompt_tuning alone fill"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refused_before_anything_is_written(
    parts: dict[str, Any],
    error: type[Exception],
    message: str,
    settings: Settings,
    sources: dict[str, str],
    tmp_path: Path,
) -> None:
    data = {key: sources["prompts"] if value == "SAME" else value for key, value in parts.get("data", {}).items()}
    name = parts.get("base", "llama")
    run = settings(**{key: value for key, value in parts.items() if key not in ("data", "base")}, data=data)
    if name != "llama":
        run = run.model_copy(update={"base": name})
    with pytest.raises(error, match=message) as caught:
        quiet(run)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_the_checkpoint_lacks_trains_or_is_refused(
    settings: Settings, sources: dict[str, str], bases: Path, tmp_path: Path
) -> None:
    """A masked language model has no pooler and no classifier."""
    shutil.copytree(bases / "bert", tmp_path / "masked")
    config = transformers.BertConfig.from_pretrained(bases / "bert")
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "masked")
    data = {"train": sources["labels"], "eval": 0.25, "template": {"mode": "classification"}}

    def run(method: dict[str, Any], **more: Any) -> Run:
        return settings(method=method, data={**data, **more}).model_copy(update={"base": str(tmp_path / "masked")})

    with pytest.raises(ConfigError, match=r"data\.template\.mode: .* BertForMaskedLM") as caught:
        quiet(run({"method": "lora"}, template={"mode": "causal", "kind": "plain"}, train=sources["prompts"]))
    assert "\n" not in str(caught.value)
    lora = {"method": "lora", "modules_to_save": ["bert.pooler.dense"]}
    with pytest.warns(UserWarning, match=r"has no bert\.pooler\.dense"):
        with pytest.raises(ConfigError, match=r"bert\.pooler\.dense is not in the checkpoint"):
            quiet(run({"method": "lora"}))
        with pytest.raises(ConfigError, match=r"method\.head: .* no trained classifier"):
            quiet(run({**lora, "head": False}))
        assert not (tmp_path / "run").exists()
        result = quiet(run(lora))
        torch.manual_seed(99)
        model = base.load_base(tmp_path / "masked", precision="fp32", num_labels=2)
    files.load(model, result.adapter)  # the fingerprint and the probe hold, whatever the new modules began with


def test_one_label_is_no_classification(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"a {i}", "label": 1}) + "\n" for i in range(8)))
    data = {"train": str(tmp_path / "rows.jsonl"), "eval": 0.25, "template": {"mode": "classification"}}
    with pytest.raises(DataError, match=r"rows\.jsonl: every row has the label 1; give rows with two"):
        quiet(settings("bert", data=data))


def test_an_encoder_decoder_classifies_by_its_end_token(
    settings: Settings, sources: dict[str, str], tmp_path: Path
) -> None:
    data = {"train": sources["labels"], "eval": 0.25, "template": {"mode": "classification"}}
    with pytest.raises(DataError, match=r"labels\.jsonl row \d+: no end token <\|end\|>") as caught:
        quiet(settings("t5", data=data))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    data["template"] = {"mode": "classification", "templates": ["{text}<|end|>"]}
    assert "eval_accuracy" in quiet(settings("t5", data=data, train={"max_steps": 1})).metrics


def test_two_processes_on_one_folder(settings: Settings, tmp_path: Path) -> None:
    run = settings()
    (tmp_path / "run").mkdir()
    held = (tmp_path / "run" / ".lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="output: another process works in"):
        quiet(run)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    held.close()  # as the kernel does for a killed process: the file stays, the lock goes
    assert not (quiet(run).folder / ".lock").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_broken_checkpoint_is_named(name: str, settings: Settings, tmp_path: Path) -> None:
    run = settings(train={"max_steps": 2})
    folder = quiet(run).folder
    (folder / "result.json").unlink()
    file = folder / "checkpoints" / "checkpoint-2" / name
    content = file.read_bytes()
    for cut in (content[: len(content) // 2], b""):
        file.write_bytes(cut)
        with pytest.raises(TrainingError, match=rf"checkpoint-2.{name}: cannot be read .*; delete .*checkpoint-2 or"):
            quiet(run)
    if name != "rng_state.pth":
        file.unlink()
        with pytest.raises(TrainingError, match=rf"{name}: cannot be read \(it is missing\)") as caught:
            quiet(run)
        assert "\n" not in str(caught.value)
    file.write_bytes(content)
    assert quiet(run).metrics["steps"] == 2


def test_too_little_memory_writes_nothing(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise TrainingError("out of memory")

    monkeypatch.setattr(running.GraftTrainer, "dry_run", fail)
    run = settings().model_copy(update={"output": str(tmp_path / "a" / "b" / "run")})
    with pytest.raises(TrainingError):
        quiet(run)
    assert not (tmp_path / "a").exists()


def test_a_loss_that_is_not_finite(settings: Settings, bases: Path, sources: dict[str, str], tmp_path: Path) -> None:
    """A base whose embedding of one rare token is broken: the row that has it is named, and no adapter is saved."""
    model, tokenizer = base.load_base(bases / "gpt2", precision="fp32"), base.load_tokenizer(bases / "gpt2")
    rare = tokenizer(" ~", add_special_tokens=False).input_ids[-1]
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = float("nan")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.nan_to_num().clone())
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    rows = Path(sources["prompts"]).read_text().splitlines()
    rows[16] = json.dumps({"prompt": "The cat ~ sees", "completion": "x"})
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    run = settings("gpt2", data={"train": str(tmp_path / "rows.jsonl"), "eval": None}, train={"max_steps": 30})
    run = run.model_copy(update={"base": str(tmp_path / "broken")})
    with pytest.raises(TrainingError, match=r"the loss is nan on the batch of .*rows\.jsonl rows .*\b17\b") as caught:
        quiet(run)
    assert "\n" not in str(caught.value)
    folder = tmp_path / "run"
    assert not (folder / "adapter").exists() and not (folder / "result.json").exists()
    stored = [load_file(path) for path in folder.rglob("*.safetensors")]
    assert all(bool(value.isfinite().all()) for tensors in stored for value in tensors.values())
    with pytest.raises(TrainingError, match="the loss is nan"):
        quiet(run)


def test_data_report_loads_no_weights(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "load_base", None)
    found = data_report(settings())
    assert found.train.rows == 40 and found.evaluation is not None and found.evaluation.rows == 8


def test_the_console_is_calm(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with (Path(settings().output).parent / "screen.txt").open("w+") as screen:
        train(settings(), console=Console(file=screen, width=120))
        screen.seek(0)
        text = screen.read()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""
    assert "step 3/6: evaluation loss" in text and "tokens/s" in text and "the adapter is in" in text


def test_result_is_frozen_and_plain_yaml(settings: Settings) -> None:
    run = settings()
    again = yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json")))
    assert again["train"]["lr"] == 0.01
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3  # type: ignore[misc]


def test_one_gpu_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer counts the GPUs when it sets its device up; here two, whatever this machine has."""
    plain = transformers.TrainingArguments._setup_devices.func

    def two(arguments: Any) -> torch.device:
        found = plain(arguments)
        arguments._n_gpu = 2
        return found

    setup = functools.cached_property(two)
    setup.__set_name__(transformers.TrainingArguments, "_setup_devices")
    monkeypatch.setattr(transformers.TrainingArguments, "_setup_devices", setup)
    model = tiny("llama")
    graft.attach(model, graft.LoRA())
    trainer = GraftTrainer(model, transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    assert trainer.args.n_gpu == 1


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_fp32_computing_on_another_base_is_refused(
    precision: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.base.computes_bf16", lambda device: True)
    with pytest.raises(ConfigError, match=rf"^train\.compute: the base is in {precision} here, not in fp32"):
        running._autocast(settings(precision=precision, train={"compute": "fp32"}))
    assert running._autocast(settings(precision="fp32", train={"compute": "fp32"})) is None


@pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:0"])
def test_the_first_gpu_is_taken(device: str | None) -> None:
    running.check_gpu(device)


def test_another_gpu_than_the_first_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^device: cuda:1: .*CUDA_VISIBLE_DEVICES=1 before"):
        running.check_gpu("cuda:1")


def test_several_processes_are_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE: it trains in one process"):
        quiet(settings())
