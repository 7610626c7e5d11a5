"""The loss at labelled tokens only, against F.cross_entropy of whole logits and autograd."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graft
from graft.fast import cross_entropy, head
from graft.fast.cross_entropy import Finish, losses, losses_through
from graft.fast.loss import fast_loss
from tiny import VOCAB, batch, checkpointed, tiny

CAUSAL = ("llama", "gemma2", "gpt2", "mixtral")
KINDS = (*CAUSAL, "t5", "bart")
BF16 = 2e-2
"""Of gradients in bf16, relative: the products' rounding, in another order."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 rows, so that each batch has several and a last one that is not full."""
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 5)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 0)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 1000)


def attached(kind: str, method: Any = None, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    model = tiny(kind, **config)
    for parameter in model.parameters() if kind != "t5" else ():  # T5's are large
        parameter.data *= 3  # so that logits are large enough for soft caps and rounding to show
    model = model.to(dtype)
    torch.manual_seed(1)
    graft.attach(model, method or graft.LoRA(rank=4))
    moved(model)
    return model


def moved(model: Any) -> None:
    """Away from zero, where half of the gradients would be 0."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            if "copy" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def full(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The model's logits in fp32 and the targets, (N, V) and (N)."""
    labels, given = inputs["labels"], {key: value for key, value in inputs.items() if key != "labels"}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        return model(**given).logits.float().flatten(0, 1), labels.flatten()
    return model(**given).logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], close: float = 1e-5) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= close * gradient.norm() + 1e-9, name
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())


def check(model: Any, inputs: dict[str, Tensor], smoothing: float = 0.0, close: float = 1e-5, **more: Any) -> None:
    """Loss and all gradients, of the mean over labels and of a sum that is divided by another number."""
    assert head.head_of(model) is not None
    for items in (None, 7):
        logits_NV, target_N = full(model, inputs)
        total = F.cross_entropy(logits_NV, target_N, reduction="sum", label_smoothing=smoothing)
        expected = total / ((target_N != -100).sum() if items is None else items)
        loss = graft.labelled_loss(model, inputs, num_items=items, smoothing=smoothing)
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=close / 5)
        same(gradients(model, loss), gradients(model, expected), close)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind: str, smoothing: float) -> None:
    model = attached(kind)
    with torch.no_grad():
        if kind == "bart":
            model.final_logits_bias.normal_()
    check(model, batch(kind), smoothing)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "t5"])
def test_bf16(kind: str) -> None:
    check(attached(kind, dtype=torch.bfloat16), batch(kind), close=BF16)


def test_autocast() -> None:
    model, inputs = attached("llama"), batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        check(model, inputs, close=BF16)


def test_scaled_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("llama")
    forward = type(model).forward

    def scaled(self: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        output.logits = output.logits * 0.3
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, VOCAB)
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    inputs = batch("llama")
    assert head.head_of(model) is None  # nobody has said so
    logits_NV, target_N = full(model, inputs)
    expected = F.cross_entropy(logits_NV, target_N)
    found = graft.labelled_loss(model, inputs)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    told = attached("llama")
    told.config.logits_scaling = 1 / 0.3
    check(told, inputs, smoothing=0.1)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_left_padding_and_unlabelled_rows(kind: str) -> None:
    model, inputs = attached(kind), batch(kind)
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"].flip(1), inputs["attention_mask"].flip(1)
    inputs["labels"] = inputs["labels"].flip(1) if kind == "llama" else inputs["labels"]
    inputs["labels"][1] = -100
    check(model, inputs)


@pytest.mark.parametrize("kind", ["llama", "bart"])
@pytest.mark.parametrize("method", [None, graft.LoRA(rank=2, targets=["head"])], ids=["frozen", "adapted"])
def test_no_label_at_all(kind: str, method: Any) -> None:
    model, inputs = attached(kind, method), batch(kind)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for items in (None, 0, torch.tensor(3)):
        loss = graft.labelled_loss(model, inputs, num_items=items)
        found = gradients(model, loss)
        assert float(loss.detach()) == 0.0 and not any(gradient.any() for gradient in found.values())
        assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    logprobs = graft.token_logprobs(model, inputs)
    assert not logprobs.any()
    assert not any(gradient.any() for gradient in gradients(model, logprobs.sum()).values())


