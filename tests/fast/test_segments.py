"""Attention text by text in packed rows, and batches without padding: against texts alone and padded batches."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import PrinterCallback, TrainingArguments

import graft
from examples import perturb
from graft.bank import bank_of
from graft.base import load_tokenizer
from graft.data.collate import Collator, check_packing
from graft.data.encode import Example
from graft.data.rows import Row
from graft.errors import ConfigError
from graft.fast import segments
from graft.train.schedule import Schedule
from graft.train.setup import padding_free
from graft.train.trainer import GraftTrainer
from tiny import checkpointed, tiny

LENGTHS = (9, 1, 5, 9)
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gemma2": {"sliding_window": 4, "attn_implementation": "eager"},
    "gemma3": {"sliding_window": 4},
    "mixtral": {},
    "qwen2": {},
    "opt": {},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The lengths of each call of attention that ran text by text."""
    seen: list[tuple[int, ...]] = []
    real = segments.each

    def each(call: Any, *rest: Any) -> Any:
        seen.append(call.mask.lengths)
        return real(call, *rest)

    monkeypatch.setattr(segments, "each", each)
    return seen


def model_of(arch: str, *methods: Any, **more: Any) -> Any:
    settings = SETTINGS.get(arch, {}) | more
    how = settings.pop("attn_implementation", None)
    model = tiny(arch, **settings)
    if how:
        model.set_attn_implementation(how)
    for number, method in enumerate(methods):
        perturb(graft.attach(model, method, "ab"[number]), number)
    return model


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 90, (length,), generator=generator) for length in lengths]


def packed(rows: list[Tensor]) -> dict[str, Any]:
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return {"input_ids": torch.cat(rows)[None], "position_ids": positions[None], "use_cache": False}


def gradients(model: Any, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.adapters.named_parameters() if p.grad is not None}


def near(found: dict[str, Tensor], wanted: dict[str, Tensor], within: float = 1e-5) -> None:
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= within * value.norm() + 1e-9, name


def check_as_alone(
    model: Any, entries: list[Any], rows: list[Tensor], calls: list[Any], within: float = 1e-5
) -> list[Any]:
    """Packed texts give the logits and gradients of each alone; which calls the packed forward made text by text."""
    calls.clear()
    with graft.route(model, segments=[(e, len(row)) for e, row in zip(entries, rows, strict=True)]):
        logits = model(**packed(rows)).logits[0]
    ran = list(calls)
    found = gradients(model, logits)
    separate = []
    for entry, row in zip(entries, rows, strict=True):
        with graft.route(model, [entry]):
            separate.append(model(row[None], use_cache=False).logits[0])
    torch.testing.assert_close(logits, torch.cat(separate), atol=1e-5, rtol=1e-5)
    near(found, gradients(model, torch.cat(separate)), within)
    return ran


@pytest.mark.parametrize("arch", SETTINGS)
def test_texts_of_a_row_are_as_alone(arch: str, calls: list[Any]) -> None:
    """Logits and gradients of three adapters' routes, with windows shorter than a text, and texts of one token."""
    model, rows = model_of(arch, graft.LoRA(rank=2), graft.LoRA(rank=3)), texts()
    entries = ["a", "b", None, ("a", "b")]
    assert check_as_alone(model, entries, rows, calls) == [LENGTHS] * 2


@pytest.mark.parametrize("arch", ["bert_base", "ModernBert"])
def test_encoders_too(arch: str, calls: list[Any]) -> None:
    """Whole texts see themselves, with a window too; transformers alone lets them see each other."""
    if arch == "ModernBert":
        ids = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.ModernBertConfig(vocab_size=99, local_attention=4, **sizes, **ids)
        model: Any = transformers.ModernBertModel(config).eval()
    else:
        model = tiny(arch).eval()
    rows = texts()
    mixed = model(**packed(rows)).last_hidden_state[0]
    perturb(graft.attach(model, graft.LoRA(rank=2, targets="all-linear"), "a"))
    together = model(**packed(rows)).last_hidden_state[0]
    assert len(calls) == 2
    separate = [model(row[None]).last_hidden_state[0] for row in rows]
    torch.testing.assert_close(together, torch.cat(separate), atol=1e-5, rtol=1e-5)
    graft.use(model, None)
    assert (mixed - model(**packed(rows)).last_hidden_state[0]).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_no_bit_of_a_text_reaches_another(arch: str) -> None:
    model, rows = model_of(arch, graft.LoRA(rank=2)), texts()
    other = [texts(seed=1)[0], *rows[1:]]
    one, two = (model(**packed(each)).logits[0] for each in (rows, other))
    assert torch.equal(one[9:], two[9:]) and not torch.equal(one[:9], two[:9])


