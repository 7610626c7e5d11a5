"""Rows of tokens, and resized vocabularies, in peft's folders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import graft
from examples import perturb
from tiny import EOS, IDS, MODELS, VOCAB, batch, tiny

CLASSIFIERS = {"bart": "BartForSequenceClassification", "t5": "T5ForSequenceClassification"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """peft warns of tied weights, and of what transformers deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def classifier(arch: str) -> Any:
    config = getattr(transformers, MODELS[arch][1])(**{**IDS, **MODELS[arch][2], "num_labels": 3})
    torch.manual_seed(0)
    return getattr(transformers, CLASSIFIERS[arch])(config).eval()


def sentences(arch: str) -> dict[str, Tensor]:
    """Two rows that end alike, with no padding: such classifiers look for the end."""
    ids = batch(arch, 2)["input_ids"][:, :6].clone()
    ids[1] = ids[0].flip(0)
    ids[:, -1] = EOS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def moved(twin: Any) -> Any:
    """peft's model with all that trains changed."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return twin.eval()


# ------------------------------------------------------------------------------------------------- tied tables


@torch.no_grad()
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside LoRA"])
@pytest.mark.parametrize("arch", sorted(CLASSIFIERS))
def test_rows_of_a_classifier_that_peft_never_reads_are_in_our_own_form(
    arch: str, beside: bool, tmp_path: Path
) -> None:
    """peft puts them at `shared`, which does not run: its own adapter changes nothing."""
    import peft

    data = sentences(arch)
    tokens = sorted({int(token) for token in data["input_ids"][0, :3]})
    rows = graft.TrainableTokens(tokens=tuple(tokens), head=False)
    model = classifier(arch)
    base = model(**data).logits
    method = graft.Compose(graft.LoRA(rank=2), rows, head=False) if beside else rows
    perturb(graft.attach(model, method, "a"), 1, 0.3)
    want = model(**data).logits
    assert (want - base).abs().max() > 1e-3
    with pytest.raises(graft.AdapterFileError, match=r"peft trains rows at .*shared, and leaves .*embed_tokens"):
        graft.save(model, "a", tmp_path / "peft", form="peft")
    graft.save(model, "a", tmp_path / "a")
    again = classifier(arch)
    graft.load(again, tmp_path / "a", "a")
    assert torch.equal(again(**data).logits, want)

    config = peft.TrainableTokensConfig(token_indices=tokens)
    if beside:
        config = peft.LoraConfig(r=2, target_modules=["classification_head.dense"], trainable_token_indices=tokens)
    twin = moved(peft.get_peft_model(classifier(arch), config))
    if not beside:
        assert torch.equal(twin(**data).logits, base)
    twin.save_pretrained(tmp_path / "theirs")
    with pytest.raises(graft.AdapterFileError, match=r"peft trains rows at .*shared, and leaves .*embed_tokens"):
        graft.load(classifier(arch), tmp_path / "theirs")


@torch.no_grad()
@pytest.mark.parametrize("whole", ["lm_head", "model.norm"])
def test_rows_beside_a_module_that_is_kept_whole(whole: str, tmp_path: Path) -> None:
    import peft

    data = batch("llama")
    tokens = sorted({int(token) for token in data["input_ids"][0, :3]})
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=[whole], trainable_token_indices=tokens)
    twin = moved(peft.get_peft_model(tiny("llama"), config))
    twin.save_pretrained(tmp_path / "theirs")
    want = twin(**data).logits
    model = tiny("llama")
    adapter = graft.load(model, tmp_path / "theirs", "a")
    assert whole in adapter.sites and "model.embed_tokens" in adapter.sites
    torch.testing.assert_close(model(**data).logits, want, atol=1e-5, rtol=1e-5)
    graft.save(model, "a", tmp_path / "ours", form="peft")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(**data).logits, want, atol=1e-5, rtol=1e-5)
    attached = graft.attach(tiny("llama"), config, "b")
    assert set(attached.sites) == set(adapter.sites)


def test_rows_beside_a_tied_head_that_is_kept_whole_are_refused(tmp_path: Path) -> None:
    model = tiny("llama_tied")
    graft.attach(model, graft.Compose(graft.LoRA(rank=2), graft.TrainableTokens(tokens=(5, 6))), "a")
    folder = graft.save(model, "a", tmp_path / "a", form="peft")
    (folder / "graft.json").unlink()
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(
        config.replace('"modules_to_save": null', '"modules_to_save": ["lm_head"]')
    )
    with pytest.raises(graft.AdapterFileError, match=r"trainable_token_indices beside lm_head .* whose rows train"):
        graft.load(tiny("llama_tied"), folder)


# ------------------------------------------------------------------------------------------------- resized vocabularies


def resized(arch: str, seed: int) -> Any:
    model = tiny(arch)
    torch.manual_seed(seed)
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    return model


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids=["plain", "embedding adapted"])
@pytest.mark.parametrize("arch", ["llama", "llama_tied"])
def test_a_folder_of_a_resized_base_says_what_to_do(arch: str, targets: list[str], tmp_path: Path) -> None:
    """New rows start at random, and peft keeps them in the folder: whoever does what each error says gets peft's."""
    import peft

    data = batch(arch)
    data["input_ids"][0, 2] = VOCAB + 1
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
    twin = moved(peft.get_peft_model(resized(arch, 0), config))
    twin.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(graft.AdapterFileError, match=rf"call model.resize_token_embeddings\({VOCAB + 3}\) first"):
        graft.load(tiny(arch), tmp_path / "a")
    model = resized(arch, 1)
    told: list[str] = []
    for _ in range(3):
        try:
            graft.load(model, tmp_path / "a", "a")
            break
        except graft.AdapterFileError as error:
            message = str(error)
        assert f"rows {VOCAB} to {VOCAB + 2} of " in message and "\n" not in message
        tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
        line = message.partition("put the file's in first: ")[2].partition(", where")[0]
        exec(line, {"model": model, "tensors": tensors})
        told.append(line)
    plain = targets == ["q_proj"]
    assert len(told) == (2 if plain and arch == "llama" else 1)
    here = slice(None) if plain or arch == "llama_tied" else slice(VOCAB)  # peft saves no lm_head then
    torch.testing.assert_close(model(**data).logits[..., here], twin(**data).logits[..., here], atol=1e-5, rtol=1e-5)
    changed = resized(arch, 1)
    changed.get_input_embeddings().weight[3:9] += 1
    with pytest.raises(graft.AdapterFileError, match="the adapter belongs to a changed base"):
        graft.load(changed, tmp_path / "a")
