"""The node for a low-rank sum against plain operations: the same numbers, less kept, and where it stays away."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import graft
from graft.fast import low_rank
from tiny import batch, checkpointed, tiny

ALL = graft.LoRA(rank=4, init="random", targets="all-linear")
METHODS = {
    "lora": ALL,
    "parts": graft.LoRA(rank=4, init="random", alpha=3, targets=("attention.query", "attention.value")),
    "biases": graft.LoRA(rank=4, init="random", bias="lora_only", lora_bias=True, targets="all-linear"),
    "pissa": graft.LoRA(rank=4, init="pissa", rslora=True, targets="all-linear"),
    "lora_fa": graft.LoRAFA(rank=4, init="random", targets="all-linear"),
    "vera": graft.VeRA(rank=8, targets="all-linear"),
    "tied_lora": graft.TiedLoRA(rank=4),
    "multi_lora": graft.MultiLoRA(rank=4),
    "adalora": graft.AdaLoRA(rank=4, target_rank=2, targets="all-linear"),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The linears that the node has taken."""
    found: list[nn.Module] = []
    add = low_rank.add

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        found.append(module)
        return add(module, *args, **kwargs)

    monkeypatch.setattr(low_rank, "add", counted)
    return found


def trained(arch: str, method: Any, **overrides: Any) -> nn.Module:
    """A tiny model with one adapter in use, every parameter of it off its start, in training without dropout."""
    model = tiny(arch, **overrides)
    graft.use(model, graft.attach(model, method).name)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.adapters.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients(model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, and the gradient of everything that trains."""
    model.zero_grad()
    torch.manual_seed(11)
    loss = model(**data).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(new: dict[str, Tensor], old: dict[str, Tensor], floor: float = 1e-2) -> dict[str, float]:
    """How far each gradient is off, of its norm or of `floor` times the largest: a key's bias has only rounding."""
    assert new.keys() == old.keys()
    norms = {name: value.double().norm() for name, value in old.items()}
    least = floor * max(norms.values())
    return {name: float((new[name] - old[name]).double().norm() / max(norms[name], least)) for name in old}


def equal(new: dict[str, Tensor], old: dict[str, Tensor], within: float = 1e-5, floor: float = 1e-2) -> None:
    assert max(errors(new, old, floor).values()) <= within


def both(model: nn.Module, data: dict[str, Tensor], calls: list[nn.Module]) -> tuple[dict[str, Tensor], ...]:
    """Gradients with the node and without it."""
    calls.clear()
    new = gradients(model, data)
    assert calls
    calls.clear()
    with low_rank.plain():
        old = gradients(model, data)
    assert not calls and sum(value.norm() > 0 for value in old.values()) > 2
    return new, old


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_plain_operations(arch: str, method: str, calls: list[nn.Module]) -> None:
    """To 1e-8 in double precision; in fp32 to 1e-5, or twice as far as plain fp32 is from double precision (T5)."""
    model, data = trained(arch, METHODS[method]), batch(arch)
    new, old = both(model, data, calls)
    exact_new, exact_old = both(model.double(), data, calls)
    equal(exact_new, exact_old, 1e-8, 1e-6)
    rounding = errors({name: old[name].double() for name in old}, exact_old)
    assert all(error <= max(1e-5, 2 * rounding[name]) for name, error in errors(new, old).items())


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dropped", [False, True])
def test_first_and_second_derivatives(kind: type[nn.Module], dropped: bool) -> None:
    """By finite differences, in double precision; the sum by its formula."""
    torch.manual_seed(0)
    module = (nn.Linear(3, 5) if kind is nn.Linear else Conv1D(5, 3)).double().requires_grad_(False)
    shapes = [(2, 2, 3), (2, 3), (5, 2), (2, 2, 3)]
    x, A, B, z = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in shapes)

    def summed(x: Tensor, A: Tensor, B: Tensor, z: Tensor) -> Tensor:
        return low_rank.add(module, x, module(x), A, B, 1.5, z if dropped else None)

    expected = module(x) + 1.5 * (z if dropped else x) @ A.T @ B.T
    torch.testing.assert_close(summed(x, A, B, z), expected)
    inputs = (x, A, B, z) if dropped else (x, A, B, z.detach())
    assert torch.autograd.gradcheck(summed, inputs)
    assert torch.autograd.gradgradcheck(summed, inputs)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_under_checkpointing(arch: str, calls: list[nn.Module]) -> None:
    model = trained(arch, ALL)
    plain = gradients(model, batch(arch))
    checkpointed(model, use_reentrant=False)
    for found in both(model, batch(arch), calls):
        equal(found, plain)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [graft.LoRA, graft.VeRA, graft.AdaLoRA])
def test_dropout_draws_as_plain_operations_do(arch: str, method: Any, calls: list[nn.Module]) -> None:
    model = trained(arch, method(dropout=0.4))
    new, old = both(model, batch(arch), calls)
    equal(new, old)
    checkpointed(model, use_reentrant=False)
    for found in both(model, batch(arch), calls):
        equal(found, old)


