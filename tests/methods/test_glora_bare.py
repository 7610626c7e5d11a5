"""GLoRA's C, D and E on bases without biases: refused where somebody asked for them, left out by default."""

from __future__ import annotations

from typing import Any

import pytest

import graft
from tiny import tiny


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"c": "vector"}, "c cannot be vector: no target has a bias; leave c out, or set add_bias=True"),
        ({"d": "constant"}, "d cannot be constant: no target has a bias; leave d out$"),
        ({"e": "constant"}, "e cannot be constant: no target has a bias; leave e out, or set add_bias=True"),
        ({"d": "constant", "add_bias": True}, "d cannot be constant"),
        ({"supernet": True, "choices": {"c": ("lora", "none")}}, "choices: c cannot be lora, none: no target has"),
    ],
)
def test_what_no_target_can_have_is_refused(fields: dict[str, Any], match: str) -> None:
    model = tiny("llama")
    with pytest.raises(graft.SiteError, match=match):
        graft.attach(model, graft.GLoRA(**fields))
    assert not hasattr(model, "adapters")


def test_what_needs_no_bias_is_taken_without_one() -> None:
    """The default, "none", what add_bias holds, and peft's form, which leaves the rest out."""
    for fields in ({}, {"c": "none", "d": "none", "e": "none"}, {"c": "vector", "e": "constant", "add_bias": True}):
        graft.attach(tiny("llama"), graft.GLoRA(**fields))  # type: ignore[arg-type]
    graft.attach(tiny("llama"), graft.GLoRA(supernet=True, choices={"a": ("lora",), "c": ("none",)}))
    graft.attach(tiny("llama"), graft.GLoRA(c="vector"), peft_compat=True)
    mixed = graft.attach(tiny("qwen2"), graft.GLoRA(c="vector", targets="all-linear"))
    assert mixed.at("model.layers.0.self_attn.q_proj").genes[2] == "vector"  # type: ignore[union-attr, index]
    assert mixed.at("model.layers.0.mlp.up_proj").genes[2] == "none"  # type: ignore[union-attr, index]