@pytest.mark.parametrize(
    "method",
    [
        graft.PrefixTuning(length=3),
        graft.LlamaAdapter(length=3, layers=2),
        graft.LongLoRA(rank=2, group=4),
        graft.UniPELT(length=3),
    ],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_attention_methods_in_texts(method: Any, how: str, calls: list[Any]) -> None:
    """Of one adapter for all, and of two that stand in turn beside the base; in training mode, without dropout."""
    model = model_of("llama", method, graft.PrefixTuning(length=2), attn_implementation=how).train()
    rows = texts()
    for entries in (["a"] * 4, ["a", None, ("b", "a"), "b"]):
        assert check_as_alone(model, entries, rows, calls, 2e-5)


@pytest.mark.parametrize("own", [False, True])
def test_a_recompute_finds_its_texts_again(own: bool) -> None:
    """Under transformers' checkpointing and under a wrapper of the user's, after another forward and another route."""
    rows, wanted = texts(), {}
    for on in (False, True):
        model = model_of("llama", graft.LoRA(rank=2), graft.PrefixTuning(length=2)).train()
        if on and own:
            layer = model.model.layers[1]
            inner = layer.forward
            layer.forward = lambda *a, inner=inner, **k: torch.utils.checkpoint.checkpoint(
                inner, *a, use_reentrant=False, **k
            )
        elif on:
            checkpointed(model)
        entries = ["a"] * 4 if own else ["a", "b", None, "a"]
        with graft.route(model, segments=[(e, len(row)) for e, row in zip(entries, rows, strict=True)]):
            logits = model(**packed(rows)).logits
        with torch.no_grad():
            model(rows[0][None])
        if own:
            graft.use(model, "a")  # no wrapper of a user's can know the route
        found = gradients(model, logits)
        wanted = wanted or found
    near(found, wanted)


def test_positions_alone_are_enough_and_rows_stay_rows(calls: list[Any]) -> None:
    """A loop without `route`; forwards that are no packed row make transformers' masks."""
    model, rows = model_of("llama", graft.LoRA(rank=2)), texts()
    model(**packed(rows))
    assert len(calls) == 2
    model(rows[0][None])
    model(**packed(rows) | {"position_ids": torch.arange(24)[None]})
    model(torch.stack([rows[0], rows[3]]), attention_mask=torch.ones(2, 9, dtype=torch.long))
    model(**packed(rows) | {"output_attentions": True})
    assert len(calls) == 2


def test_runs_that_are_no_texts_keep_the_mask(calls: list[Any]) -> None:
    """A route may cut a text in two; then the mask is that of the texts, and both runs see one."""
    model, rows = model_of("llama", graft.PrefixTuning(length=2), graft.LoRA(rank=2)), texts((6, 4))
    with graft.route(model, segments=[("b", 3), (None, 3), ("b", 4)]):
        logits = model(**packed(rows)).logits[0]
    assert calls
    with graft.route(model, segments=[("b", 3), (None, 3)]):
        alone = model(rows[0][None], position_ids=torch.arange(6)[None], use_cache=False).logits[0]
    torch.testing.assert_close(logits[:6], alone, atol=1e-5, rtol=1e-5)
    with graft.route(model, segments=[("a", 3), (None, 3), ("b", 4)]):
        assert model(**packed(rows)).logits.isfinite().all()


def test_the_model_is_itself_again() -> None:
    model, rows = model_of("llama", graft.LoRA(rank=2)), texts()
    before = model.config.to_dict()
    first = model(**packed(rows)).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**packed(rows)).logits, first)
    graft.detach(model)
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == before
    assert torch.equal(twin(**packed(rows)).logits, first)
    twin.set_attn_implementation("flex_attention")  # a kernel that knows of texts itself, and needs nothing of ours
    bank_of(twin).begin((rows[0][None],), {}, root=True, module=twin)
    assert bank_of(twin).attention == [] and twin.config._attn_implementation == "flex_attention"


