"""Run settings: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import graft.methods  # noqa: F401  fills the registry
from examples import instances
from graft.errors import ConfigError
from graft.method import REGISTRY, from_dict
from graft.methods.lora import LoRA
from graft.train.config import Run, load_run, make_run, schema

TEXT = "base: embedded\ndata: {train: rows.jsonl}\noutput: out\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def test_defaults_and_overrides(file: Path) -> None:
    run = load_run(file)
    assert (run.base, run.method, run.seed, run.data.eval, run.train.optimizer) == (
        "embedded",
        LoRA(),
        0,
        None,
        "adamw",
    )
    changes = ["train.lr=1e-4", "train.epochs=3", "method.rank=4", "data.limits.leaked=2", "data.template.kind=plain"]
    run = load_run(file, changes)
    assert run.train.lr == 1e-4 and type(run.train.epochs) is float and run.method == LoRA(rank=4)
    assert run.data.limits.leaked == 2 and run.data.template == {"kind": "plain"}


def test_numbers_that_yaml_reads_as_text(file: Path) -> None:
    file.write_text(TEXT + "train: {lr: 2e-4, weight_decay: 1e-2}\nmethod: {method: lora, dropout: 1e-1}\n")
    run = load_run(file)
    assert (run.train.lr, run.train.weight_decay, run.method.dropout) == (2e-4, 1e-2, 0.1)


def test_numbers_as_text_inside_of_a_methods_settings(file: Path) -> None:
    file.write_text(TEXT + "method: {method: lora, targets: [q_proj], layers: [0, 1], alpha: 16}\n")
    run = load_run(file, ["method.alpha_pattern={q_proj: 1e1}"])
    assert run.method == LoRA(targets=("q_proj",), layers=(0, 1), alpha_pattern={"q_proj": 10.0})
    parts = "[{method: lora, dropout: 1e-1}, {method: prompt_tuning, init: text, text: 1e3}]"
    file.write_text(TEXT + f"method: {{method: compose, rates: [1, 1e2], parts: {parts}}}\n")
    method = load_run(file).method
    assert method.rates == (1.0, 100.0) and (method.parts[0].dropout, method.parts[1].text) == (0.1, "1e3")


def test_method_by_name_and_short_form(file: Path) -> None:
    assert load_run(file, ["method=ia3"]).method.name == "ia3"
    file.write_text(TEXT + "method: lora\n")
    assert load_run(file, ["method.rank=2"]).method == LoRA(rank=2)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_resolved_settings_give_the_same_run(name: str) -> None:
    chosen = {"layers": {"range": [0, 2, 1]}} if name in ("lora", "ia3") else {}
    method = from_dict({**instances(name, "llama")[0].to_dict(), **chosen})
    run = make_run({"base": "b", "data": {"train": "t"}, "output": "o", "method": method.to_dict()})
    assert run.method == method
    assert make_run(yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json")))) == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "train.lrr: unknown key; did you mean 'lr'?"),
        ("trian.lr=1", "trian: unknown key; did you mean 'train'?"),
        ("data.limits.lekaed=1", "data.limits.lekaed: unknown key; did you mean 'leaked'?"),
        ("method.rnk=3", "method.rnk: LoRA has no such setting; did you mean 'rank'?"),
        ("method=lorra", "method: unknown method 'lorra'; did you mean 'lora'?"),
        (
            "method={method: compose, parts: [lora, {method: ia3, target: x}]}",
            r"method.parts\[1\].target: IA3 has no such setting; did you mean 'targets'?",
        ),
        ("method={method: compose, parts: [lorra, ia3]}", r"method.parts\[0\]: unknown method 'lorra'"),
        ("method={method: compose, parts: [lora, {method: lora, rank: x}]}", r"method.parts\[1\].rank: input should"),
        ("method={method: compose, parts: [lora, ia3], rates: [1, 0]}", r"the 2 parts, not \(1.0, 0.0\)"),
        ("method.rank=x", "method.rank: input should be a valid integer, not 'x'"),
        ("method.rank=true", "method.rank: input should be a valid integer, not True"),
        ("method.rank='8'", "method.rank: input should be a valid integer, not '8'"),
        ("method.rank=8.0", "method.rank: input should be a valid integer, not 8.0"),
        ("method.rank=8.5", "method.rank: input should be a valid integer, not 8.5"),
        ("method.rank=1e1", "method.rank: input should be a valid integer, not '1e1'"),
        ("method.alpha=true", "method.alpha: input should be a valid number, not True"),
        ("method.rslora=1", "method.rslora: input should be a valid boolean, not 1"),
        ("method.rslora='yes'", "method.rslora: input should be a valid boolean, not 'yes'"),
        ("method.init=1", "method.init: input should be a valid string, not 1"),
        ("method.rank_pattern={q_proj: 2.0}", "method.rank_pattern: input should be a valid integer, not "),
        ("train.lr=abc", "train.lr: input should be a valid number, .*not 'abc'"),
        ("train.lr=true", "train.lr: input should be a valid number, not True"),
        ("train.lr=.nan", "train.lr: input should be a finite number"),
        ("train.lr=-1", "train.lr: input should be greater than 0"),
        ("train.batch_size=2.5", "train.batch_size: input should be a valid integer, not 2.5"),
        ("train.max_steps=true", "train.max_steps: input should be a valid integer, not True"),
        ("train.schedule=cosin", "train.schedule: input should be 'linear', 'cosine' or 'constant', not 'cosin'"),
        ("data.truncate=1", "data.truncate: input should be a valid boolean, not 1"),
        ("data.train=null", "data.train: input should be a valid string, not None"),
        ("data.eval=[1]", "data.eval: "),
        ("precision=fp16", "precision: input should be "),
        ("seed=-1", "seed: input should be greater than or equal to 0, not -1"),
        ("seed=4294967296", "seed: input should be less than 4294967296"),
        ("train.eval_every=5", "train.eval_every: it needs data.eval"),
        ("train.eval_batch_size=5", "train.eval_batch_size: it needs data.eval"),
        ("data.eval_limit=5", "data.eval_limit: it needs data.eval"),
        ("data.eval_split=test", "data.eval_split: it needs data.eval"),
        ("data.eval_columns={prompt: q}", "data.eval_columns: it needs data.eval"),
        (
            "data={train: a, eval: 0.1, eval_split: test}",
            "data.eval_split: data.eval is a share .*; leave eval_split out",
        ),
        (
            "data={train: a, eval: 0.1, eval_columns: {prompt: q}}",
            "data.eval_columns: data.eval is a share .* by data.columns; leave eval_columns out",
        ),
        ("base.x=1", "base has no keys of its own"),
        ("train.lr", "expected key=value"),
        ("train.lr=[", "not valid YAML"),
    ],
)
def test_refused_in_one_line(override: str, message: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_run(file, [override])
    assert "\n" not in str(caught.value)
    if "=" in override and "has no keys" not in message and "YAML" not in message:
        assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected keys"),
        ("base: [\n", "not valid YAML"),
        ("base: embedded\noutput: out\n", "data: missing"),
        ("base: embedded\ndata: {}\noutput: out\n", "data.train: missing"),
        (TEXT + "method: 3\n", "method: expected a name or settings"),
    ],
)
def test_refused_files(text: str, message: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_run(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_run(file.with_name("nothing.yaml"))


def test_schema_knows_every_key() -> None:
    found = schema()
    assert found["additionalProperties"] is False and set(found["properties"]) == set(Run.model_fields)
    assert found["properties"]["method"]["anyOf"][0]["enum"] == sorted(REGISTRY)
    assert found["$defs"]["TrainSettings"]["properties"]["lr"]["type"] == "number"
