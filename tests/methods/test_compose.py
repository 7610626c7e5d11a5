"""Compose against its parts attached one by one, and the recipe MAM against the paper's count."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_counts import meta
from twins import adapted, close, data_of, far, lively

import graft
from examples import perturb
from graft.method import from_dict
from graft.train.steps import rates_of

PARTS: list[tuple[Any, ...]] = [
    (graft.LoRA(rank=4, head=False), graft.IA3(head=False)),
    (graft.LoRA(rank=4, head=False), graft.LoRA(rank=2, targets="all-linear", head=False)),
    (graft.Bottleneck(size=4, train_norms=False, head=False), graft.PrefixTuning(length=3, head=False)),
    (graft.PromptTuning(length=3), graft.LoRA(rank=4, head=False), graft.PromptTuning(length=2)),
]


def logits(model: Any, arch: str, entry: Any) -> torch.Tensor:
    data = data_of(arch)
    with graft.route(model, [entry] * 3):
        return model(**graft.prepare(model, data)).logits


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(part.name for part in parts))
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
def test_equals_its_parts_attached_one_by_one(arch: str, parts: tuple[Any, ...]) -> None:
    model = lively(arch)
    whole = perturb(graft.attach(model, graft.Compose(*parts, head=False), "whole"), 1, 0.3)
    for i, (part, leaf) in enumerate(zip(parts, whole.leaves, strict=True)):
        single = graft.attach(model, dataclasses.replace(part, head=False), f"p{i}")
        single.load_state_dict(leaf.state_dict())
        if any("prompt" not in other.name for other in parts):
            close(logits(model, arch, leaf.name), logits(model, arch, f"p{i}"))
    names = tuple(f"p{i}" for i in range(len(parts)))
    close(logits(model, arch, "whole"), logits(model, arch, names))
    if parts[0].name != "prompt_tuning":
        far(logits(model, arch, "whole"), logits(model, arch, None))
    assert whole.trainable == sum(model.adapters[name].trainable for name in names)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "prompt", [graft.PromptTuning(length=3), graft.PTuning(length=3, hidden=5)], ids=["pt", "ptuning"]
)
def test_a_prompt_beside_a_trained_embedding(prompt: Any, order: int, training: bool) -> None:
    """The copy gives the words, the prompt the slots, as when the two are attached one by one."""
    parts = (graft.LongLoRA(rank=2, group=4), prompt)[::order]
    model = lively("llama")
    whole = perturb(graft.attach(model, graft.Compose(*parts), "whole"), 1, 0.3)
    names = [part.name for part in parts]
    for name, part, leaf in zip(names, parts, whole.leaves, strict=True):
        graft.attach(model, part, name).load_state_dict(leaf.state_dict())
    model.train(training)
    outs = [logits(model, "llama", entry) for entry in ("whole", tuple(names), names[0], names[1], None)]
    close(outs[0], outs[1])
    for out in outs[2:]:
        mutual = min(out.shape[1], outs[0].shape[1])
        far(outs[0][:, -mutual:], out[:, -mutual:])
    for entry in ("whole", tuple(names)):
        logits(model, "llama", entry).square().mean().backward()
    singles = [p for name in names for p in model.adapters[name].parameters()]
    for mine, theirs in zip([p for leaf in whole.leaves for p in leaf.parameters()], singles, strict=True):
        close(mine.grad, theirs.grad)


def test_counts_of_papers() -> None:
    llama, bart = meta("Llama-2-7B"), meta("bart-large")
    both = graft.attach(llama, graft.Compose(graft.LoRA(rank=8), graft.PromptTuning(length=20)))
    assert both.trainable == both.saved == 4_194_304 + 81_920 == 4_276_224
    mam = graft.attach(bart, graft.MAM())
    assert mam.saved == 2_211_840 + 25_202_688 == 27_414_528
    assert mam.trainable > mam.saved  # the MLP that makes the prefix


def test_names_of_parts_and_routes_to_them() -> None:
    model = adapted("llama", graft.Compose(graft.LoRA(rank=4), graft.LoRA(rank=2), graft.IA3()))
    assert [leaf.name for leaf in model.adapters["a"].leaves] == ["a/lora", "a/lora-2", "a/ia3"]
    assert model.adapters.names == ("a",) and "a/lora" in model.adapters and "a/none" not in model.adapters
    with pytest.raises(graft.RouteError, match="part of a composed adapter; detach 'a'"):
        graft.detach(model, "a/lora")
    with pytest.raises(graft.RouteError, match="no adapter is named 'a/none'"):
        graft.use(model, "a/none")
    graft.use(model, "a/ia3")
    graft.detach(model, "a")
    assert not hasattr(model, "adapters")


def test_the_dial_turns_all_parts() -> None:
    model = adapted("llama", graft.Compose(graft.LoRA(rank=4), graft.LoRA(rank=2, targets=("ffn.up",))))
    model.adapters["a"].scale = 0.5
    model.adapters["a/lora"].scale = 0.5
    close(logits(model, "llama", "a"), _with(model, {"a/lora": 0.5, "a/lora-2": 0.5}))
    model.adapters["a"].scale = 1.0
    with pytest.raises(graft.RouteError, match="has no dial"):
        adapted("llama", graft.Compose(graft.LoRA(), graft.PromptTuning())).adapters["a"].scale = 0.5


def _with(model: Any, entry: dict[str, float]) -> torch.Tensor:
    model.adapters["a"].scale = 1.0
    return logits(model, "llama", entry)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((graft.IA3(), graft.IA3()), "both scale"),
        ((graft.LoRA(bias="lora_only"), graft.LoRA(bias="all")), "both train the bias"),
        ((graft.LoRA(modules_to_save=("c_attn",), targets=("ffn.up",)), graft.LoRA()), "trained whole by one of them"),
        (
            (graft.LoRA(modules_to_save=("transformer",), targets=("lm_head",)), graft.PromptTuning()),
            "trained whole by",
        ),
        ((graft.LoRA(), graft.TopLayers(count=1)), "top_layers cannot be a part"),
        ((graft.LoRA(), graft.Compose(graft.LoRA(), graft.IA3())), "compose cannot be a part"),
        ((graft.LoRA(), graft.Head()), "head cannot be a part"),
        ((graft.LoRA(),), "at least two parts"),
        ((graft.LoRA(), "ia3"), "parts are methods"),
    ],
)
def test_conflicts_are_refused(parts: tuple[Any, ...], why: str) -> None:
    model = lively("gpt2")
    with pytest.raises(graft.ConfigError, match=why):
        graft.attach(model, graft.Compose(*parts))
    assert not hasattr(model, "adapters")


def test_bad_settings() -> None:
    with pytest.raises(graft.ConfigError, match=r"one positive factor for each of the 2 parts, not \(1\.0, -2\.0\)"):
        graft.Compose(graft.LoRA(), graft.IA3(), rates=(1.0, -2.0))
    with pytest.raises(graft.ConfigError, match="to a part, not to the whole"):
        graft.Compose(graft.LoRA(), graft.IA3(), layers=2)
    with pytest.raises(
        graft.ConfigError, match=r"^method\.parts\[1\]\.ranc: LoRA has no such setting; did you mean 'rank'"
    ):
        from_dict({"method": "compose", "parts": [{"method": "ia3"}, {"method": "lora", "ranc": 3}]})
    with pytest.raises(graft.ConfigError, match=r"^method\.parts\[0\]: unknown method 'lra'"):
        graft.Compose(parts=[{"method": "lra"}, {"method": "ia3"}])
    with pytest.raises(graft.ConfigError, match=r"^method\.parts\[0\]: LoRA: rank"):
        graft.Compose(parts=[{"method": "lora", "rank": 0}, {"method": "ia3"}])
    with pytest.raises(graft.ConfigError, match="write Compose with its parts"):
        graft.MAM(layers=2)


def test_json_form() -> None:
    method = graft.Compose(graft.LoRA(rank=4), graft.PromptTuning(length=3), rates=(1.0, 100.0))
    data = json.loads(json.dumps(method.to_dict()))
    assert data == {
        "method": "compose",
        "parts": [{"method": "lora", "rank": 4}, {"method": "prompt_tuning", "length": 3}],
        "rates": [1.0, 100.0],
    }
    assert from_dict(data) == method and from_dict(json.loads(json.dumps(method.to_dict(full=True)))) == method


def test_each_part_has_its_rate() -> None:
    model = adapted("llama", graft.Compose(graft.LoRA(rank=4), graft.PromptTuning(length=3), rates=(1.0, 100.0)))
    rates = rates_of([model.adapters["a"]])
    prompt = {id(p) for p in model.adapters["a/prompt_tuning"].parameters()}
    assert rates == dict.fromkeys(prompt, 100.0) and prompt


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_a_folder_holds_each_part_as_a_folder_of_its_own(arch: str, tmp_path: Path) -> None:
    method = graft.Compose(graft.LoRA(rank=4), graft.PrefixTuning(length=3))
    model = adapted(arch, method)
    graft.save(model, "a", tmp_path / "a")
    back = lively(arch)
    loaded = graft.load(back, tmp_path / "a", "b")
    assert loaded.method == method and loaded.trainable == 0
    close(logits(back, arch, "b"), logits(model, arch, "a"))
    close(logits(back, arch, "b/lora"), logits(model, arch, "a/lora"))
    assert graft.files.check_saved(back, "b") < 1e-5
    alone = lively(arch)
    graft.load(alone, tmp_path / "a" / "lora", "c")
    close(logits(alone, arch, "c"), logits(model, arch, "a/lora"))
    assert json.loads((tmp_path / "a" / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    graft.save(model, "a", tmp_path / "a", overwrite=True)
    graft.load(lively(arch), tmp_path / "a", "b")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_reads_a_part(tmp_path: Path) -> None:
    import peft

    model = adapted("llama", graft.Compose(graft.LoRA(rank=4), graft.PromptTuning(length=3)))
    graft.save(model, "a", tmp_path / "a")
    twin = peft.PeftModel.from_pretrained(lively("llama"), str(tmp_path / "a" / "lora")).eval()
    close(twin(**data_of("llama")).logits, logits(model, "llama", "a/lora"))


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    model = adapted("llama", graft.Compose(graft.LoRA(rank=4), graft.IA3()))
    graft.save(model, "a", tmp_path / "a")
    other = adapted("llama", graft.LoRA(rank=3))
    config = tmp_path / "a" / "ia3" / "adapter_config.json"
    text = config.read_text()
    config.unlink()
    with pytest.raises(graft.AdapterFileError, match="a part of the composed adapter is missing"):
        graft.load(lively("llama"), tmp_path / "a")
    config.write_text(text)
    graft.save(other, "a", tmp_path / "a" / "lora", overwrite=True)
    back = lively("llama")
    with pytest.raises(graft.AdapterFileError, match="another lora than the composed adapter names"):
        graft.load(back, tmp_path / "a")
    assert not hasattr(back, "adapters")


def test_merging_parts_of_which_one_does_not_merge() -> None:
    model = adapted("llama", graft.Compose(graft.LoRA(rank=4), graft.PromptTuning(length=3)))
    with pytest.raises(graft.MergeError, match="compose"):
        graft.merge(model, "a")
    expected = logits(model, "llama", "a/lora")
    graft.merge(model, "a/lora")
    close(model(**data_of("llama")).logits, expected)