def test_two_models_of_one_config(calls: list[Any]) -> None:
    """What one model does to the config that they share, the other does not notice."""
    first, rows = model_of("llama", graft.LoRA(rank=2)), texts()
    first(**packed(rows))
    second = type(first)(first.config).eval()
    perturb(graft.attach(second, graft.PrefixTuning(length=2), "a"))
    calls.clear()
    wanted = second(**packed(rows)).logits
    assert len(calls) == 2
    graft.detach(first)
    assert torch.equal(second(**packed(rows)).logits, wanted) and len(calls) == 4
    graft.detach(second)
    assert second.config._attn_implementation == "sdpa"


def test_the_variable_length_kernel_gets_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel would be called with on a GPU, by a stand-in that computes as its documentation says."""

    def kernel(q: Any, k: Any, v: Any, edges: Any, same: Any, longest: int, other: int, **options: Any) -> Tensor:
        assert edges is same and longest == other == max(LENGTHS) and edges.dtype == torch.int32
        assert options["window_size"] == (-1, 0) and options["enable_gqa"]
        pairs = zip(edges.tolist(), edges.tolist()[1:], strict=False)
        parts = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in pairs]
        outs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    model, rows = model_of("llama", graft.LoRA(rank=2)), texts()
    wanted = model(**packed(rows)).logits
    assert not segments.takes_varlen(_call(model))
    monkeypatch.setattr(segments, "kernel", lambda: kernel)
    monkeypatch.setattr(segments, "takes_varlen", lambda call: True)
    torch.testing.assert_close(model(**packed(rows)).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "flash", "wanted"), [(64, True, True), (60, True, False), (264, True, False), (64, False, False)]
)
def test_the_variable_length_kernel_takes_what_flash_attention_does(
    size: int, flash: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head sizes by 8 up to 256, on a GPU for which PyTorch says yes (from sm80 on)."""
    monkeypatch.setattr(segments, "kernel", lambda: print)
    monkeypatch.setattr("torch.backends.cuda.can_use_flash_attention", lambda params: flash)
    with FakeTensorMode():
        heads, fewer = (torch.empty(1, n, 24, size, device="cuda", dtype=torch.bfloat16) for n in (4, 2))
    call = dataclasses.replace(_call(None), query_BHTD=heads, key_BKSD=fewer, value_BKSD=fewer)
    assert segments.takes_varlen(call) == wanted
    assert not segments.takes_varlen(dataclasses.replace(call, options={"softcap": 30.0}))


def _call(model: Any) -> Any:
    from graft.attend import AttentionCall

    heads = torch.zeros(1, 4, 24, 8)
    mask = segments.Segments(LENGTHS, (None,) * 4, lambda: heads)
    return AttentionCall(model, heads, heads, heads, mask, 0, {})


# Training without padding -----------------------------------------------------------------------------------------