HEADS = {
    "full": ("llama_tied", graft.FullFineTuning()),
    "untied": ("llama", graft.FullFineTuning()),
    "t5 full": ("t5", graft.FullFineTuning()),
    "copy": ("llama", graft.LoRA(rank=4, modules_to_save=("lm_head",))),
    "lora": ("llama", graft.LoRA(rank=4, targets=["attention.query", "head"])),
    "lora gemma2": ("gemma2", graft.LoRA(rank=4, targets=["head"])),
    "dora": ("gpt2", graft.DoRA(rank=4, targets=["attention.qkv", "head"])),
    "tokens": ("llama_tied", graft.TrainableTokens(tokens=(5, 9, 60))),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_that_train(case: str) -> None:
    kind, method = HEADS[case]
    model = attached(kind, method)
    model.zero_grad()
    check(model, batch(kind), smoothing=0.05)
    weigh(model, batch(kind))


def weigh(model: Any, inputs: dict[str, Tensor]) -> None:
    """Log-probabilities with another gradient from above for each token."""
    logits_NV, target_N = full(model, inputs)
    kept = target_N != -100
    logp_N = torch.zeros(len(target_N)).masked_scatter(
        kept, logits_NV[kept].log_softmax(-1).gather(1, target_N[kept, None])
    )
    found_BT = graft.token_logprobs(model, inputs)
    assert found_BT.shape[0] == len(inputs["labels"]) and torch.allclose(found_BT.flatten(), logp_N, atol=1e-5)
    above_N = torch.linspace(-1, 2, len(logp_N))
    same(gradients(model, (found_BT.flatten() * above_N).sum()), gradients(model, (logp_N * above_N).sum()), 3e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "t5"])
def test_token_logprobs(kind: str) -> None:
    weigh(attached(kind), batch(kind))


def mixed(kind: str = "llama") -> Any:
    """Three adapters: two at the head of different ranks, one elsewhere."""
    model = attached(kind, graft.LoRA(rank=4, targets=["head", "attention.query"]))
    graft.attach(model, graft.LoRA(rank=2, targets=["head"]), "b")
    graft.attach(model, graft.LoRA(rank=3), "c")
    moved(model)
    return model


ROWS = ["default", None, {"b": 0.5, "default": 1.0}, "c"]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_adapted_heads_in_a_mixed_batch(kind: str) -> None:
    model = mixed(kind)
    with graft.route(model, ROWS):
        check(model, batch(kind))
        weigh(model, batch(kind))
        loss = graft.labelled_loss(model, batch(kind))
        expected = F.cross_entropy(*full(model, batch(kind)))
    same(gradients(model, loss), gradients(model, expected))  # the route has ended: what is computed again finds it


def test_adapted_heads_in_a_packed_batch() -> None:
    model = mixed()
    ids = batch("llama")["input_ids"][:, :3].reshape(1, -1)
    inputs = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(3).repeat(4)[None]}
    inputs["labels"][:, ::3] = -100
    with graft.route(model, segments=[(row, 3) for row in ROWS]):
        model.config.use_cache = False
        check(model, inputs)


def test_gradient_checkpointing() -> None:
    model = mixed().train()
    checkpointed(model, use_reentrant=False)
    with graft.route(model, ROWS):
        check(model, batch("llama"))


def test_the_trial_leaves_no_trace() -> None:
    model = mixed()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with graft.route(model, ROWS):
        before = model.adapters.snapshot()[:7]
        assert head.head_of(model) == head.OutputHead("lm_head", model.lm_head, True)
        assert model.adapters.snapshot()[:7] == before
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    hooks = len(model.lm_head._forward_hooks), len(model.lm_head._forward_pre_hooks)
    graft.labelled_loss(model, batch("llama"))
    assert (len(model.lm_head._forward_hooks), len(model.lm_head._forward_pre_hooks)) == hooks
    twin = copy.deepcopy(model)
    assert head.head_of(twin).module is twin.lm_head


def test_no_logits_are_made() -> None:
    model, inputs = attached("llama"), batch("llama")
    head.head_of(model)
    sizes: list[int] = []
    model.register_forward_hook(lambda module, args, output: sizes.append(output.logits.numel()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.shape[-1] == VOCAB), t)[1], lambda t: t):
        graft.labelled_loss(model, inputs).backward()
    assert sum(sizes) == 0


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    with caplog.at_level(logging.WARNING, logger="graft"):
        yield lambda: [record.getMessage() for record in caplog.records]


def plain(model: Any, inputs: dict[str, Any]) -> None:
    """The loss is the model's own, and the log says once why."""
    for _ in range(2):
        assert float(graft.labelled_loss(model, inputs)) == pytest.approx(
            float(model(**inputs).loss.detach()), rel=1e-6
        )


@torch.no_grad()
def test_what_falls_back_says_so_once(said: Any) -> None:
    routers = attached("mixtral", output_router_logits=True)
    plain(routers, batch("mixtral"))
    own = attached("llama")
    own.loss_function = lambda logits, labels, **more: logits.square().mean()
    plain(own, batch("llama"))
    late = attached("llama")
    assert head.head_of(late)
    late.loss_function = own.loss_function
    plain(late, batch("llama"))
    hooked = attached("llama")
    hooked.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    plain(hooked, batch("llama"))
    looked = attached("llama")
    looked.lm_head.register_forward_hook(lambda module, args, output: None)
    plain(looked, batch("llama"))
    texts = said()
    assert len(texts) == 5 and all(text.startswith("the loss takes the logits of whole batches") for text in texts)
    for text, part in zip(texts, ("logits alone", "logits alone", "loss_function", "hook", "hook"), strict=True):
        assert part in text, text


