"""The contract: what every routable method must do on every architecture. New methods are picked up by themselves.

Rows are compared at their real tokens: padding and slots may stand elsewhere in a batch of other rows.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from examples import CANNOT, ROUGH, first, instances, label, perturb, routable
from graft.method import CopyDelta, Method
from tiny import CONTRACT, EOS, PAD, batch, checkpointed, tiny

DECODERS = ("llama", "gpt2", "gemma2", "mixtral", "llama_tied", "mistral", "qwen2", "qwen3", "gemma3", "phi3")
DECODERS += ("gpt_neox", "opt")
CLASSIFIERS = ("bert", "roberta", "distilbert", "llama_cls", "gpt2_cls")
UNPACKED = ("opt",)  # its positions come from the mask, so packed segments would mix
WIDE = [arch for arch in (*DECODERS, *CLASSIFIERS) if arch not in CONTRACT]
FULL = ("llama", "bert", "t5")
"""Where variants of a method run too; elsewhere they are part of the wide grid."""
SLOW = ("intrinsic",)
"""Methods whose variants are part of the wide grid everywhere: each forward makes every tensor of the base anew."""
CASES = [
    (arch, method, () if first(method) or (arch in FULL and method.name not in SLOW) else pytest.mark.wide)
    for arch in CONTRACT
    for method in routable(arch)
]
CASES += [(arch, method, pytest.mark.wide) for arch in WIDE for method in routable(arch)]
each = pytest.mark.parametrize(
    ("arch", "method"),
    [pytest.param(arch, method, id=f"{arch}-{label(method)}", marks=marks) for arch, method, marks in CASES],
)
CLOSE = 1e-5


def close(actual: Tensor, expected: Tensor, part: float = 1.0) -> None:
    """Equal to a part of 1e-5 of the scale of the values."""
    scale = max(1.0, expected.abs().max().item())
    error = (actual - expected).abs().max().item()
    assert error <= part * CLOSE * scale, f"off by {error} at scale {scale}"


def inputs(arch: str) -> dict[str, Tensor]:
    """A right-padded batch of four rows; decoders without labels."""
    data = dict(batch(arch))
    if arch in DECODERS or arch in CLASSIFIERS:
        data.pop("labels", None)
    return data


def row_of(data: dict[str, Any], i: int) -> dict[str, Any]:
    """Row i alone, without its padding where tokens are the model's own."""
    row = {key: value[i : i + 1] for key, value in data.items()}
    real = row["attention_mask"][0].bool()
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        if key in row:
            row[key] = row[key][:, real]
    return row


def run(model: Any, rows: list[Any], data: dict[str, Tensor]) -> list[Tensor]:
    """Each row's logits at its real tokens, from one batch."""
    with graft.route(model, rows):
        ready = graft.prepare(model, data)
        logits = model(**ready).logits
    if logits.dim() == 2 or model.config.is_encoder_decoder:
        return list(logits)
    return [
        logits[i][ready["attention_mask"][i].bool()][-int(data["attention_mask"][i].sum()) :] for i in range(len(rows))
    ]


def attached(arch: str, method: Method, name: str = "a", seed: int = 1) -> Any:
    model = tiny(arch)
    perturb(graft.attach(model, method, name), seed)
    return model


@each
def test_starts_equal_to_the_base_where_it_says_so(arch: str, method: Method) -> None:
    model, data = tiny(arch), inputs(arch)
    before = model(**data).logits
    graft.attach(model, method, "a")
    after = torch.stack(run(model, ["a"] * 4, data)) if before.dim() == 2 else None
    if after is None:
        after = torch.cat(run(model, ["a"] * 4, data))
        before = torch.cat(run(model, [None] * 4, data))
    if method.starts_equal:
        close(after, before)
    else:
        assert (after - before).abs().max() > 0


@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name, archs in CANNOT.items() for arch in archs])
def test_refuses_by_name_what_it_cannot_take(name: str, arch: str) -> None:
    model = tiny(arch)
    for method in instances(name, arch):
        with pytest.raises((graft.SiteError, graft.ConfigError), match=CANNOT[name][arch]) as caught:
            graft.attach(model, method)
        assert "\n" not in str(caught.value)
    assert not hasattr(model, "adapters")


