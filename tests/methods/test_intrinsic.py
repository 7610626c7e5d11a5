"""Intrinsic dimension against dense algebra: the projection, the whole model, and the gradient P^T g."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.linalg import hadamard
from test_counts import meta
from torch import Tensor, nn
from twins import adapted, close, data_of, far, lively

import graft
from examples import perturb
from graft.errors import AdapterFileError
from graft.method import from_dict
from graft.methods.fastfood import Projection, bells, key_of, permutation, signs, words
from tiny import tiny

# Half as wide as the tiny models: the dense transforms of a 99 x 32 embedding have 16 million values.
_NARROW = {"hidden_size": 16, "intermediate_size": 24}
NARROW: dict[str, dict[str, int]] = dict.fromkeys(("llama", "bert", "gemma3", "qwen3"), _NARROW)
NARROW |= {"gpt2": {"n_embd": 16}, "opt": {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16}}
NARROW |= {arch: {"d_model": 16, "d_ff": 24} for arch in ("t5", "mt5")}
NARROW["bart"] = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}


def intrinsic(size: int = 120, **options: Any) -> graft.IntrinsicDimension:
    return graft.IntrinsicDimension(size=size, **options)


# -------------------------------------------------------------------------------------------------- the generator


def test_known_answers() -> None:
    """splitmix64's published values, and ours: a file must mean the same tomorrow and on every machine."""
    assert [word % 2**64 for word in words(0, 0, 2).tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [word % 2**64 for word in words(1234567, 0, 4).tolist()] == published
    assert words(1234567, 2, 2).tolist() == words(1234567, 0, 4)[2:].tolist()
    key = key_of(3, "model.norm.weight", "bell")
    assert key == -8080340421949456377
    assert signs(key, 8).tolist() == [1, -1, 1, -1, 1, -1, 1, -1]
    assert bells(key, 8).tolist() == [347, -407, -130, 406, 302, -211, 449, 183]
    assert permutation(key, 8).tolist() == [3, 5, 1, 7, 2, 0, 4, 6]


def test_signs_bells_and_permutations_look_random() -> None:
    size = 2**18
    many = bells(5, size).double()
    assert abs(many.mean() / many.std()) < 0.01 and abs(many.std() / math.sqrt(16 * (256**2 - 1) / 12) - 1) < 0.01
    assert abs(((many - many.mean()) / many.std()).pow(4).mean() - 3) < 0.1
    assert abs(signs(5, size).double().mean()) < 0.01
    order = permutation(5, size)
    assert torch.equal(order.sort().values.long(), torch.arange(size))
    assert abs(torch.corrcoef(torch.stack([order.double(), torch.arange(size).double()]))[0, 1]) < 0.01
    keys = {key_of(seed, name, use) for seed in (0, 1) for name in ("a", "b") for use in ("sign", "bell")}
    assert len(keys) == 8


# -------------------------------------------------------------------------------------------------- the projection


@functools.cache
def transform(length: int) -> Tensor:
    return torch.tensor(hadamard(length)).double()


def dense(made: Projection, size: int) -> Tensor:
    """P as a (D, d) matrix, by the formula H G Pi H B."""
    length, H = len(made.order), transform(len(made.order))
    signed = torch.zeros(length, size, dtype=torch.float64)
    signed[range(len(made.sign)), range(len(made.sign))] = made.sign.double()
    mixed = made.bell.double()[:, None] * (H @ signed)[made.order.long()]
    norm = math.sqrt(length * made.bell.double().square().sum()) * math.sqrt(made.numel / length)
    return (H[: made.numel] @ mixed) / norm


@pytest.mark.parametrize(("numel", "size"), [(50, 20), (64, 64), (1, 1), (33, 5), (10, 40), (2, 7), (1000, 300)])
def test_the_projection_is_the_formula_s(numel: int, size: int) -> None:
    """Also where there are more coordinates than places: the first ones count then."""
    made = Projection(0, "w", numel, size).double()
    x = torch.randn(size, dtype=torch.float64)
    assert len(made.order) == 2 ** math.ceil(math.log2(numel))
    close(made(x), dense(made, size) @ x, 1e-12)
    if size > len(made.order):
        assert torch.equal(made(x), made(torch.cat([x[: len(made.order)], torch.zeros(size - len(made.order))])))


@pytest.mark.parametrize(("numel", "size"), [(50, 20), (10, 40), (1, 3)])
def test_gradcheck(numel: int, size: int) -> None:
    made = Projection(2, "w", numel, size)
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, (x,))


