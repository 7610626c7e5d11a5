"""peft's config objects of prompts and prefixes: on a model they make what `peft.get_peft_model` makes, or are refused.

peft reads the model into the object, so each use here takes a new one.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import graft
from tiny import tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
TASKS = {"llama": "CAUSAL_LM", "qwen3": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
TASKS |= {"bert": "SEQ_CLS", "llama_cls": "SEQ_CLS"}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": (peft.PromptTuningConfig, {}),
    "vocab": (peft.PromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 7}),
    "mlp by itself": (peft.PromptEncoderConfig, {}),
    "lstm": (peft.PromptEncoderConfig, {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3}),
    "prefix": (peft.PrefixTuningConfig, {}),
    "projected": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 7}),
    "projected by itself": (peft.PrefixTuningConfig, {"prefix_projection": True}),
}
DENIED = [
    ("llama", "prompt", {"num_layers": 3}, "num_layers = 3 does not fit LlamaForCausalLM, it is 2 there"),
    ("llama", "prompt", {"token_dim": 16}, "token_dim = 16 .* it is 32"),
    ("gpt2", "mlp", {"token_dim": 64}, "token_dim = 64 .* it is 32"),
    ("gpt2", "lstm", {"num_attention_heads": 8}, "num_attention_heads = 8 .* it is 4"),
    ("gpt2", "prefix", {"num_attention_heads": 2}, "num_attention_heads = 2 .* it is 4"),
    ("llama", "prefix", {"num_attention_heads": 3}, "num_attention_heads = 3 .* it is 2"),
    ("llama", "projected", {"token_dim": 8}, "token_dim = 8 .* it is 16"),
    ("bart", "prefix", {"num_layers": 4}, "num_layers = 4 .* it is 2"),
    ("t5", "prompt", {"num_transformer_submodules": 1}, "num_transformer_submodules = 1 .* it is 2"),
    ("bart", "mlp", {"num_transformer_submodules": 1}, "num_transformer_submodules = 1 .* it is 2"),
    ("t5", "prefix", {"num_transformer_submodules": 1}, "num_transformer_submodules = 1 .* it is 2"),
    ("gpt2", "prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules = 2 .* it is 1"),
    ("t5", "prompt", {"task_type": None}, "task_type = None .* it is SEQ_2_SEQ_LM"),
    ("llama", "prefix", {"task_type": "SEQ_2_SEQ_LM"}, "task_type = 'SEQ_2_SEQ_LM' .* encoder-decoders"),
]


def made(name: str, kind: str, **changes: Any) -> Any:
    config, settings = KINDS[kind]
    return config(**{"task_type": TASKS[name], "num_virtual_tokens": 3, **settings, **changes})


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of all that trains, sorted; what it is called differs."""
    return sorted(tuple(p.shape) for p in module.parameters() if p.requires_grad)


def same(name: str, ours: Any, theirs: Any) -> None:
    adapter = graft.attach(tiny(name), ours)
    assert adapter.peft_compat
    assert shapes(adapter) == shapes(peft.get_peft_model(tiny(name), theirs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TASKS)
def test_shapes_are_peft_s(name: str, kind: str) -> None:
    same(name, made(name, kind), made(name, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TASKS)
def test_an_object_that_peft_has_filled_in(name: str, kind: str) -> None:
    config = made(name, kind)
    twin = peft.get_peft_model(tiny(name), config)
    assert config.token_dim and config.num_layers == 2
    assert shapes(graft.attach(tiny(name), config)) == shapes(twin)


@pytest.mark.parametrize("kind", ["prefix", "projected by itself"])
def test_sizes_of_queries_are_those_of_a_prefix_too(kind: str) -> None:
    """peft replaces them by those of the keys, which are narrower in grouped-query attention."""
    given = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2, "num_transformer_submodules": 1}
    same("llama", made("llama", kind, **given), made("llama", kind, **given))
    assert shapes(graft.attach(tiny("llama"), made("llama", kind, **given)))[-1][-1] in (64, 16)


@pytest.mark.parametrize(("name", "kind", "changes", "message"), DENIED)
def test_what_contradicts_the_model_is_refused(name: str, kind: str, changes: dict[str, Any], message: str) -> None:
    model = tiny(name)
    with pytest.raises(graft.ConfigError, match=f"^{KINDS[kind][0].__name__}: {message}") as caught:
        graft.attach(model, made(name, kind, **changes))
    assert "\n" not in str(caught.value) and not hasattr(model, "adapters")


def test_a_projected_prefix_is_narrow_only_in_peft_s_form() -> None:
    """The paper's embedding is as wide as the model."""
    method = graft.PrefixTuning(length=3, hidden=7)
    assert graft.attach(tiny("llama"), method).shared.embedding.weight.shape == (3, 32)
    assert graft.attach(tiny("llama"), method, peft_compat=True).shared.embedding.weight.shape == (3, 16)