@each
def test_one_step_moves_only_the_bank(arch: str, method: Method) -> None:
    model = attached(arch, method)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("adapters.")}
    own = [p.detach().clone() for p in model.adapters["a"].parameters()]
    sum(logits.square().mean() for logits in run(model, ["a"] * 4, inputs(arch))).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name, p in model.named_parameters():
        if name in base:
            assert p.grad is None and torch.equal(p, base[name]), name
    assert any(not torch.equal(p, old) for p, old in zip(model.adapters["a"].parameters(), own, strict=True))


@each
def test_detach_is_bit_exact(arch: str, method: Method) -> None:
    model, data = tiny(arch), inputs(arch)
    keys, kind = list(model.state_dict()), type(model)
    before = model(**data).logits
    perturb(graft.attach(model, method, "a"))
    run(model, ["a"] * 4, data)
    graft.detach(model)
    assert torch.equal(model(**data).logits, before)
    assert list(model.state_dict()) == keys and type(model) is kind
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_rows_of_a_mixed_batch_equal_separate_runs(arch: str, method: Method, dtype: torch.dtype) -> None:
    """Forward and gradients, beside a LoRA, a prefix and the base in the same batch; in fp64 to 1e-6.

    Norms and softmax of many models compute in fp32 whatever the dtype, so fp64 cannot be held to more.
    """
    if arch in ("mixtral", "gemma2", "gemma3") and dtype == torch.float64:
        pytest.skip("grouped experts take no fp64; Gemma's norms and soft caps compute in fp32")
    model, data = attached(arch, method), inputs(arch)
    perturb(graft.attach(model, graft.LoRA(rank=3), "lora"), 2)
    perturb(graft.attach(model, graft.PrefixTuning(length=4), "prefix"), 3)
    model.to(dtype)
    part = 1.0 if dtype == torch.float32 else 0.1
    rows = ["a", "lora", None, ("prefix", "a")]
    mixed = run(model, rows, data)
    sum(out.square().mean() for out in mixed).backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.adapters.named_parameters()}
    model.zero_grad()
    for i, entry in enumerate(rows):
        alone = run(model, [entry], row_of(data, i))[0]
        close(mixed[i], alone, part)
        if alone.requires_grad:
            alone.square().mean().backward()
    for name, p in model.adapters.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        close(torch.zeros_like(p) if grads[name] is None else grads[name], expected, part)


@each
def test_generate_of_a_mixed_batch_equals_separate_runs(arch: str, method: Method) -> None:
    model = attached(arch, method)
    if not model.can_generate():
        pytest.skip(f"{arch} does not generate")
    perturb(graft.attach(model, graft.PrefixTuning(length=4), "prefix"), 3)
    data = {key: value for key, value in inputs(arch).items() if key in ("input_ids", "attention_mask")}
    if arch in DECODERS:
        data = left(data)
    rows = ["a", None, "prefix", ("a", "prefix")]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": PAD, "eos_token_id": EOS}
    options |= {"suppress_tokens": [PAD]}
    for extra in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        with graft.route(model, rows):
            mixed = model.generate(**graft.prepare(model, data), **options, **extra)
        for i, entry in enumerate(rows):
            with graft.route(model, [entry]):
                alone = model.generate(**graft.prepare(model, row_of(data, i)), **options, **extra)
            assert mixed[i, -5:].tolist() == alone[0, -5:].tolist(), (entry, extra)