@pytest.mark.parametrize("numel", [1000, 1024, 4097, 20_000, 100_000])
def test_lengths_are_kept(numel: int) -> None:
    for seed in range(4):
        x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
        assert abs(Projection(seed, "w", numel, 200)(x).norm() / x.norm() - 1) < 0.1


# -------------------------------------------------------------------------------------------------- the whole model


def moved(arch: str, adapter: Any, *, grad: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A fresh base, and all of its tensors with the changes added, by the dense projections."""
    model = lively(arch, **NARROW[arch]).double()
    own: dict[str, Tensor] = {}
    shared = adapter.shared
    size = shared.vector.numel()
    for name, parameter in model.named_parameters():
        number = shared.places.get(name)
        aliases = [key for key, other in model.named_parameters(remove_duplicate=False) if other is parameter]
        number = next((shared.places[key] for key in aliases if key in shared.places), None)
        if number is None:
            continue
        scale = 1.0 if shared.scales is None else shared.scales[number].detach().double()
        change = scale * (dense(shared.projections[number], size) @ shared.vector.detach().double())
        own[name] = (parameter.detach() + change.view(parameter.shape)).requires_grad_(grad)
    return model, own


@pytest.mark.parametrize("arch", sorted(NARROW))
@pytest.mark.parametrize("kind", ["said", "did"])
def test_equals_a_model_with_all_tensors_moved(arch: str, kind: str) -> None:
    model, data = adapted(arch, intrinsic(kind=kind, head=False), **NARROW[arch]), data_of(arch)
    model.double()
    hand, own = moved(arch, model.adapters["a"])
    want = torch.func.functional_call(hand, own, args=(), kwargs=data).logits
    far(want, hand(**data).logits)
    close(model(**data).logits, want, 1e-5)  # norms of some models compute in fp32
    still = {name for name, _ in hand.named_parameters()} - set(own)
    assert all("relative_attention_bias" in name or "embed_positions" in name for name in still)
    assert bool(still) == (arch in ("t5", "mt5", "bart", "opt"))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bart"])
def test_the_gradient_is_the_transpose_s(arch: str) -> None:
    """grad x = sum_i lambda_i P_i^T g_i and grad lambda_i = <g_i, P_i x>, with g_i of the model that moved itself."""
    model, data = adapted(arch, intrinsic(head=False), **NARROW[arch]), data_of(arch)
    model.double()
    shared = model.adapters["a"].shared
    model(**data).logits.square().sum().backward()
    hand, own = moved(arch, model.adapters["a"], grad=True)
    torch.func.functional_call(hand, own, args=(), kwargs=data).logits.square().sum().backward()
    expected, scales = torch.zeros_like(shared.vector), torch.zeros_like(shared.scales)
    aliases = dict(hand.named_parameters(remove_duplicate=False))
    for name, tensor in own.items():
        number = next(shared.places[key] for key, p in aliases.items() if key in shared.places and p is aliases[name])
        P = dense(shared.projections[number], shared.vector.numel())
        expected += shared.scales[number].detach() * (P.T @ tensor.grad.flatten())
        scales[number] = tensor.grad.flatten() @ (P @ shared.vector.detach())
    close(shared.vector.grad, expected)
    close(shared.scales.grad, scales)


def test_a_tied_tensor_moves_once_and_merges_for_both() -> None:
    model, data = adapted("gpt2", intrinsic()), data_of("gpt2")
    shared = model.adapters["a"].shared
    assert shared.places["transformer.wte.weight"] == shared.places["lm_head.weight"]
    assert len(shared.projections) == len(list(lively("gpt2").parameters()))
    want = model(**data).logits
    graft.merge(model, "a")
    assert model.lm_head.weight is model.transformer.wte.weight
    close(model(**data).logits, want)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_two_on_one_row_move_every_tensor_by_the_sum(arch: str) -> None:
    """Norms too, which run anew: with two of them neither may stand in the place of the other."""
    model, data = adapted(arch, intrinsic()), data_of(arch)
    perturb(graft.attach(model, intrinsic(seed=1), "b"), 2, size=0.3)
    both = {"a": 0.5, "b": 0.7}
    graft.use(model, both)
    want = model(**data).logits
    graft.merge(model, both)
    close(model(**data).logits, want)
    graft.unmerge(model)
    with torch.no_grad():
        for parameter, name in [(p, n) for n, p in model.named_parameters() if not n.startswith("adapters.")]:
            changes = [weight * model.adapters[key].shared.change(name) for key, weight in both.items()]
            parameter.add_(sum(changes).view_as(parameter))  # type: ignore[union-attr]
    graft.use(model, None)
    close(model(**data).logits, want)


def test_no_weight_is_kept_for_the_backward_pass() -> None:
    """Of the tensors that the graph keeps, only the base's own are as large as a weight."""
    model, data = adapted("llama", intrinsic()), data_of("llama", rows=1)
    base = {parameter.data_ptr() for parameter in model.parameters()}
    large: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in base and tensor.numel() >= 32 * 32:
            large.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**data).logits.sum().backward()
    # A row of nine tokens: activations have at most 9 x 99 values, the smallest weight 32 x 16.
    assert large == []


