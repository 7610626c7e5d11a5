"""Settings of methods, weights and dials of the wrong type are refused, not taken for something else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import graft
from graft.method import from_dict
from graft.routes import entry_of
from graft.settings import read_yaml
from tiny import tiny


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rslora": "false"}, "LoRA: rslora: input should be a valid boolean, not 'false'"),
        ({"rank": "8"}, "LoRA: rank: input should be a valid integer, not '8'"),
        ({"rank": 2.5}, "LoRA: rank: input should be a valid integer, not 2.5"),
        ({"rank": True}, "LoRA: rank: input should be a valid integer, not True"),
        ({"alpha": "16"}, "LoRA: alpha: input should be a valid number, not '16'"),
        ({"layers": "1"}, "LoRA: layers: "),
        ({"modules_to_save": "norm"}, "LoRA: modules_to_save: input should be a valid tuple, not 'norm'"),
        ({"targets": 3}, "LoRA: targets: "),
        ({"rank_pattern": {"q_proj": "4"}}, "LoRA: rank_pattern: "),
    ],
)
def test_a_setting_of_another_type(settings: dict[str, Any], why: str) -> None:
    for made in (lambda: graft.LoRA(**settings), lambda: from_dict({"method": "lora", **settings})):
        with pytest.raises(graft.ConfigError) as caught:
            made()
        assert str(caught.value).startswith(why) and "\n" not in str(caught.value)


def test_what_is_as_annotated_is_taken() -> None:
    method = graft.LoRA(alpha=8, layers=range(1, 3), targets=["q_proj"], rank_pattern={"q_proj": 4})  # type: ignore[arg-type]
    assert method.targets == ("q_proj",) and method.layers == range(1, 3)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_and_dials_are_finite(weight: float) -> None:
    with pytest.raises(graft.RouteError, match="give a finite number"):
        entry_of({"a": weight})
    adapter = graft.attach(tiny("llama"), graft.LoRA(rank=2), "a")
    with pytest.raises(graft.RouteError, match="give a finite number"):
        adapter.scale = weight


@pytest.mark.parametrize(
    ("text", "what", "why"),
    [
        ("methods: [lora]", "run", "with the key 'methods' it is a comparison, for `graft compare`, and not a run"),
        ("sources: []", "run", "with the key 'sources' it is a recipe, for `graft data`, and not a run"),
        ("sources: []", "comparison", "with the key 'sources' it is a recipe, for `graft data`, and not a comparison"),
        ("", "run", "expected keys such as base, not nothing: the file is empty"),
        ("- base", "run", "expected keys such as base, not list"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, text: str, what: str, why: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(graft.ConfigError) as caught:
        read_yaml(file, what, "base")
    assert str(caught.value) == f"{file}: {why}"


def test_a_recipe_is_read_where_a_run_or_a_recipe_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("sources: []")
    assert read_yaml(file, "run or recipe", "base or sources") == {"sources": []}
