"""P-tuning: its encoder in dense algebra, peft in both directions, and the encoder dropped after training."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_counts import meta
from torch import Tensor, nn
from twins import adapted, close, copy_into, data_of, far, lively, peft_twin

import graft
from graft.method import from_dict
from tiny import tiny

P, H = 3, 5
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "mt5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
MLP, LSTM = graft.PTuning(length=P, hidden=H), graft.PTuning(length=P, hidden=H, encoder="lstm")


def relu_linears(x: Tensor, linears: list[nn.Linear]) -> Tensor:
    for i, linear in enumerate(linears):
        x = x @ linear.weight.T + linear.bias
        x = x.clamp(min=0) if i < len(linears) - 1 else x
    return x


def lstm(x_PD: Tensor, net: nn.LSTM) -> Tensor:
    """Each layer forward and backward over the sequence, gate by gate."""
    for layer in range(net.num_layers):
        sides = []
        for end, order in (("", range(len(x_PD))), ("_reverse", reversed(range(len(x_PD))))):
            w_in, w_h, b_in, b_h = (
                getattr(net, f"{name}_l{layer}{end}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = c = torch.zeros(net.hidden_size)
            out: dict[int, Tensor] = {}
            for t in order:
                i, f, g, o = (w_in @ x_PD[t] + b_in + w_h @ h + b_h).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                out[t] = h = o.sigmoid() * c.tanh()
            sides.append(torch.stack([out[t] for t in range(len(x_PD))]))
        x_PD = torch.cat(sides, -1)
    return x_PD


@pytest.mark.parametrize("method", [MLP, LSTM, graft.PTuning(length=P), graft.PTuning(length=P, encoder="lstm")])
def test_the_encoder_in_dense_algebra(method: Any) -> None:
    """MLP(e), or MLP(BiLSTM(e)); without `hidden` the LSTM's two directions are D / 2 wide each, as in the paper."""
    model = adapted("llama", method)
    shared = model.adapters["a"].shared
    e_PD = shared.embedding.weight
    linears = [module for module in shared.mlp if isinstance(module, nn.Linear)]
    width = method.hidden or (32 if method.encoder == "mlp" else 16)
    sizes = [32, width, width, 32] if method.encoder == "mlp" else [2 * width, 2 * width, 32]
    assert [(n.in_features, n.out_features) for n in linears] == list(itertools.pairwise(sizes))
    expected = relu_linears(e_PD if method.encoder == "mlp" else lstm(e_PD, shared.lstm), linears)
    close(shared.expanded(), expected)
    (delta,) = (delta for _, delta in model.adapters["a"].items())
    close(delta.rows_PD(), expected)


def test_start() -> None:
    """e is normal, the networks have torch's own start; no row is like another."""
    torch.manual_seed(0)
    shared = graft.attach(tiny("llama"), graft.PTuning(length=200)).shared
    assert shared.embedding.weight.shape == (200, 32) and abs(shared.embedding.weight.std() - 1) < 0.02
    assert shared.mlp[0].weight.abs().max() <= 32**-0.5 and len(shared.expanded().unique(dim=0)) == 200


@pytest.mark.parametrize("arch", ["llama", "mt5"])
@pytest.mark.parametrize("method", [MLP, graft.PTuning(length=P, hidden=H, encoder="lstm", dropout=0.5)])
def test_logits_are_the_same_before_and_after_the_encoder_is_dropped(arch: str, method: Any) -> None:
    model, data = adapted(arch, method), data_of(arch)
    adapter = model.adapters["a"]
    with torch.no_grad():
        before = model(**graft.prepare(model, data)).logits
        far(before[:, :1], lively(arch)(**data).logits[:, :1])
    trained = adapter.trainable
    model.train()  # the LSTM's dropout acts now, and must not in what is kept
    method.finish(adapter.shared)
    model.eval()
    close(model(**graft.prepare(model, data)).logits, before, 1e-6)
    assert [tuple(p.shape) for p in adapter.parameters()] == [(P, 32)]
    assert adapter.trainable == adapter.saved == P * 32 < trained
    method.finish(adapter.shared)  # a second time it does nothing
    model(**graft.prepare(model, {**data, "labels": data.get("labels", data["input_ids"])})).loss.backward()
    assert bool((adapter.shared.table.grad.abs().sum(-1) > 0).all())


def test_dropout_acts_in_training_alone() -> None:
    shared = adapted("llama", graft.PTuning(length=P, encoder="lstm", dropout=0.5)).adapters["a"].shared
    assert torch.equal(shared.rows(), shared.rows())
    shared.train()
    assert not torch.equal(shared.rows(), shared.rows()) and torch.equal(shared.expanded(), shared.expanded())
    assert shared.training and shared.lstm.training