@pytest.mark.parametrize("kind", ["said", "did"])
def test_counts_are_d_exactly(kind: str) -> None:
    for name, size in (("bert-base", 20_000), ("Llama-2-7B", 500_000), ("gpt2", 1000)):
        adapter = graft.attach(meta(name), intrinsic(size, kind=kind, head=False))
        tensors = len(adapter.shared.projections)  # type: ignore[union-attr, arg-type]
        assert adapter.trainable == size
        assert adapter.shared.vector.numel() == size - (tensors if kind == "said" else 0)  # type: ignore[union-attr, operator]
    with_head = graft.attach(meta("bert-base"), intrinsic(1000))
    assert with_head.trainable == with_head.saved == 1000 + 2 * 769


def test_a_half_precision_base_keeps_its_dtype() -> None:
    model = tiny("gpt2").to(torch.bfloat16)
    adapter = graft.attach(model, intrinsic())
    logits: Tensor = model(**data_of("gpt2")).logits
    assert logits.dtype == torch.bfloat16 and {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_one_batch_is_learnt() -> None:
    model, data = lively("llama"), data_of("llama", labels=True, rows=1)
    adapter = graft.attach(model, intrinsic(1500))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.0)
    first = model(**data).loss.item()
    for _ in range(20):
        loss = model(**data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first


# -------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("arch", "kind"), [("llama", "said"), ("gpt2", "did"), ("bart", "said")])
def test_the_file_is_the_vector(arch: str, kind: str, tmp_path: Path) -> None:
    model, data = adapted(arch, intrinsic(kind=kind)), data_of(arch)
    graft.save(model, "a", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == 120
    again = lively(arch)
    torch.manual_seed(99)  # no random state of torch's has a part in it
    graft.load(again, tmp_path / "a", "a")
    assert torch.equal(again(**data).logits, model(**data).logits)
    other = lively(arch)
    graft.attach(other, intrinsic(kind=kind, seed=1), "a").shared.load_state_dict(  # type: ignore[union-attr]
        {key.rpartition(".")[2]: value for key, value in tensors.items()}
    )
    far(other(**data).logits, model(**data).logits)


def test_a_base_with_more_tokens_has_other_projections_and_is_refused(tmp_path: Path) -> None:
    model = adapted("llama", intrinsic())
    graft.save(model, "a", tmp_path / "a")
    grown = tiny("llama", **NARROW["llama"])
    grown.resize_token_embeddings(120, mean_resizing=False)
    with pytest.raises(AdapterFileError, match="more tokens in the embedding"):
        graft.load(grown, tmp_path / "a", "a", check="off")
    assert not hasattr(grown, "adapters")


def test_a_head_in_the_subspace_brings_its_random_start(tmp_path: Path) -> None:
    model, data = adapted("roberta", intrinsic(head=False)), data_of("roberta")
    assert model.adapters["a"].trainable == 120 and model.adapters["a"].saved == 120 + 32 * 33 + 3 * 33
    graft.save(model, "a", tmp_path / "a")
    again = lively("roberta")
    with torch.no_grad():
        for parameter in again.classifier.parameters():  # a fresh load has another random head
            parameter.normal_()
    graft.load(again, tmp_path / "a", "a")
    assert torch.equal(again(**data).logits, model(**data).logits)
    graft.merge(again, "a")
    close(again(**data).logits, model(**data).logits)


def test_a_model_in_fp64_or_on_the_move_keeps_its_projections() -> None:
    model, data = adapted("llama", intrinsic()), data_of("llama")
    want = model(**data).logits
    close(model.to(torch.bfloat16).float()(**data).logits, want, 0.05)
    assert not any("sign" in key or "bell" in key for key in model.state_dict())


# -------------------------------------------------------------------------------------------------- bad input


def test_errors() -> None:
    for options, message in (
        ({"kind": "sad"}, "kind is one of said, did, not 'sad'"),
        ({"size": 0}, "size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"generator": 2}, "generator 2 is not known here"),
        ({"layers": 1}, "layers has no meaning"),
    ):
        with pytest.raises(graft.ConfigError, match=message):
            graft.IntrinsicDimension(**options)  # type: ignore[arg-type]
    with pytest.raises(graft.ConfigError, match="size=28 leaves no coordinates, SAID has a scale for each of the 28"):
        graft.attach(tiny("gpt2"), intrinsic(28))
    assert graft.attach(tiny("gpt2"), intrinsic(29)).trainable == 29
    with pytest.raises(graft.SiteError, match=r"gate.weight belongs to a MixtralTopKRouter, which is no linear"):
        graft.attach(tiny("mixtral"), intrinsic())
    with pytest.raises(graft.SiteError, match="cls_token belongs to a ViTEmbeddings"):
        graft.attach(tiny("vit"), intrinsic())
    with pytest.raises(graft.ConfigError, match="did you mean 'size'"):
        from_dict({"method": "intrinsic", "sizes": 5})


def test_a_weight_that_is_used_without_its_module_is_noticed() -> None:
    class Bare(nn.Linear):
        """Its owner multiplies by the weight itself."""

    model = lively("llama")
    layer = model.model.layers[0].self_attn
    layer.extra = Bare(32, 32, bias=False)
    graft.attach(model, intrinsic(), "a")
    with pytest.raises(graft.RouteError, match=r"self_attn.extra; the model bypasses them"):
        model(**data_of("llama"))


def test_experts_that_are_linears_are_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(graft.SiteError, match=r"experts.0.weight belongs to experts"):
        graft.attach(model, intrinsic())


def test_a_module_that_is_saved_whole_is_left_to_itself() -> None:
    adapter = graft.attach(tiny("llama"), intrinsic(modules_to_save=("norm",)))
    assert "model.norm.weight" not in adapter.shared.places  # type: ignore[union-attr, operator]
    assert adapter.trainable == 120 + 32


def test_json() -> None:
    method = intrinsic(500, kind="did", seed=3)
    assert from_dict(method.to_dict()) == method and from_dict({"method": "intrinsic"}) == graft.IntrinsicDimension()
    assert method.to_dict(full=True)["generator"] == 1
