"""P-tuning v2: a prefix without the MLP, and the head of a sequence or token classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_counts import meta
from twins import adapted, close, copy_into, data_of, far, lively, peft_twin

import graft
from examples import perturb
from graft.method import CopyDelta, from_dict
from tiny import IDS, MODELS, batch

P = 3


def tagger() -> Any:
    """BERT with a label for each token."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**IDS, **{**MODELS["bert"][2], "initializer_range": 0.2})
    return transformers.BertForTokenClassification(config).eval()


def test_count_of_bert_large() -> None:
    """P 2 L d and the head: 983,040 + 2,050."""
    adapter = graft.attach(meta("bert-large"), graft.PTuningV2(length=20))
    assert adapter.trainable == adapter.saved == 985_090 == 20 * 24 * 2 * 1024 + 2 * 1025


def test_is_prefix_tuning_with_other_defaults() -> None:
    method = graft.PTuningV2(length=P)
    assert (method.hidden, method.dropout, method.head) == (None, 0.1, True)
    model, plain, data = adapted("bert", method), adapted("bert", graft.PrefixTuning(length=P)), data_of("bert")
    close(model(**data).logits, plain(**data).logits)
    assert from_dict(method.to_dict()) == method and method.to_dict()["method"] == "p_tuning_v2"
    with pytest.raises(graft.ConfigError, match="PTuningV2: length"):
        graft.PTuningV2(length=0)
    with pytest.raises(graft.SiteError, match="PTuningV2: where is for encoder-decoders"):
        graft.attach(lively("bert"), graft.PTuningV2(where="encoder"))


@pytest.mark.parametrize("arch", ["bert", "roberta", "tagger"])
def test_learns_labels(arch: str) -> None:
    """Prefix and head train together, the base stays; the loss on one batch falls under a tenth."""
    model = tagger() if arch == "tagger" else lively(arch)
    kind = "bert" if arch == "tagger" else arch
    data = dict(batch(kind, 4))
    if arch == "tagger":
        data["labels"] = (data["input_ids"] % 3).masked_fill(data["attention_mask"] == 0, -100)
    torch.manual_seed(0)
    adapter = graft.attach(model, graft.PTuningV2(length=8), "a")
    heads = [site.path for site, delta in adapter.items() if isinstance(delta, CopyDelta)]
    assert heads == ["classifier"]
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("adapters.")}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    first = model(**data).loss
    model.adapters.train()
    for _ in range(150):
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.adapters.eval()
    assert model(**data).loss < 0.1 * first
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # peft's own
def test_token_classification_equals_peft() -> None:
    import peft

    model = tagger()
    adapter = perturb(graft.attach(model, graft.PTuningV2(length=P), "a"), 1, 0.3)
    other = peft.get_peft_model(tagger(), peft.PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=P)).eval()
    copy_into(other.prompt_encoder["default"].embedding.weight, adapter.shared.table)
    for name, parameter in adapter.at("classifier").copy.named_parameters():
        copy_into(other.base_model.classifier.modules_to_save["default"].get_parameter(name), parameter)
    data = data_of("bert")
    close(model(**data).logits, other(**data).logits)
    far(model(**data).logits, tagger()(**data).logits)


def test_sequence_classification_equals_peft() -> None:
    import peft

    model = adapted("bert", graft.PTuningV2(length=P, head=False))
    other = peft_twin("bert", peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P))
    copy_into(other.prompt_encoder["default"].embedding.weight, model.adapters["a"].shared.table)
    close(model(**data_of("bert")).logits, other(**data_of("bert")).logits)
