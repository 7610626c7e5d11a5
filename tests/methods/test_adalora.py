"""AdaLoRA against s B diag(E) A by hand, and against peft's RankAllocator over a whole training."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_counts import meta
from transformers import TrainingArguments
from twins import adapted, close, copy_into, data_of, far, inner, lively, peft_twin

import graft
from graft.method import from_dict
from graft.methods.adalora import TRIPLET, AdaLoRADelta, cut, matrices
from tiny import batch, tiny

QV = ("attention.query", "attention.value")
NAMES = {"bert": ["query", "value"], "gpt2": ["c_attn"], "t5": ["q", "v"], "mt5": ["q", "v"]}
ARCHS = ["llama", "gpt2", "bert", "t5", "mt5", "bart"]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "bart"])
def test_adds_scaled_triplets_to_each_weight(arch: str) -> None:
    method = graft.AdaLoRA(rank=4, target_rank=2, alpha=6, head=False)
    model, data, hand = adapted(arch, method).double(), data_of(arch), lively(arch).double()
    with torch.no_grad():
        for site, delta in model.adapters["a"].items():
            assert isinstance(delta, AdaLoRADelta)
            assert delta.A.shape == (4, site.in_features) and delta.B.shape == (site.out_features, 4)
            change = 6 / (4 + 1e-5) * delta.B @ torch.diag(delta.E[:, 0]) @ delta.A
            close(delta.weight_delta().double(), change)
            weight = hand.get_submodule(site.path).weight
            weight += change.T if arch == "gpt2" else change
    far(model(**data).logits, lively(arch).double()(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_start() -> None:
    """A and B from N(0, 0.02), E zero; no triplet is cut yet."""
    torch.manual_seed(0)
    delta: Any = graft.attach(tiny("llama"), graft.AdaLoRA(rank=64)).at("model.layers.0.mlp.down_proj")
    assert abs(delta.A.std() / 0.02 - 1) < 0.05 and abs(delta.B.std() / 0.02 - 1) < 0.05 and not delta.E.any()
    assert delta.mask.all() and delta.count == 64


def test_penalty_is_the_mean_distance_of_all_matrices_from_orthogonal() -> None:
    adapter = adapted("llama", graft.AdaLoRA(rank=4, target_rank=2, targets=QV, gamma=0.7)).adapters["a"]
    distances = []
    for delta in matrices(adapter):
        for square in (delta.A @ delta.A.T, delta.B.T @ delta.B):
            distances.append((square - torch.eye(4)).square().sum().sqrt())
    close(sum(delta.penalty() for delta in matrices(adapter)), 0.7 * sum(distances) / 8)  # type: ignore[arg-type]


def test_budget_falls_by_a_cubic() -> None:
    method = graft.AdaLoRA(rank=6, target_rank=2, tinit=4, tfinal=10, steps=34)
    budgets = [method.budget(step, 34, 3) for step in (0, 4, 5, 9, 14, 19, 23, 24, 25, 33)]
    assert budgets == [18, 18, 6 + 10, 6 + 5, 6 + 1, 6, 6, 6, 6, 6]
    assert budgets[2:5] == [int(6 + 12 * (part / 20) ** 3) for part in (19, 15, 10)]


def test_cut_keeps_the_best_of_all_matrices() -> None:
    adapter = adapted("llama", graft.AdaLoRA(rank=4, target_rank=2, targets=QV)).adapters["a"]
    deltas = matrices(adapter)
    for i, delta in enumerate(deltas):
        for j, name in enumerate(TRIPLET):
            # A, E and B count alike: the mean over a triplet's row of A, its E, the mean over its column of B.
            score = torch.full((4,), 0.1 * i)
            score[3] += 10.0 * (i == j)
            getattr(delta, f"{name}_importance").copy_(score if name == "B" else score[:, None])
            getattr(delta, f"{name}_uncertainty").fill_(1.0)
    assert all(delta.E.ne(0).all() for delta in deltas)
    with torch.no_grad():
        cut(deltas, 16)
        assert all(delta.mask.all() for delta in deltas)
        cut(deltas, 7)
    best = [False, False, False, True]
    assert [delta.mask.tolist() for delta in deltas] == [best, best, best, [True] * 4]
    for delta in deltas:
        assert torch.equal(delta.E[:, 0] != 0, delta.mask)


def test_importance_of_a_value_without_a_gradient_is_zero() -> None:
    delta = matrices(adapted("llama", graft.AdaLoRA(rank=4, target_rank=2)).adapters["a"])[0]
    with torch.no_grad():
        delta.observe(0.5, 0.5)
        assert not delta.scores().any()
        delta.E.grad = torch.full_like(delta.E, 2.0)
        for _ in range(2):
            delta.observe(0.5, 0.25)
    now = (2 * delta.E).abs()  # Ibar: 1/2, 3/4 of it; Ubar: 3/4 * 1/2 of it, then 1/4 of that and 3/4 * 1/4 more
    close(delta.E_importance, 0.75 * now)
    close(delta.E_uncertainty, (0.375 / 4 + 0.1875) * now)


@pytest.mark.parametrize(("steps", "delta_t"), [(4, 1), (9, 5)])
def test_without_a_tfinal_the_last_step_reaches_the_target(steps: int, delta_t: int) -> None:
    """Else the cubic ends above it, and what was cut before has an E again."""
    method = graft.AdaLoRA(rank=12, target_rank=2, targets=QV, delta_t=delta_t)
    model, data = adapted("llama", method), data_of("llama")
    adapter = model.adapters["a"]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(**data).logits.square().mean().backward()
        optimizer.step()
        method.after_step(adapter, step, steps)
    assert sum(delta.count for delta in matrices(adapter)) == 2 * len(matrices(adapter))


def test_schedule_must_fit_into_the_training() -> None:
    adapter = graft.attach(tiny("llama"), graft.AdaLoRA(tinit=3, tfinal=4))
    adapter.method.begin(adapter, 8)
    with pytest.raises(graft.ConfigError, match="tinit 3 and tfinal 4 leave none of 7 steps"):
        adapter.method.begin(adapter, 7)
    with pytest.raises(graft.ConfigError, match="steps=20 do not fit into a training of 10"):
        graft.AdaLoRA(steps=20).begin(adapter, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_rank": 13}, r"target_rank must be from 1 to rank \(12\), not 13"),
        ({"target_rank": 0}, "target_rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"delta_t": 0}, "delta_t must be at least 1"),
        ({"tinit": -1}, "tinit"),
        ({"beta1": 1.0}, "beta1"),
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"alpha": float("inf")}, "alpha must be a finite number"),
        ({"steps": 10, "tinit": 5, "tfinal": 5}, "leave none of 10 steps"),
        ({"rank_pattern": {"x": [True]}}, "must be 12 booleans"),
        ({"rank_pattern": {"x": [1] * 12}}, "rank_pattern: input should be a valid boolean"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(graft.ConfigError, match=f"AdaLoRA: .*{message}"):
        graft.AdaLoRA(**settings)


def test_targets_that_it_cannot_take() -> None:
    with pytest.raises(graft.SiteError, match=r"c_attn: AdaLoRA adapts a fused linear whole; ask for attention\.qkv"):
        graft.attach(tiny("gpt2"), graft.AdaLoRA(targets=("attention.query",)))
    with pytest.raises(graft.SiteError, match="not Embedding"):
        graft.attach(tiny("llama"), graft.AdaLoRA(targets=("embedding",)))
    with pytest.raises(graft.SiteError, match=r"rank_pattern: 'nowhere' is none of the 14 targets"):
        graft.attach(tiny("llama"), graft.AdaLoRA(rank_pattern={"nowhere": [True] * 12}))
    method = graft.AdaLoRA(rank=2, target_rank=1, rank_pattern={"a": [True, False]})
    assert from_dict(json.loads(json.dumps(method.to_dict(full=True)))) == method


def test_counts() -> None:
    adapter = graft.attach(meta("mt0-large"), graft.AdaLoRA())
    assert adapter.trainable == adapter.saved == 13_718_592


# ---------------------------------------------------------------------------------------------------------- training


def arguments(folder: Path, steps: int, **more: Any) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 2, "learning_rate": 0.05, "max_steps": steps, "report_to": "none"}
    settings |= {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "save_steps": 3}
    return TrainingArguments(**{**settings, **more})


def trained(folder: Path, steps: int, resume: bool = False, **more: Any) -> Any:
    torch.manual_seed(3)
    model = lively("llama")
    graft.attach(model, graft.AdaLoRA(rank=4, target_rank=2, targets=QV, tinit=1, tfinal=2, delta_t=2), "a")
    rows = [{key: value[i] for key, value in batch("llama", rows=8).items()} for i in range(8)]
    trainer = graft.GraftTrainer(model, arguments(folder, steps, **more), train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
def test_resumed_training_equals_one_without_a_break(tmp_path: Path) -> None:
    """The last choice falls after the break, and needs the importance from before it."""
    whole = trained(tmp_path / "whole", 9)
    trained(tmp_path / "halves", 9, save_strategy="steps")
    for step in (6, 9):
        shutil.rmtree(tmp_path / "halves" / f"checkpoint-{step}")
    again = trained(tmp_path / "halves", 9, resume=True)
    for delta, expected in zip(matrices(again.adapters["a"]), matrices(whole.adapters["a"]), strict=True):
        assert delta.mask.tolist() == expected.mask.tolist()
        assert torch.equal(delta.E, expected.E) and torch.equal(delta.A_importance, expected.A_importance)
        assert torch.equal(delta.E[:, 0] != 0, delta.mask)
    assert sum(int(delta.mask.sum()) for delta in matrices(again.adapters["a"])) == 4 * 2
    folder = graft.save(again, "a", tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == again.adapters["a"].saved == 4 * 65 * 2 - 2 * 16 * 2
    assert not any("importance" in key or "mask" in key for key in tensors)


def test_a_folder_saved_half_way_loses_nothing(tmp_path: Path) -> None:
    """A triplet whose E has come back since the last choice is in the file."""
    model, data = adapted("llama", graft.AdaLoRA(rank=4, target_rank=2, targets=QV)), data_of("llama")
    for delta in matrices(model.adapters["a"]):
        delta.mask.copy_(torch.tensor([True, False, False, True]))
        delta.E.data[2] = 0.0
    graft.save(model, "a", tmp_path / "a")
    again = lively("llama")
    adapter = graft.load(again, tmp_path / "a", "a", trainable=True)
    assert [delta.mask.tolist() for delta in matrices(adapter)] == [[True, True, False, True]] * 4
    far(again(**data).logits, lively("llama")(**data).logits)
    close(again(**data).logits, model(**data).logits)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        (again(**data).logits.square().mean() + sum(delta.penalty() for delta in matrices(adapter))).backward()
        optimizer.step()
        for delta in matrices(adapter):  # what a file has lost stays out
            assert not delta.E[2] and delta.E[1]
        adapter.method.after_step(adapter, step, 4)


# ------------------------------------------------------------------------------------------------------------- peft


def config_of(arch: str, **settings: Any) -> Any:
    import peft

    names = {"target_modules": NAMES.get(arch, ["q_proj", "v_proj"])}
    schedule = {"total_step": 30, "tinit": 4, "tfinal": 6, "deltaT": 3}
    return peft.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "lora_alpha": 6, **names, **schedule, **settings})


def pairs_of(model: Any, other: Any) -> list[tuple[Any, Any]]:
    """Our parameters beside peft's."""
    found = []
    for site, delta in model.adapters["a"].items():
        module: Any = inner(other, site.path)
        found += [(getattr(delta, name), getattr(module, f"lora_{name}")["default"]) for name in TRIPLET]
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_whole_training_equals_peft(arch: str) -> None:
    """Loss, budgets, choices, values and logits at each of 30 steps."""
    other = peft_twin(arch, config_of(arch)).double().train()
    model = lively(arch).double().train()
    for module in [*model.modules(), *other.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    adapter = graft.attach(model, config_of(arch), "a")
    adapter.double()
    method: Any = adapter.method
    pairs = pairs_of(model, other)
    assert len(pairs) == sum(p.requires_grad for p in other.parameters()) == sum(1 for _ in adapter.parameters())
    for own, their in pairs:
        copy_into(their, own)
    optimizers = [torch.optim.AdamW(params, lr=0.05) for params in zip(*pairs, strict=True)]
    method.begin(adapter, 30)
    data = data_of(arch, labels=True)
    allocator, sizes = other.base_model.rankallocator, set()
    for step in range(30):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(**data).loss + sum(delta.penalty() for delta in matrices(adapter))
        theirs = other.base_model(**data).loss  # peft adds the penalty here, and not without a task_type outside
        assert abs(loss.item() - theirs.item()) < 1e-6
        loss.backward()
        theirs.backward()
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(adapter, step, 30)
        other.base_model.update_and_allocate(step)
        assert method.budget(step, 30, len(matrices(adapter))) == allocator.budget_schedule(step)[0]
        pattern = other.peft_config["default"].rank_pattern or {}
        masks = {f"{site.path}.lora_E.default": delta.mask.tolist() for site, delta in adapter.items()}
        assert pattern == {} or masks == pattern
        sizes.add(sum(sum(mask) for mask in masks.values()))
        for own, their in pairs:
            close(own, their, 1e-8)
    first, last = 4 * len(matrices(adapter)), 2 * len(matrices(adapter))
    assert max(sizes) == first and min(sizes) == last and len(sizes) > 3
    close(model.eval()(**data).logits, other.eval()(**data).logits, 1e-8)


def cut_twin(arch: str) -> Any:
    """A peft model after a training: moved values, half of the triplets cut, one matrix without any."""
    other, generator = peft_twin(arch, config_of(arch)), torch.Generator().manual_seed(5)
    pattern: dict[str, list[bool]] = {}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            if "lora_E" in name:
                count = len(pattern)
                mask = [bool((count + i) % 2) and count != 1 for i in range(4)] if count != 2 else [True] * 4
                pattern[name.removeprefix("base_model.model.")] = mask
                parameter[~torch.tensor(mask)] = 0.0
    other.peft_config["default"].rank_pattern = pattern
    return other


def read_by_peft(arch: str, folder: Path) -> Any:
    import peft

    # Not for inference: peft's own forward then fails on a batch with labels (it has no trainable_adapter_name).
    return peft.PeftModel.from_pretrained(lively(arch), folder, is_trainable=True).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ARCHS)
