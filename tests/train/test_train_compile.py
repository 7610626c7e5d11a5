"""`train.compile`: what compiled blocks give is what the same model gives without; runs report the cold start."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_train_run import lines
from torch import Tensor

import graft
from graft import roles
from graft.adapter import key_of
from graft.errors import ConfigError
from graft.fast.trunk import Trunk
from graft.methods.lora import LoRA
from graft.train import compiled as compiling
from graft.train.compiled import Compiled
from graft.train.config import Run
from graft.train.guards import checkpointing
from graft.train.run import train
from tiny import FIRST_TOKEN, VOCAB, tiny

Settings = Callable[..., Run]


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No code is generated, but where a test says so: dynamo traces and guards as ever."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "_backend", getattr(request, "param", "eager"))
    yield
    torch._dynamo.reset()


def pair(**more: Any) -> tuple[Any, Any]:
    """Two models with the same adapters, a and b; the sites have all run once."""
    models = []
    for _ in range(2):
        model = tiny("llama", **more)
        for name in ("a", "b"):
            torch.manual_seed(ord(name))
            adapter = graft.attach(model, LoRA(rank=4), name)
            for parameter in adapter.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        graft.use(model, "a")
        model.train()
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
        models.append(model)
    return models[0], models[1]


def one(model: Any) -> Compiled:
    """The blocks of a model that has two adapters, which a run would refuse."""
    other = model.adapters.held.pop(key_of("b"))
    made = Compiled(model)
    model.adapters.held[key_of("b")] = other
    return made


def step(
    model: Any, rows: list[Any] | None, shape: tuple[int, int], texts: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(sum(shape))
    ids = torch.randint(FIRST_TOKEN, VOCAB, shape, generator=generator)
    more: dict[str, Any] = {}
    routing: Any = contextlib.nullcontext()
    if texts:
        more["position_ids"] = torch.cat([torch.arange(length) for length in texts])[None]
        routing = graft.route(model, segments=[("a", length) for length in texts])
    elif rows is not None:
        routing = graft.route(model, rows)
    with routing:
        loss = model(input_ids=ids, labels=ids, use_cache=False, **more).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def same_step(blocks: Compiled, left: Any, right: Any, *args: Any) -> Tensor:
    with blocks.running():
        loss, gradients = step(left, *args)
    expected, wanted = step(right, *args)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == wanted.keys() and wanted
    for name, value in wanted.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
    return loss


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_another_route_is_seen() -> None:
    left, right = pair(num_hidden_layers=1)
    blocks = one(left)
    losses = [same_step(blocks, left, right, rows, (4, 11), []) for rows in (None, ["b"] * 4, ["a", "b", None, "a"])]
    for model in (left, right):
        graft.use(model, "b")
    losses += [same_step(blocks, left, right, None, (4, 11), [])]
    assert len({round(float(loss), 5) for loss in losses}) == 3 and losses[3] == losses[1]


def test_lengths_and_an_uneven_batch_share_graphs() -> None:
    left, right = pair()
    blocks, start = one(left), graphs()
    for shape in ((4, 11), (4, 13), (1, 9)):
        same_step(blocks, left, right, None, shape, [])
    before = graphs()
    assert before > start
    for shape in ((3, 17), (2, 5), (1, 30), (4, 21)):
        same_step(blocks, left, right, None, shape, [])
    assert graphs() == before


@pytest.mark.slow
@pytest.mark.parametrize("quick", ["aot_eager"], indirect=True)
def test_checkpointing_computes_again_what_was_compiled() -> None:
    left, right = pair()
    blocks, before = one(left), graphs()
    with checkpointing(left, True), checkpointing(right, True):
        assert left.model.layers[0].gradient_checkpointing
        for shape in ((2, 11), (2, 13), (2, 9)):
            same_step(blocks, left, right, None, shape, [])
    assert graphs() > before


def test_texts_end_to_end_share_graphs() -> None:
    left, right = pair(num_hidden_layers=1)
    blocks = one(left)
    same_step(blocks, left, right, None, (1, 12), [5, 7])
    same_step(blocks, left, right, None, (1, 15), [5, 7, 3])
    before = graphs()
    for texts in ([9, 2, 3], [4, 4, 4, 4], [8, 20]):
        same_step(blocks, left, right, None, (1, sum(texts)), texts)
    assert graphs() == before > 0


def test_outside_of_steps_nothing_is_compiled_and_no_name_changes() -> None:
    left, _ = pair(num_hidden_layers=1)
    blocks, keys, before = one(left), list(left.state_dict()), graphs()
    with blocks.running():
        assert list(left.state_dict()) == keys
        step(left, None, (2, 7), [])
    during = graphs()
    step(left, None, (2, 8), [])
    assert before < during == graphs() and list(left.state_dict()) == keys
    assert not any("forward" in block.__dict__ for stack in roles.blocks(left).values() for _, block in stack)


def test_too_many_graphs_are_said_once_and_stay_right(said: Callable[[], list[str]]) -> None:
    left, right = pair(num_hidden_layers=1)
    blocks = one(left)
    blocks.limit = 3
    for rows in (["a"] * 3, ["b"] * 3, ["a", "b", "b"], ["b", "a", "b"], ["b", "b", "a"]):
        same_step(blocks, left, right, rows, (3, 11), [])
    assert len(said()) == 1 and "compiled 3 times" in said()[0]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "graft")
    return lambda: [record.getMessage() for record in caplog.records if record.getMessage().startswith("train.compile")]


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    left, _ = pair()
    with pytest.raises(ConfigError, match=r"train\.compile: several adapters"):
        Compiled(left)
    graft.detach(left, "b")
    for owner, name in ((torch._dynamo.config, "TORCH_COMPILE_DISABLE"), (None, "TORCHDYNAMO_DISABLE")):
        monkeypatch.setenv(name, "1")
        off = contextlib.nullcontext() if owner is None else owner.patch(disable=True)  # it was read at the import
        with off, pytest.raises(ConfigError, match=r"train\.compile: TORCH_COMPILE_DISABLE"):
            Compiled(left)


def told(run: Run) -> tuple[Any, str]:
    out = io.StringIO()
    return train(run, console=Console(file=out, width=200)), out.getvalue()


PLAIN = {"method": {"method": "lora", "rank": 4}, "data": {"padding_free": False}}


def test_a_run_and_its_resume(settings: Settings, tmp_path: Path) -> None:
    more = {"gradient_checkpointing": True}
    plain, _ = told(settings(**PLAIN, train=more, output=str(tmp_path / "plain")))
    run = settings(**PLAIN, train=more | {"compile": True})
    result, text = told(run)
    assert "compiled in " in text and "a step now takes " in text
    stored = json.loads((result.folder / "result.json").read_text())["metrics"]
    assert stored["compile_seconds"] > stored["step_seconds"] > 0
    for a, b in zip(lines(plain.folder), lines(result.folder), strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)
    whole = load_file(result.adapter / "adapter_model.safetensors")
    wanted = load_file(plain.adapter / "adapter_model.safetensors")
    assert whole.keys() == wanted.keys() and {p.name for p in result.folder.iterdir()} == {
        p.name for p in plain.folder.iterdir()
    }
    for path in (result.folder / "result.json", result.folder / "checkpoints/checkpoint-6/trainer_state.json"):
        path.unlink()
    shutil.rmtree(result.folder / "checkpoints/checkpoint-6")
    again, text = told(run)
    assert "going on from" in text and "compiled in " in text
    for key, value in load_file(again.adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-6)


def test_the_frozen_trunk_stays_plain(settings: Settings, tmp_path: Path) -> None:
    same: dict[str, Any] = {"method": LoRA(rank=4, layers=1), "data": {"padding_free": False}}
    more = {"epochs": 2.0, "max_steps": None}
    plain, _ = told(settings(**same, train=more, output=str(tmp_path / "plain")))
    before = graphs()
    kept, text = told(settings(**same, train=more | {"compile": True}))
    assert "were skipped for" in text and graphs() > before
    for a, b in zip(lines(plain.folder), lines(kept.folder), strict=True):
        for key in {"loss", "eval_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5)


def test_a_block_that_the_trunk_skipped_is_compiled_again() -> None:
    model = tiny("llama")
    graft.attach(model, LoRA(rank=4, layers=1))
    trunk = Trunk(model)
    blocks = Compiled(model, trunk.modules)
    ((block, _),) = blocks.blocks
    with blocks.running():
        compiled = block.__dict__["forward"]
        with trunk._skipping([block], None):
            assert block.__dict__["forward"] is not compiled
        assert block.__dict__["forward"] is compiled
    assert "forward" not in block.__dict__


def test_a_failing_compiler_is_an_error_and_leaves_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compiling, "_backend", broken)
    with pytest.raises(
        ConfigError, match=r"train\.compile: .*No working C\+\+ compiler found.*say train.compile: false$"
    ):
        told(settings(**PLAIN, train={"compile": True}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("quick", ["inductor"], indirect=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_inductor_itself() -> None:
    left, right = pair(num_hidden_layers=1)
    blocks = one(left)
    for shape in ((2, 11), (2, 13)):
        same_step(blocks, left, right, None, shape, [])