# ------------------------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
@pytest.mark.parametrize("arch", sorted(TASKS))
def test_equals_peft(arch: str, encoder: str) -> None:
    """All pseudo-tokens in front, the encoder's weights those of peft's."""
    import peft

    config = peft.PromptEncoderConfig(
        task_type=TASKS[arch],
        num_virtual_tokens=P,
        encoder_hidden_size=H,
        encoder_reparameterization_type=encoder,
    )
    method = graft.PTuning(length=P, hidden=H, encoder=encoder.lower(), head=False)
    model, data = adapted(arch, method, peft_compat=True), data_of(arch)
    shared = model.adapters["a"].shared
    other = peft_twin(arch, config)
    theirs = other.prompt_encoder["default"]
    copy_into(theirs.embedding.weight, shared.embedding.weight)
    assert theirs.embedding.weight.shape[0] == (2 * P if TASKS[arch] == "SEQ_2_SEQ_LM" else P)
    for name, parameter in theirs.named_parameters():
        ours = name.replace("mlp_head", "mlp").replace("lstm_head", "lstm")
        copy_into(parameter, shared.get_parameter(ours))
    ready = graft.prepare(model, data if arch not in ("llama", "gpt2") else {**data, "labels": data["input_ids"]})
    actual, expected = model(**ready).logits, other(**data).logits
    far(expected[..., :1, :], lively(arch)(**data).logits[..., :1, :])
    if arch in ("llama", "gpt2"):
        seen = ready["attention_mask"].bool()
        actual, expected = actual[seen], expected[seen]
    close(actual, expected, 1e-6)


def test_a_peft_config_is_a_method() -> None:
    import peft

    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        encoder_hidden_size=6,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=3,
        encoder_dropout=0.2,
    )
    adapter = graft.attach(tiny("llama"), config)
    wanted = graft.PTuning(length=4, hidden=6, encoder="lstm", encoder_layers=3, dropout=0.2, head=False)
    assert adapter.method == wanted and adapter.shared.lstm.num_layers == 3 and adapter.shared.lstm.dropout == 0.2
    plain = graft.attach(tiny("llama"), peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert plain.method == graft.PTuning(length=4, hidden=32, head=False)  # peft takes the model's width


# ----------------------------------------------------------------------------------------------------------- counts

# peft's counts of the public shapes, heads included: 20 pseudo-tokens, an MLP of width 128.
TABLE = {
    "bert-base": 230_914,
    "bert-large": 302_338,
    "roberta-base": 821_506,
    "gpt2": 229_376,
    "gpt2-medium": 300_288,
    "gpt2-large": 371_200,
    "Llama-2-7B": 1_151_232,
    "Llama-3-8B": 1_151_232,
    "Qwen2.5-0.5B": 264_832,
    "Qwen2.5-7B": 1_009_408,
    "t5-base": 244_736,
    "bart-large": 320_768,
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_counts_of_public_shapes(name: str) -> None:
    adapter = graft.attach(meta(name), graft.PTuning(hidden=128), peft_compat=True)
    assert adapter.trainable == TABLE[name] and all(p.is_meta for p in adapter.parameters())


def test_counts_of_mt0_large() -> None:
    model = meta("mt0-large")
    for encoder, count in (("mlp", 320_768), ("lstm", 1_946_880)):
        method = graft.PTuning(hidden=128, encoder=encoder)
        adapter = graft.attach(model, method, peft_compat=True)
        assert (adapter.trainable, adapter.saved) == (count, 40_960)
        graft.detach(model)
        assert graft.attach(model, method).trainable == count - 20 * 1024  # P rows and not 2P
        graft.detach(model)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"encoder": "gru"}, "encoder is one of mlp, lstm"),
        ({"length": 0}, "length must be at least 1"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"encoder": "lstm", "encoder_layers": 0}, "encoder_layers must be at least 1"),
        ({"encoder_layers": 3}, "encoder_layers are the LSTM's"),
        ({"dropout": 0.1}, "dropout acts between layers"),
        ({"encoder": "lstm", "encoder_layers": 1, "dropout": 0.1}, "dropout acts between layers"),
        ({"encoder": "lstm", "dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"layers": 1}, "layers has no meaning"),
    ],
)
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(graft.ConfigError, match=match):
        graft.PTuning(**settings)


def test_json() -> None:
    method = graft.PTuning(length=6, encoder="lstm", hidden=8, encoder_layers=3, dropout=0.25)
    assert from_dict(method.to_dict()) == method


def test_rows_have_a_shape_on_the_meta_device() -> None:
    """`graft describe` looks at folders without weights."""
    with torch.device("meta"):
        adapter = graft.attach(tiny("llama").to("meta"), graft.PTuning(length=3, hidden=8), "a")
    assert adapter.shared.expanded().shape == (3, 32)  # type: ignore[union-attr, operator]
