"""Forgetting on general text against dense loops in double precision, and what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft
from graft import bank
from graft.base import load_tokenizer
from graft.errors import ConfigError, DataError
from graft.evaluate.forgetting import Forgetting, forgetting
from graft.evaluate.general import pieces
from graft.fast import cross_entropy, kl
from graft.fast.loss import Outputs
from graft.methods.bottleneck import Bottleneck
from graft.methods.full import FullFineTuning
from graft.methods.lora import LoRA
from graft.methods.prefix import PrefixTuning
from graft.methods.prompt import PromptTuning
from tiny import VOCAB, tiny

TEXT = "\n".join(f"The {a} hen saw {i} foxes and ran to the {b}." for i, (a, b) in enumerate(
    [("old", "barn"), ("red", "house"), ("wise", "river"), ("small", "hill")] * 30))  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    torch.set_num_threads(1)
    return load_tokenizer("embedded")


def texts(count: int = 5, shortest: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (shortest + 2 * i,), generator=generator).tolist() for i in range(count)]


def shaken(model: Any, *methods: Any) -> Any:
    """The model in double precision with adapters "0", "1", ... that change it well."""
    model = model.double()
    torch.manual_seed(0)
    for number, method in enumerate(methods):
        graft.attach(model, method, str(number))
        with torch.no_grad():
            for parameter in bank.bank_of(model)[str(number)].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def dense(model: Any, base: Any, found: list[list[int]], entry: Any, two: bool) -> Forgetting:
    """The definition: one text at a time, all logits, the base another model."""
    loss = base_loss = kl = 0.0
    count = 0
    graft.use(model, entry)
    for ids in found:
        half = len(ids) // 2
        target = torch.tensor(ids[half:] if two else ids[1:])
        logits: list[Tensor] = []
        for each in (base, model):
            batch = {"input_ids": torch.tensor([ids[:half] if two else ids])}
            batch |= {"labels": target[None]} if two else {}
            if each is model:
                batch = graft.prepare(each, batch)
            with torch.no_grad():
                out = each(**batch).logits[0].double()
            logits.append((out if two else out[-len(ids) : -1]).log_softmax(-1))
        p, q = logits
        loss -= float(q[range(len(target)), target].sum())
        base_loss -= float(p[range(len(target)), target].sum())
        kl += float((p.exp() * (p - q)).sum())
        count += len(target)
    return Forgetting(loss / count, base_loss / count, kl / count, count)


def same(left: Forgetting, right: Forgetting, within: float = 1e-6) -> bool:
    """As near as softmaxes and norms in fp32 allow."""
    return left.tokens == right.tokens and all(
        abs(getattr(left, name) - getattr(right, name)) < within for name in ("loss", "base_loss", "kl")
    )


CASES: dict[str, tuple[str, list[Any], list[Any]]] = {
    "side by side": ("llama", [LoRA(rank=4), Bottleneck(size=4)], ["0", {"0": 0.5}, "1", ("0", "1")]),
    "at the head": ("llama", [LoRA(rank=4, targets=("q_proj", "lm_head"))], ["0", {"0": 0.3}]),
    "prefix and prompt": ("llama", [PrefixTuning(length=3), PromptTuning(length=2)], ["0", "1"]),
    "encoder-decoder": ("t5", [LoRA(rank=4)], ["0", {"0": 2.0}]),
    "full": ("llama", [FullFineTuning()], ["0"]),
    "full, tied": ("gpt2", [FullFineTuning()], ["0"]),
    "full, encoder-decoder": ("t5", [FullFineTuning()], ["0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_kl_are_those_of_a_dense_loop(case: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 7)
    arch, methods, entries = CASES[case]
    model, base, found = shaken(tiny(arch), *methods), tiny(arch).double(), texts()
    graft.use(model, "0")
    measured = forgetting(model, tokenizer, found, [None, *entries], batch_size=2)
    assert bank.bank_of(model).used == (("0", 1.0),), "what is in use stays"
    for entry, got in zip([None, *entries], measured, strict=True):
        expected = dense(model, base, found, entry, arch == "t5")
        assert same(got, expected), (entry, got, expected)
        assert (got.kl > 1e-4) == bool(entry), "the comparison itself must see a difference"
    assert measured[0].loss == measured[0].base_loss and measured[0].kl == 0.0


def test_a_base_without_adapters(tokenizer: Any) -> None:
    (got,) = forgetting(tiny("llama").double(), tokenizer, texts(), [None])
    model = shaken(tiny("llama"), LoRA(rank=2))
    assert same(got, dense(model, tiny("llama").double(), texts(), None, False))


@pytest.mark.parametrize("method", [LoRA(rank=4), FullFineTuning()])
def test_a_head_that_is_not_known_takes_whole_logits(tokenizer: Any, method: Any) -> None:
    """A hook of somebody else's on the head."""
    model = shaken(tiny("llama"), method)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.0)
    (got,) = forgetting(model, tokenizer, texts(), ["0"])
    assert same(got, dense(model, tiny("llama").double(), texts(), "0", False))