def examples(*lengths: int) -> list[Example]:
    rows = [row.tolist() for row in texts(lengths)]
    return [
        Example(
            input_ids=ids,
            labels=[-100] * (1 + len(ids) // 3) + ids[1 + len(ids) // 3 :],
            row=Row(form="text", index=number, source="x.jsonl"),
        )
        for number, ids in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("arch", "method"),
    [
        ("llama", graft.LoRA(rank=2)),
        ("gpt2", graft.LoRA(rank=2, targets="all-linear")),
        ("gemma2", graft.IA3()),
        ("mixtral", graft.LoRA(rank=2)),
        ("llama", graft.PrefixTuning(length=3)),
        ("gpt2", graft.PromptTuning(length=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_training_is_the_same_with_and_without_padding(arch: str, method: Any, tmp_path: Path) -> None:
    """Losses, evaluation and gradients of five steps, the last batch of an epoch short, two batches a step."""
    data = examples(9, 17, 5, 2, 12, 7, 20, 3, 8, 11)
    found = []
    for flat in (False, True):
        torch.manual_seed(0)
        model = model_of(arch, method)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = GraftTrainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=5,
                gradient_accumulation_steps=2,
                learning_rate=0.3,
                optim="sgd",
                lr_scheduler_type="constant",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            data_collator=Collator(load_tokenizer("embedded"), packed=flat),
            train_dataset=data,
            eval_dataset=data,
            schedule=Schedule([len(one) for one in data], batch_size=4, accumulate=2, max_steps=5),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found.append((losses, trainer.evaluate()["eval_loss"], dict(model.adapters.named_parameters())))
    (losses, loss, values), (flat_losses, flat_loss, flat_values) = found
    assert len(losses) == 5 and flat_losses == pytest.approx(losses, rel=1e-5)
    assert flat_loss == pytest.approx(loss, rel=1e-5)
    near({k: v.detach() for k, v in flat_values.items()}, {k: v.detach() for k, v in values.items()})


class _Run:
    """As much of a run as the rule reads."""

    def __init__(self, wanted: bool | None, packing: bool = False) -> None:
        self.data = type("Data", (), {"padding_free": wanted, "packing": packing})
        self.method = type("Method", (), {"name": "its method"})


def _data(mode: str, first: bool) -> Any:
    ones = examples(3, 4)
    if first:
        ones[0].labels[0] = 7
    template = type("Template", (), {"mode": mode})
    return type("Data", (), {"template": template, "names": ("a",), "train": ones, "evaluation": None})


@pytest.mark.parametrize(
    ("arch", "method", "mode", "first", "why"),
    [
        ("llama", graft.LoRA(rank=2), "causal", True, None),
        ("opt", graft.LoRA(rank=2), "causal", True, None),
        ("llama", graft.PromptTuning(length=2), "causal", False, None),
        ("llama", graft.PromptTuning(length=2), "causal", True, "the first token of an example has a label"),
        ("llama", graft.LongLoRA(rank=2, group=4), "causal", False, None),
        ("llama", graft.LongLoRA(rank=2), "causal", False, "its method depends on how long the longest row"),
        ("bloom", graft.LoRA(rank=2), "causal", False, "attention of BloomForCausalLM would need a mask"),
        ("t5", graft.LoRA(rank=2), "seq2seq", False, "seq2seq takes each example in a row of its own"),
    ],
)
def test_what_is_padded(
    arch: str, method: Any, mode: str, first: bool, why: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = model_of(arch, method), _data(mode, first)
    with caplog.at_level(logging.INFO, "graft"):
        assert padding_free(_Run(None), data, model) == (why is None)  # type: ignore[arg-type]
    assert [why in line for line in caplog.messages] == ([True] if why else [])
    assert not padding_free(_Run(False), data, model)  # type: ignore[arg-type]
    if why is None:
        return
    known = "lets examples of one row see each other" if arch == "bloom" else why
    with pytest.raises(ConfigError, match=rf"data\.padding_free: .*{known}.*; leave it out"):
        padding_free(_Run(True), data, model)  # type: ignore[arg-type]


def test_state_from_token_to_token_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, state_size=4))
    graft.attach(model, graft.LoRA(rank=2, targets="all-linear"), "a")
    with pytest.raises(ConfigError, match="lets packed examples see each other"):
        check_packing(model)
    assert not padding_free(_Run(None), _data("causal", False), model)  # type: ignore[arg-type]


def test_the_dry_run_takes_the_batch_of_most_tokens() -> None:
    schedule = Schedule([20, 1, 1, 9, 9, 9], batch_size=3, group=False)
    schedule.batches = [[0, 1, 2], [3, 4, 5]]
    assert schedule.longest() == [0, 1, 2] and schedule.longest(flat=True) == [3, 4, 5]
