"""No graph is built below the first block that an adapter acts in, however the model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

import graft
from graft import roles
from tiny import batch, checkpointed, tiny

FOUR = {"llama": {"num_hidden_layers": 4}, "bert": {"num_hidden_layers": 4}, "gpt2": {"n_layer": 4}}
TOP = [("decoder", 2), ("decoder", 3)]
CASES: dict[str, tuple[str, Any, list[tuple[str, int]]]] = {
    "lora": ("llama", graft.LoRA(rank=2, layers=2), TOP),
    "conv1d": ("gpt2", graft.LoRA(rank=2, layers=2), TOP),
    "encoder": ("bert", graft.LoRA(rank=2, layers=2), [("encoder", 2), ("encoder", 3)]),
    "ia3": ("llama", graft.IA3(layers=2), TOP),
    "llama_adapter": ("llama", graft.LlamaAdapter(layers=2), TOP),
    "prefix": ("llama", graft.PrefixTuning(length=2, layers=2), TOP),
    "bottleneck": ("llama", graft.Bottleneck(layers=2), TOP),
    "top_layers": ("llama", graft.TopLayers(count=2), TOP),
    "t5_decoder": ("t5", graft.LoRA(rank=2, targets=r"decoder\..*\.(q|v)"), [("decoder", 0), ("decoder", 1)]),
    "bart_decoder": (
        "bart",
        graft.LoRA(rank=2, targets=r"model\.decoder\..*\.v_proj"),
        [("decoder", 0), ("decoder", 1)],
    ),
    "t5_top_of_decoder": ("t5", graft.LoRA(rank=2, targets=r"decoder\.block\.1\..*\.(q|v)"), [("decoder", 1)]),
    "bart_top": ("bart", graft.LoRA(rank=2, layers=1), [("encoder", 1), ("decoder", 0), ("decoder", 1)]),
}


def watched(model: nn.Module) -> dict[tuple[str, int], bool]:
    """Filled by forwards, recomputed ones too: whether the output of each block has a graph."""
    found: dict[tuple[str, int], bool] = {}

    def note(key: tuple[str, int], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found[key] = found.get(key, False) or hidden.requires_grad

    for stack, blocks in roles.blocks(model).items():
        for i, (_, block) in enumerate(blocks):
            block.register_forward_hook(lambda _m, _a, output, key=(stack, i): note(key, output))
    return found


def built(arch: str, method: Any) -> nn.Module:
    model = tiny(arch, **FOUR.get(arch, {}))
    graft.use(model, graft.attach(model, method).name)
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("how", ["plain", "inputs", "checkpointed", "both"])
@pytest.mark.parametrize("case", CASES)
def test_blocks_below_have_no_graph(case: str, how: str) -> None:
    arch, method, expected = CASES[case]
    gradients = []
    for way in ("plain", how):
        model = built(arch, method)
        if way in ("checkpointed", "both"):
            checkpointed(model, use_reentrant=False)
        if way in ("inputs", "both"):
            model.enable_input_require_grads()
        found = watched(model)
        torch.manual_seed(0)
        model(**batch(arch)).loss.backward()
        assert [key for key, graph in found.items() if graph] == expected
        gradients.append([p.grad for p in model.adapters["default"].parameters() if p.grad is not None])
    assert gradients[0]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_the_trainer(checkpointing: bool, tmp_path: Path) -> None:
    model = built("bart", CASES["bart_decoder"][1])
    found, data = watched(model), batch("bart")
    rows = [{key: value[i] for key, value in data.items()} for i in range(4)]
    if checkpointing:
        checkpointed(model, use_reentrant=False)
    quiet: Any = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, **quiet, dataloader_pin_memory=False)
    graft.GraftTrainer(model, args, train_dataset=rows).train()
    assert found and [key for key, graph in found.items() if graph] == [("decoder", 0), ("decoder", 1)]


def test_a_graph_that_somebody_wants_is_built() -> None:
    """Embeddings that train, adapters there, inputs that were given, and what is further down in a route of several."""
    data = batch("llama")
    for method in (
        graft.LoRA(rank=2, layers=1, modules_to_save=("embed_tokens",)),
        graft.PromptTuning(length=2),
        graft.LoRA(rank=2, targets=("embedding",), init="random"),
    ):
        model = built("llama", method)
        graft.use(model, ["default", graft.attach(model, graft.LoRA(rank=2, layers=1), "top").name])
        found = watched(model)
        model(**graft.prepare(model, data)).loss.backward()
        assert all(found.values()) and all(p.grad is not None for p in model.adapters["default"].parameters())
    model = built("llama", graft.LoRA(rank=2, layers=1))
    given = model.get_input_embeddings()(data["input_ids"]).detach().requires_grad_(True)
    model(inputs_embeds=given, labels=data["labels"]).loss.backward()
    assert given.grad is not None and given.grad.norm() > 0
    model.get_input_embeddings().weight.requires_grad_(True)
    model(**data).loss.backward()
    assert model.get_input_embeddings().weight.grad.norm() > 0


def test_the_first_layer_needs_no_input_gradient() -> None:
    """Checkpointing lets embeddings give gradients; all-linear adapters do not ask for them."""
    model = built("llama", graft.LoRA(rank=2, targets="all-linear"))
    checkpointed(model, use_reentrant=False)
    model.enable_input_require_grads()
    outputs, reached = [], []
    model.get_input_embeddings().register_forward_hook(lambda _m, _a, output: outputs.append(output))
    loss = model(**batch("llama")).loss
    assert outputs[0].requires_grad
    outputs[0].register_hook(reached.append)
    loss.backward()
    assert not reached
