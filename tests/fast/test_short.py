"""Attention of short texts in 16 bits: against attention in double precision, and against PyTorch's own kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graft
from examples import perturb
from graft.attend import AttentionCall
from graft.bank import bank_of
from graft.fast import short
from tiny import checkpointed, tiny


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens of each call that was taken."""
    seen: list[int] = []
    real = short.attention

    def attention(call: AttentionCall) -> Any:
        seen.append(call.query_BHTD.shape[2])
        return real(call)

    monkeypatch.setattr(short, "attention", attention)
    yield seen


def call_of(
    sizes: tuple[int, ...] = (2, 4, 2, 9, 8, 8), dtype: torch.dtype = torch.bfloat16, **options: Any
) -> AttentionCall:
    """A call with B rows, H query heads, K key/value heads, T tokens and heads of D and E numbers."""
    B, H, K, T, D, E = sizes
    torch.manual_seed(0)
    tensors = (torch.randn(B, T, heads, width) for heads, width in ((H, D), (K, D), (K, E)))
    query, key, value = (tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in tensors)
    return AttentionCall(nn.Module(), query, key, value, None, 0, options)


def plain(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, causal: bool) -> Tensor:
    """(B, T, H, E) by the formula, with whole rows of scores."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def errors(run: Callable[..., Tensor], call: AttentionCall, scale: float | None, causal: bool) -> list[float]:
    """Relative distances of the output and of the three gradients from those in double precision."""
    tensors = (call.query_BHTD, call.key_BKSD, call.value_BKSD)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = plain(*exact, scale=scale, causal=causal)
    above = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    found = run(*tensors)
    assert found.shape == wanted.shape and found.dtype == tensors[0].dtype
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad(found, tensors, above.to(found.dtype)),
        torch.autograd.grad(wanted, exact, above.to(found.dtype).double()),
        strict=True,
    )
    return [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(
    "sizes", [(2, 4, 4, 9, 8, 8), (1, 4, 2, 33, 8, 16), (3, 6, 1, 2, 16, 8), (1, 2, 2, 200, 32, 32)]
)
def test_near_double_precision(sizes: tuple[int, ...], scale: float | None, causal: bool) -> None:
    """Within 2 %, or one and a half times as far as PyTorch's kernel is; with grouped heads and unequal widths too."""
    call = call_of(sizes, is_causal=causal, scaling=scale)
    assert short.takes(call)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return short.attention(call)[0]

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given: dict[str, Any] = {"is_causal": causal, "scale": scale, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, **given).transpose(1, 2)

    far = errors(theirs, call, scale, causal)
    for name, mine, other in zip(
        ("output", "query", "key", "value"), errors(ours, call, scale, causal), far, strict=True
    ):
        assert mine <= max(0.02, 1.5 * other), (name, mine, other)


def test_masks_and_rows_in_front() -> None:
    """Queries that see other keys each, and keys in front that all see: as PyTorch's kernel, with the same mask."""
    call = call_of((2, 4, 2, 9, 8, 8))
    front = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    key, value = (torch.cat([front, x.detach()], 2).requires_grad_() for x in (call.key_BKSD, call.value_BKSD))
    seen = torch.nn.functional.pad(torch.ones(9, 9, dtype=torch.bool).tril(), (3, 0), value=True).repeat(2, 1, 1, 1)
    seen[1, 0, 5:, 1:6] = False
    call = dataclasses.replace(call, key_BKSD=key, value_BKSD=value, mask=seen)
    assert short.takes(call)
    found = short.attention(call)[0]
    wide = [x.detach().float().requires_grad_() for x in (call.query_BHTD, key, value)]
    wanted = F.scaled_dot_product_attention(*wide, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    above = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad(found, (call.query_BHTD, key, value), above.to(found.dtype)),
        torch.autograd.grad(wanted, wide, above),
        strict=True,
    )
    for mine, other in pairs:
        assert (mine.float() - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize(
    "change",
    [
        lambda call: dataclasses.replace(call, mask=torch.zeros(1, 1, 9, 9)),
        lambda call: dataclasses.replace(call, mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril(-1)),
        lambda call: dataclasses.replace(call, options={"dropout": 0.1}),
        lambda call: dataclasses.replace(call, options={"position_bias": torch.zeros(1)}),
        lambda call: dataclasses.replace(call, query_BHTD=call.query_BHTD[:, :, -1:]),
        lambda call: dataclasses.replace(call, query_BHTD=call.query_BHTD[:1]),
        lambda call: dataclasses.replace(call, value_BKSD=call.value_BKSD.float()),
        lambda call: call_of((1, 2, 2, short.LONGEST + 1, 4, 4)),
        lambda call: call_of(dtype=torch.float32),
    ],
)
def test_what_is_left_to_the_models_own(change: Callable[[AttentionCall], AttentionCall]) -> None:
    """Masks of numbers, queries that see nothing, dropout, biases, one query, other dtypes, long texts; inference."""
    call = call_of()
    assert short.takes(call)
    assert not short.takes(change(call))
    with torch.no_grad():
        assert not short.takes(call)
    call.module.eval()
    assert not short.takes(call)


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.adapters.named_parameters() if p.grad is not None}


def whole(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for _, value in sorted(found.items())])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "mixtral"])
def test_gradients_of_a_model(arch: str, taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 within 5 % of those with PyTorch's kernel, and as near to fp32's; the same under checkpointing."""
    still = {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")} if arch == "gpt2" else {}
    model = tiny(arch, **still).train()
    perturb(graft.attach(model, graft.LoRA(rank=2)), 0)
    ids = torch.randint(5, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    exact = whole(gradients(model, ids))
    assert not taken and not bank_of(model).attention
    model.to(torch.bfloat16)
    model.adapters.float()
    ours = whole(gradients(model, ids))
    assert taken
    with torch.no_grad():
        taken.clear()
        model(input_ids=ids)
        assert not taken
    checkpointed(model)
    assert torch.equal(whole(gradients(model, ids)), ours) and len(taken) > model.config.num_hidden_layers
    monkeypatch.setattr(short, "LONGEST", 0)
    taken.clear()
    theirs = whole(gradients(model, ids))
    assert not taken
    assert (ours - theirs).norm() <= 0.05 * theirs.norm()
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
    graft.detach(model)
    assert model.config._attn_implementation == "sdpa"


def test_packed_texts_each_by_itself(taken: list[int]) -> None:
    """The texts of a packed row that are short enough."""
    model = tiny("llama").to(torch.bfloat16).train()
    graft.attach(model, graft.LoRA(rank=2))
    positions = torch.cat([torch.arange(6), torch.arange(3)])[None]
    model(torch.arange(5, 14)[None], position_ids=positions, use_cache=False).logits.sum().backward()
    assert set(taken) == {6, 3}