def left(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch padded on the left."""
    width = data["input_ids"].shape[1]
    out = {key: torch.zeros_like(value) for key, value in data.items()}
    for i, mask in enumerate(data["attention_mask"]):
        n = int(mask.sum())
        for key in out:
            out[key][i, width - n :] = data[key][i, :n]
    return out


@each
def test_packed_equals_unpacked(arch: str, method: Method) -> None:
    if arch not in DECODERS or arch in UNPACKED:
        pytest.skip("packing is for decoders")
    model, data = attached(arch, method), inputs(arch)
    perturb(graft.attach(model, graft.PrefixTuning(length=4), "prefix"), 3)
    entries = ["a", None, ("prefix", "a")]
    rows = [row_of(data, i)["input_ids"][0] for i in range(len(entries))]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    batch = {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}
    segments = [(entry, len(row)) for entry, row in zip(entries, rows, strict=True)]
    ready = graft.prepare(model, batch, segments=segments)
    segments = ready.pop("segments")
    with graft.route(model, segments=segments):
        packed = model(**ready, use_cache=False).logits[0]
    for i, piece in enumerate(packed.split([length for _, length in segments])):
        close(piece[-len(rows[i]) :], run(model, [entries[i]], row_of(data, i))[0])


@each
def test_checkpointing_equals_none_even_if_the_route_has_changed(arch: str, method: Method) -> None:
    grads = []
    for on in (False, True):
        model, data = attached(arch, method), inputs(arch)
        perturb(graft.attach(model, graft.LoRA(rank=3), "lora"), 2)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "attention_dropout", "attn_dropout", "activation_dropout", "dropout_prob"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if on:
            checkpointed(model)
        out = torch.cat([row.flatten() for row in run(model, ["a", "lora", None, ("a", "lora")], data)])
        graft.use(model, None)
        out.square().sum().backward()
        grads.append({name: p.grad for name, p in model.adapters.named_parameters()})
    for name, expected in grads[0].items():
        assert (expected is None) == (grads[1][name] is None), name
        if expected is not None:
            close(grads[1][name], expected, ROUGH.get((method.name, arch), 1.0))


@each
def test_two_adapters_in_one_backward_equal_two_runs(arch: str, method: Method) -> None:
    model, data = attached(arch, method), inputs(arch)
    perturb(graft.attach(model, method, "b"), 5)
    torch.cat([out.flatten() for out in run(model, ["a", "b", "a", "b"], data)]).square().sum().backward()
    together = {name: p.grad.clone() for name, p in model.adapters.named_parameters() if p.grad is not None}
    assert together
    model.zero_grad()
    for i, entry in enumerate(["a", "b", "a", "b"]):
        run(model, [entry], row_of(data, i))[0].square().sum().backward()
    for name, p in model.adapters.named_parameters():
        if p.grad is not None:
            close(together[name], p.grad, ROUGH.get((method.name, arch), 1.0))


@each
def test_merged_equals_unmerged_and_unmerge_is_bit_exact(arch: str, method: Method) -> None:
    model, data = attached(arch, method), inputs(arch)
    if not method.merges:
        with pytest.raises(graft.MergeError, match=method.name):
            graft.merge(model, "a")
        return
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    nonlinear = any(isinstance(d, CopyDelta) and any(s.module.children()) for s, d in model.adapters["a"].items())
    for entry in ("a", {"a": 0.5}):
        if nonlinear and entry != "a":
            with pytest.raises(graft.MergeError, match="weight 1 only"):
                graft.merge(model, entry)
            continue
        expected = torch.cat([out.flatten() for out in run(model, [entry] * 4, data)])
        graft.merge(model, entry, tied="untie")
        merged = model(**data).logits
        with pytest.raises(graft.RouteError, match="merged"):
            graft.use(model, None)
        graft.unmerge(model)
        mask = data["attention_mask"].bool()
        if merged.dim() == 3 and not model.config.is_encoder_decoder:
            merged = torch.cat([row[m] for row, m in zip(merged, mask, strict=True)])
        close(merged.flatten(), expected)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@each
def test_a_deepcopy_is_independent(arch: str, method: Method) -> None:
    model, data = attached(arch, method), inputs(arch)
    run(model, ["a"] * 4, data)
    twin = copy.deepcopy(model)
    expected = torch.cat([out.flatten() for out in run(model, ["a"] * 4, data)])
    close(torch.cat([out.flatten() for out in run(twin, ["a"] * 4, data)]), expected)
    perturb(twin.adapters["a"], 9, 1.0)
    graft.detach(model)
    assert (torch.cat([out.flatten() for out in run(twin, ["a"] * 4, data)]) - expected).abs().max() > 1e-4


@each
def test_saved_base_has_no_trace_of_adapters(arch: str, method: Method, tmp_path: Any) -> None:
    model = attached(arch, method)
    expected = tiny(arch).state_dict()
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert saved and not any("adapters" in key for key in saved)
    assert all(torch.equal(value, expected[key]) for key, value in saved.items() if key in expected)
