"""docs/methods.md is what scripts/methods_table.py prints, and every method has its words and its page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import graft
import graft.methods
from examples import perturb
from graft.method import REGISTRY, Method
from tiny import tiny

ROOT = Path(__file__).parents[1]
METHODS = sorted(REGISTRY)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_table", ROOT / "scripts" / "methods_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_prints(script: ModuleType) -> None:
    found = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert found == script.table(), "run scripts/methods_table.py; its docstring says how"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_words_and_its_page(name: str, script: ModuleType) -> None:
    cls = REGISTRY[name]
    for key in ("place", "paper", "trains"):
        assert getattr(cls, key), f"{cls.__name__}: the constant {key} is empty"
    assert script.page_of(cls) is not None, f"docs/methods/{name}.md is missing"


def test_a_row(script: ModuleType) -> None:
    assert script.row(REGISTRY["lora"]) == (
        "| [`lora`](methods/lora.md) | `LoRA` | linear | yes | yes | `LORA` | r (I + O) per linear "
        "| Hu et al. 2021, arXiv 2106.09685 |"
    )
    cells = script.row(REGISTRY["top_layers"]).split(" | ")
    assert cells[2:6] == ["select", "yes", "no", "own"]
    assert script.row(REGISTRY["compose"]).split(" | ")[3] == "some"


@pytest.mark.parametrize("method", [graft.TopLayers(count=1), graft.FullFineTuning()], ids=lambda method: method.name)
def test_selections_merge_as_the_table_says(method: Method) -> None:
    """The contract has the other methods, which can be routed."""
    model = tiny("llama")
    adapter = graft.attach(model, method, "a")
    perturb(adapter)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
        graft.merge(model, "a")
        assert method.merges and torch.equal(model(ids).logits, expected)
        graft.unmerge(model)
        graft.use(model, None)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)


def test_a_method_without_a_page_is_seen(script: ModuleType) -> None:
    class Other(Method):
        """No paper."""

    Other.name = "other"  # set late: it shall not be registered
    assert script.page_of(Other) is None and "other" not in REGISTRY
    assert script.page_of(REGISTRY["mam"]).name == "compose.md"