@pytest.mark.parametrize("own", [False, True])
def test_measuring_leaves_the_head_as_it_was(tokenizer: Any, own: bool) -> None:
    """A forward of its own would be somebody's patch, which faster paths refuse."""
    model = shaken(tiny("llama"), FullFineTuning())
    if own:
        model.lm_head.forward = mine = lambda x: nn.Linear.forward(model.lm_head, x)
    before = dict(model.lm_head.__dict__)
    (got,) = forgetting(model, tokenizer, texts(), ["0"])
    assert got.kl > 0 and model.lm_head.__dict__.keys() == before.keys()
    if own:
        assert model.lm_head.forward is mine


def test_the_second_forward_of_a_chunk_knows_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`checkpoint` keeps the random state of the devices of the tensors that it is given, so one must be."""
    given: list[Any] = []

    def noted(part: Any, *args: Any, **more: Any) -> Tensor:
        given.extend(arg for arg in args if isinstance(arg, Tensor) and arg.device == target_N.device)
        return part(*args)

    monkeypatch.setattr(kl, "checkpoint", noted)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 8)
    target_N, logits_NV = torch.arange(9), torch.randn(9, 11, generator=torch.Generator().manual_seed(0))
    sides = [Outputs(target_N, 11, lambda where, by=by: by * logits_NV[where]) for by in (1.0, 2.0)]
    expected = nn.functional.kl_div(
        (2 * logits_NV).log_softmax(-1), logits_NV.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert float(kl.kl_sum(*sides)) == pytest.approx(float(expected), rel=1e-5)
    assert sum(map(len, given)) == 9 and len(given) == 3


def test_chunks_never_hold_the_logits_of_a_batch(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 8)
    model = shaken(tiny("llama"), LoRA(rank=4))
    rows: list[int] = []
    plain = nn.Linear.forward

    def noted(module: nn.Linear, x: Tensor) -> Tensor:
        if module is model.lm_head:
            rows.append(x.flatten(0, -2).shape[0])
        return plain(module, x)

    monkeypatch.setattr(nn.Linear, "forward", noted)
    forgetting(model, tokenizer, texts(6, 20), ["0"], batch_size=6)
    assert max(rows) <= 4 and len(rows) > 10


def test_pieces_are_a_fixed_sample(tokenizer: Any, tmp_path: Path) -> None:
    config = tiny("llama").config
    plain, lines = tmp_path / "general.txt", tmp_path / "general.jsonl"
    plain.write_text(TEXT, encoding="utf-8")
    lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.split("\n")), encoding="utf-8")
    for source in (plain, lines):
        found = pieces(source, tokenizer, config, limit=300)
        assert found == pieces(str(source), tokenizer, config, limit=300)
        assert found != pieces(source, tokenizer, config, limit=300, seed=1)
        assert 290 <= sum(map(len, found)) <= 300
        assert all(len(piece) <= config.max_position_embeddings * 3 // 4 for piece in found)
        text = TEXT.replace("\n", " ")
        assert all(tokenizer.decode(piece).replace("\n", " ").strip() in text for piece in found)


def test_what_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    for arch, word in (("bert", "language model head"), ("gpt2_cls", "language model head")):
        with pytest.raises(ConfigError, match=word):
            forgetting(tiny(arch), tokenizer, texts(), [None])
    with pytest.raises(DataError, match=r"nothing\.txt: no such file"):
        forgetting(tiny("llama"), tokenizer, tmp_path / "nothing.txt", [None])
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="no text of at least two tokens"):
        forgetting(tiny("llama"), tokenizer, tmp_path / "empty.txt", [None])
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="needs a column 'text'"):
        forgetting(tiny("llama"), tokenizer, tmp_path / "rows.jsonl", [None])
    with pytest.raises(DataError, match="the context has 128"):
        forgetting(tiny("gpt2"), tokenizer, [[5] * 200], [None])


def test_a_masked_language_model_is_refused_by_name(tokenizer: Any) -> None:
    from transformers import BertForMaskedLM

    with pytest.raises(ConfigError, match="BertForMaskedLM is a masked language model"):
        forgetting(BertForMaskedLM(tiny("bert").config), tokenizer, texts(), [None])
