"""`graft convert` with other libraries' forms: through the program, on the embedded base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import graft
from examples import perturb
from graft.cli import app
from graft.convert import convert_adapter
from graft.method import Method

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(method: Method) -> Tensor:
    """Save an adapter as the folder "a"; its logits."""
    model = graft.load_base("embedded", precision="fp32")
    perturb(graft.attach(model, method, "a"))
    graft.save(model, "a", "a", template={"kind": "plain"})
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(IDS).logits


def loaded(folder: str) -> Tensor:
    model = graft.load_base("embedded", precision="fp32")
    graft.load(model, folder)
    return logits(model)


def convert(source: str, output: str, *options: str, code: int = 0) -> tuple[str, str]:
    arguments = ["convert", source, output, "--base", "embedded", *options]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout, done.stderr


def refused(source: str, output: str, *options: str) -> str:
    before = sorted(Path().rglob("*"))
    _, err = convert(source, output, *options, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and sorted(Path().rglob("*")) == before, err
    return err


CARD = ("the prompt template", "the fingerprint of the base", "the probe")


def test_adapterhub_and_back() -> None:
    want = saved(graft.Bottleneck(size=4, kind="pfeiffer"))
    out, err = convert("a", "hub", "--to", "adapterhub")
    assert out == "hub: in adapterhub's form\n" and all(f"note: it does not hold {what}\n" in err for what in CARD)
    assert "note: it does not hold how dropout acts" in err
    convert("hub", "ours", "--from", "adapterhub", "--to", "graft")
    assert torch.allclose(loaded("ours"), want, atol=1e-5)
    assert "probe" in json.loads(Path("ours/graft.json").read_text())
    assert "peft has no bottleneck" in refused("hub", "no", "--from", "adapterhub", "--to", "peft")
    assert "not lora" not in refused("hub", "hub", "--from", "adapterhub", "--to", "graft")


def test_loralib_to_peft() -> None:
    want = saved(graft.LoRA(rank=2, alpha=10))
    _, err = convert("a", "x.pt", "--to", "loralib")
    assert "note: it does not hold lora_alpha=10\n" in err and err.count("\n") == 4
    convert("x.pt", "theirs", "--from", "loralib", "--alpha", "10", "--to", "peft")
    assert sorted(file.name for file in Path("theirs").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert torch.allclose(loaded("theirs"), want, atol=1e-5)
    assert "alpha: x.pt does not hold it" in refused("x.pt", "no", "--from", "loralib", "--to", "peft")
    told = ["--from", "loralib", "--to", "peft", "--alpha", "10"]
    assert "--layers: it is for --from llama-adapter" in refused("x.pt", "no", *told, "--layers", "2")
    assert "parts: no pair" in refused("x.pt", "no", *told, "--parts", "query,value")
    assert "'loralab' is no form; use adapterhub" in refused("x.pt", "no", "--from", "loralab", "--to", "peft")
    assert "'longlora' is no form" in refused("a", "no", "--to", "longlora")
    assert "end its name in one of" in refused("a", "no", "--to", "loralib")
    assert "tanh gates, not lora" in refused("a", "no.pth", "--to", "llama-adapter")
    with pytest.raises(graft.ConfigError, match="--ranks: no form asks for it"):
        convert_adapter("x.pt", "no", base="embedded", to="peft", source_form="loralib", ranks=3)


def test_a_classifiers_head_says_how_many_labels() -> None:
    model = graft.load_base("embedded", precision="fp32", num_labels=5)
    perturb(graft.attach(model, graft.LoRA(rank=2), "a"))
    graft.save(model, "a", "a")
    convert("a", "x.pt", "--to", "loralib")
    convert("x.pt", "again", "--from", "loralib", "--alpha", "16", "--to", "graft")
    other = graft.load_base("embedded", precision="fp32", num_labels=5)
    graft.load(other, "again")
    assert torch.allclose(logits(other), logits(model), atol=1e-5)