def test_folders_of_peft_and_back(arch: str, tmp_path: Path) -> None:
    other, data = cut_twin(arch), data_of(arch)
    expected = other(**data).logits
    other.save_pretrained(tmp_path / "theirs")
    model = lively(arch)
    adapter = graft.load(model, tmp_path / "theirs", "a")
    assert adapter.peft_compat and adapter.method.rank == 4 and adapter.method.tinit == 4  # type: ignore[attr-defined]
    assert {0, 2, 4} >= {delta.count for delta in matrices(adapter)} >= {0, 2}
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, expected)
    graft.save(model, "a", tmp_path / "ours", form="peft")
    close(read_by_peft(arch, tmp_path / "ours")(**data).logits, expected)
    theirs, ours = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("theirs", "ours"))
    assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in ours.items()}
    for card in (True, False):
        if not card:
            (tmp_path / "ours" / "graft.json").unlink()
        again = lively(arch)
        graft.load(again, tmp_path / "ours", "b")
        assert torch.equal(again(**data).logits, model(**data).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ARCHS)
def test_attach_takes_a_config_of_peft(arch: str) -> None:
    model, config = tiny(arch), config_of(arch)
    adapter = graft.attach(model, config)
    trained = sum(p.numel() for p in peft_twin(arch, config).parameters() if p.requires_grad)
    assert adapter.peft_compat and adapter.trainable == trained
    assert adapter.method.steps == 30 and adapter.method.delta_t == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": False}, "init_lora_weights"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"use_rslora": True}, "use_rslora"),
        ({"target_r": 5}, "target_rank"),
    ],
)
def test_configs_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of("llama", **settings)
    with pytest.raises(graft.ConfigError, match=message):
        graft.attach(tiny("llama"), config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pattern: {**pattern, "model.nowhere.lora_E": [True] * 4}, "'model.nowhere' is none of the 4 targets"),
        (lambda pattern: {**pattern, "model.lora_A": [True] * 4}, "does not name a lora_E"),
        (lambda pattern: {key: mask[:3] for key, mask in pattern.items()}, "must be 4 booleans"),
        (lambda pattern: {key: [not each for each in mask] for key, mask in pattern.items()}, "has shape"),
        (lambda pattern: {}, "has shape"),
    ],
)
def test_a_folder_with_a_wrong_rank_pattern(change: Any, message: str, tmp_path: Path) -> None:
    cut_twin("llama").save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rank_pattern": change(config["rank_pattern"])}))
    model = lively("llama")
    with pytest.raises(graft.AdapterFileError, match=message):
        graft.load(model, tmp_path / "a", "a")
    assert not hasattr(model, "adapters")