def test_in_bf16(calls: list[nn.Module]) -> None:
    """As near to the gradients in fp32 as plain operations are: in the median a twentieth, of 8 bits of precision."""
    model, data = trained("llama", ALL), batch("llama")
    exact = gradients(model, data)
    for module in (model.model, model.lm_head):
        module.bfloat16()
    new, old = (sorted(errors(found, exact).values()) for found in both(model, data, calls))
    middle = len(new) // 2
    assert new[middle] <= 1.25 * old[middle] and new[-1] <= 1.25 * old[-1] and new[middle] < 0.1
    assert all(p.grad.dtype == torch.float32 for p in model.adapters.parameters() if p.grad is not None)


@pytest.mark.parametrize("weight", [0.5, -2.0])
def test_weights_and_no_gradient(weight: float, calls: list[nn.Module]) -> None:
    model, data = trained("gpt2", METHODS["biases"]).eval(), batch("gpt2")
    with graft.route(model, [{"default": weight}] * 4):
        equal(*both(model, data, calls))
        with torch.inference_mode():
            new = model(**data).logits
            with low_rank.plain():
                torch.testing.assert_close(new, model(**data).logits)


def test_what_is_kept() -> None:
    """x once for q, k, v and once for gate, up; of the outputs and of LoRA-FA's inputs nothing."""
    one = {"num_hidden_layers": 1}
    kept = {name: kept_by(trained("llama", METHODS[name], **one)) for name in ("lora", "lora_fa")}
    with low_rank.plain():
        plain = kept_by(trained("llama", METHODS["lora"], **one))
    assert [len(each) for each in kept["lora"]] == [7, 4]
    assert kept["lora_fa"] == ([], set())
    assert len(plain[0]) >= 7


def kept_by(model: nn.Module) -> tuple[list[str], set[int]]:
    """The sites whose node keeps their input, and the inputs' addresses."""
    found: list[str] = []
    places: set[int] = set()
    inputs: dict[str, Tensor] = {}
    adapter = model.adapters["default"]
    for site, _ in adapter.items():
        module, path = site.module, site.path

        def note(_: Any, args: tuple[Tensor], path: str = path) -> None:
            inputs[path] = args[0]

        module.register_forward_pre_hook(note)

    def pack(tensor: Tensor) -> Tensor:
        here = list(inputs)[-1] if inputs else ""
        inside = tensor.shape[-1:] == inputs[here].shape[-1:] if here else False
        if inside and tensor.data_ptr() == inputs[here].data_ptr() and here not in found:
            found.append(here)
            places.add(tensor.data_ptr())
        return tensor

    hooks: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        hooks.append(saved_tensors_hooks(pack, lambda tensor: tensor))
        hooks[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        hooks.pop().__exit__(None, None, None)

    for site, _ in adapter.items():
        site.module.register_forward_pre_hook(enter)
        site.module.register_forward_hook(leave)
    output = model(**batch("llama"))  # its graph must live while addresses are compared
    assert output.loss.requires_grad
    return found, places


class Subclass(nn.Linear):
    """Of a class that may compute anything."""


def test_where_it_stays_away(calls: list[nn.Module]) -> None:
    """Each case by plain operations, with their numbers."""
    data = batch("llama")
    expected = gradients(trained("llama", METHODS["parts"]), data)
    assert len(calls) == 4
    for name in ("weight", "forward", "class", "autocast", "compile"):
        model = trained("llama", METHODS["parts"])
        query = model.model.layers[1].self_attn.q_proj
        calls.clear()
        run = model
        if name == "weight":
            query.weight.requires_grad_(True)
        elif name == "forward":
            query.forward = query.forward
        elif name == "class":
            query.__class__ = Subclass
        elif name == "compile":
            run = torch.compile(model, backend="eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            found = gradients(run, data)
        found = {key.removeprefix("_orig_mod."): value for key, value in found.items()}
        found.pop("model.layers.1.self_attn.q_proj.weight", None)
        assert query not in calls and len(calls) == (0 if name in ("autocast", "compile") else 3), name
        equal(found, expected, 5e-2 if name == "autocast" else 1e-5)


def test_the_output_is_never_changed_under_other_hooks(calls: list[nn.Module]) -> None:
    model, data = tiny("llama"), batch("llama")
    query, seen = model.model.layers[1].self_attn.q_proj, []
    query.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    graft.use(model, graft.attach(model, METHODS["lora"]).name)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: None)  # after ours
    model(**data)
    (x, y) = seen[0]
    torch.testing.assert_close(y, F.linear(x, query.weight))
    assert query not in calls and len(calls) == 13


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # forward-mode's own import
def test_transforms_and_tangents() -> None:
    """torch.func and forward-mode gradients go through plain operations."""
    model, data = trained("llama", METHODS["parts"]).eval(), batch("llama")
    expected = gradients(model, data)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, kwargs=data).loss

    found = torch.func.grad(loss)(values)
    equal(found, {name: expected[name] for name in found})
    linear = model.model.layers[0].self_attn.q_proj
    x, along = torch.randn(3, 32), torch.randn(3, 32)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, along))).tangent
    torch.testing.assert_close(tangent, linear(along) - linear(torch.zeros(3, 32)))


def test_no_second_derivative_through_a_frozen_pair() -> None:
    """What is not kept is asked for by name, never taken as zero."""
    model = copy.deepcopy(trained("llama", METHODS["lora_fa"]))
    loss = model(**batch("llama")).loss
    with pytest.raises(RuntimeError, match="frozen A"):
        torch.autograd.grad(loss, list(model.adapters.parameters()), create_graph=True)