def test_a_compiled_model_takes_the_plain_path(said: Any) -> None:
    model, inputs = attached("llama"), batch("llama")
    assert fast_loss(model, inputs, call=torch.compile(model, backend="eager")) is None
    assert fast_loss(model, inputs) is not None
    model.compile(backend="eager")
    assert fast_loss(model, inputs) is None
    assert len(said()) == 1 and "compiled" in said()[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "llama_cls"])
def test_classifiers_take_their_own_loss_without_a_word(kind: str, said: Any) -> None:
    plain(attached(kind), batch(kind))
    assert not said()


def test_the_plain_path_gives_the_same() -> None:
    model = attached("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: None)
    for smoothing in (0.0, 0.1):
        for items in (None, 7):
            logits_NV, target_N = full(model, batch("llama"))
            total = F.cross_entropy(logits_NV, target_N, reduction="sum", label_smoothing=smoothing)
            found = graft.labelled_loss(model, batch("llama"), num_items=items, smoothing=smoothing)
            expected = total / (items or (target_N != -100).sum())
            assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    weigh(model, batch("llama"))


def test_log_probabilities_need_labels_of_tokens() -> None:
    with pytest.raises(graft.RouteError, match="labels"):
        graft.token_logprobs(attached("bert"), batch("bert"))


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_both_forms_against_autograd(cap: float | None, bias: bool) -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(13, 8, dtype=torch.float64), torch.randn(21, 8, dtype=torch.float64)
    bias_V, target_N = torch.randn(21, dtype=torch.float64) if bias else None, torch.randint(0, 21, (13,))
    finish, above_N = Finish(1.7, cap, torch.randn(21, dtype=torch.float64)), torch.randn(13, dtype=torch.float64)
    given = [t.requires_grad_() for t in (hidden_ND, weight_VD, bias_V) if t is not None]

    def gradients_of(losses_N: Tensor, above: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((losses_N * above).sum(), given, retain_graph=True)

    logits_NV = finish(F.linear(hidden_ND, weight_VD, bias_V))
    expected_N = F.cross_entropy(logits_NV, target_N, reduction="none", label_smoothing=0.2)
    ours_N = losses(hidden_ND, weight_VD, bias_V, target_N, finish, 0.2)
    through_N = losses_through(
        lambda h, where: F.linear(h, weight_VD, bias_V),
        hidden_ND,
        target_N,
        21,
        finish,
        0.2,
        torch.utils.checkpoint.checkpoint,
    )
    total = losses(hidden_ND, weight_VD, bias_V, target_N, finish, 0.2, summed=True)
    assert torch.allclose(ours_N, expected_N) and torch.allclose(through_N, expected_N)
    for found, expected in zip(gradients_of(ours_N, above_N), gradients_of(expected_N, above_N), strict=True):
        assert torch.allclose(found, expected)
    for found, expected in zip(gradients_of(total, above_N[0]), gradients_of(expected_N, above_N[0]), strict=True):
        assert torch.allclose(found, expected)
    for found, expected in zip(gradients_of(through_N, above_N), gradients_of(expected_N, above_N), strict=True):
        assert torch.allclose(found, expected)


def test_a_tied_head_on_another_device_than_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a `device_map` spreads a model; the meta device stands for the other one, and takes what comes as hooks do."""
    model, inputs = attached("llama"), batch("llama")
    assert head.head_of(model) is not None
    weight = nn.Parameter(model.lm_head.weight.to("meta"), requires_grad=False)
    model.lm_head.weight = weight
    model.lm_head.forward = lambda hidden: F.linear(hidden.to("meta"), weight)
    monkeypatch.setattr("graft.fast.loss.why_not", lambda *given: None)
    with torch.no_grad():
        loss, logprobs = fast_loss(model, inputs), graft.token_logprobs(model, inputs)
    assert loss is not None and loss.is_meta and loss.shape == () and logprobs.is_meta


def test_gradients_of_a_head_in_bf16_are_summed_by_parts_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    hidden_ND, weight_VD = (torch.randn(n, 16).bfloat16() for n in (23, 50))
    target_N, found = torch.randint(50, (23,)), []
    for rows in (50, 7):
        monkeypatch.setattr(cross_entropy, "SUMMED", rows)
        weight = weight_VD.clone().requires_grad_()
        losses(hidden_ND, weight, None, target_N, Finish(), summed=True).backward()
        found.append(weight.grad)
    assert found[0] is not None and found[0].any() and torch.equal(*found)
