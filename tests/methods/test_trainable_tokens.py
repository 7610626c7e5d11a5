"""Trainable tokens against rows written into the embedding by hand, resized bases, and peft both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_counts import meta
from torch import Tensor
from twins import adapted, close, data_of, far, lively, peft_twin

import graft
from graft.base import load_base, load_tokenizer
from graft.method import from_dict
from tiny import IDS, VOCAB, tiny

TIED = ("llama_tied", "gpt2", "t5", "mt5", "bart", "opt")
ARCHS = ("llama", "bert", "gemma3", "llama_cls", *TIED)
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def used(arch: str) -> tuple[int, ...]:
    """Ids that stand in the batch, in no order, and one that does not."""
    ids = data_of(arch)["input_ids"]
    free = next(token for token in range(5, VOCAB) if not (ids == token).any())
    return (int(ids[0, 3]), int(ids[1, 1]), free, int(ids[0, 5]))


def method(arch: str, **options: Any) -> graft.TrainableTokens:
    return graft.TrainableTokens(tokens=used(arch), head=False, **options)


@pytest.mark.parametrize("arch", ARCHS)
def test_equals_rows_written_into_the_embedding(arch: str) -> None:
    """A tied head reads the same table, by hand and in the adapter; one with a weight of its own does not change."""
    model, data = adapted(arch, method(arch)), data_of(arch)
    hand = lively(arch)
    far(model(**data).logits, hand(**data).logits)
    with torch.no_grad():
        hand.get_input_embeddings().weight[list(used(arch))] = model.adapters["a"].shared.rows
    close(model(**data).logits, hand(**data).logits)
    heads = [path for path in model.adapters["a"].sites if path.endswith("lm_head")]
    assert heads == (["lm_head"] if arch in TIED else [])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bart"])
def test_only_the_named_rows_get_gradients_and_they_are_the_embedding_s_own(arch: str) -> None:
    model, data = adapted(arch, method(arch)), data_of(arch)
    hand = lively(arch)
    with torch.no_grad():
        hand.get_input_embeddings().weight[list(used(arch))] = model.adapters["a"].shared.rows
    for each in (model, hand):
        each(**data).logits.square().sum().backward()
    expected = hand.get_input_embeddings().weight.grad[list(used(arch))]
    close(model.adapters["a"].shared.rows.grad, expected, 1e-4)
    assert model.adapters["a"].trainable == model.adapters["a"].saved == 4 * 32


@pytest.mark.parametrize("arch", ["llama", "gemma3", *TIED])
def test_a_tied_weight_merges_for_both(arch: str) -> None:
    model, data = adapted(arch, method(arch)), data_of(arch)
    expected = model(**data).logits
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graft.merge(model, "a")
    close(model(**data).logits, expected)
    if arch in TIED:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    graft.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_half_a_weight_is_half_way() -> None:
    model, data = adapted("gpt2", method("gpt2")), data_of("gpt2")
    hand, rows = lively("gpt2"), list(used("gpt2"))
    with torch.no_grad():
        table = hand.transformer.wte.weight
        table[rows] += 0.5 * (model.adapters["a"].shared.rows - table[rows])
    graft.use(model, {"a": 0.5})
    close(model(**data).logits, hand(**data).logits)
    graft.merge(model, {"a": 0.5})
    close(model(**data).logits, hand(**data).logits)


@quiet
def test_the_bias_of_a_tied_head_stays() -> None:
    """peft computes such a head without its bias: our own form keeps it, peft's drops it too."""
    import peft

    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, **IDS
    )

    def masked() -> Any:
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(config).eval()
        with torch.no_grad():
            model.cls.predictions.bias.normal_(generator=torch.Generator().manual_seed(1))
        return model

    data, tokens = data_of("bert"), used("bert")
    model = masked()
    before = model(**data).logits
    graft.attach(model, graft.TrainableTokens(tokens=tokens), "a")
    close(model(**data).logits, before)
    theirs = peft.get_peft_model(masked(), peft.TrainableTokensConfig(token_indices=list(tokens))).eval()
    compatible = masked()
    graft.attach(compatible, graft.TrainableTokens(tokens=tokens), "a", peft_compat=True)
    close(compatible(**data).logits, theirs(**data).logits)
    far(compatible(**data).logits, before)


def test_a_half_precision_base_keeps_its_dtype() -> None:
    model = tiny("gpt2").to(torch.bfloat16)
    before = model(**data_of("gpt2")).logits
    adapter = graft.attach(model, method("gpt2"))
    logits: Tensor = model(**data_of("gpt2")).logits
    assert logits.dtype == torch.bfloat16 and {p.dtype for p in adapter.parameters()} == {torch.float32}
    close(logits.float(), before.float(), 0.02)


def test_counts() -> None:
    """Three tokens of Llama-2-7B: 12,288 values, not the 262,144,000 of both tables; tied ones count once."""
    for name, width in (("Llama-2-7B", 4096), ("Qwen2.5-0.5B", 896), ("bart-large", 1024)):
        adapter = graft.attach(meta(name), graft.TrainableTokens(tokens=(5, 6, 7)))
        assert adapter.trainable == adapter.saved == 3 * width


# -------------------------------------------------------------------------------------------------- tokens as strings


def test_strings_become_ids_which_the_file_holds() -> None:
    tokenizer = load_tokenizer("embedded")
    token = tokenizer.convert_ids_to_tokens(300)
    made = graft.TrainableTokens(tokens=(token, 301), tokenizer=tokenizer)
    assert made.tokens == (300, 301) and made.to_dict() == {"method": "trainable_tokens", "tokens": [300, 301]}
    with pytest.raises(graft.ConfigError, match=r"no token of the tokenizer; call tokenizer.add_tokens\(\['<new>'\]\)"):
        graft.TrainableTokens(tokens=("<new>",), tokenizer=tokenizer)
    with pytest.raises(graft.ConfigError, match="needs tokenizer="):
        graft.attach(tiny("llama"), graft.TrainableTokens(tokens=("<new>",)))


def test_new_tokens_of_a_real_tokenizer(tmp_path: Path) -> None:
    """Add tokens, resize, attach by their strings, save; a fresh base resized in the same way gives the same logits."""
    tokenizer = load_tokenizer("embedded")
    tokenizer.add_tokens(["<tool>", "</tool>"])

    def resized(seed: int) -> Any:
        torch.manual_seed(seed)
        model = load_base("embedded", precision="fp32")
        model.resize_token_embeddings(len(tokenizer))
        return model

    model = resized(0)
    adapter = graft.attach(model, graft.TrainableTokens(tokens=("<tool>", "</tool>"), tokenizer=tokenizer), "a")
    with torch.no_grad():
        adapter.shared.rows.add_(0.5)  # type: ignore[union-attr, operator]
    data = tokenizer("Call <tool> now </tool>", return_tensors="pt")
    graft.save(model, "a", tmp_path / "a")
    rows = load_file(tmp_path / "a" / "adapter_model.safetensors").values()  # peft's form has them for a tied head too
    assert {tuple(tensor.shape) for tensor in rows} == {(2, model.config.hidden_size)} and len(rows) <= 2
    again = resized(1)
    far(again(**data).logits, model(**data).logits)
    graft.load(again, tmp_path / "a", "a")
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    old = slice(None) if tied else slice(0, len(tokenizer) - 2)  # an untied head has new rows of its own
    close(again(**data).logits[..., old], model(**data).logits[..., old])


# -------------------------------------------------------------------------------------------------- resized bases


def resized(arch: str, size: int, seed: int = 0) -> Any:
    model = tiny(arch)
    torch.manual_seed(seed)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


@pytest.fixture(params=["llama", "gpt2", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Tensor]:
    """An adapter for three new tokens of a base that was resized for them, and its logits."""
    arch = request.param
    model = resized(arch, VOCAB + 3)
    adapter = graft.attach(model, graft.TrainableTokens(tokens=(VOCAB, VOCAB + 1, VOCAB + 2)), "a")
    with torch.no_grad():
        adapter.shared.rows.normal_(generator=torch.Generator().manual_seed(2))  # type: ignore[union-attr, operator]
    graft.save(model, "a", tmp_path / "a")
    return arch, tmp_path / "a", model(**new_data(arch)).logits.detach()


def new_data(arch: str) -> dict[str, Tensor]:
    data = data_of(arch)
    data["input_ids"][0, 2] = VOCAB + 1
    return data


def test_a_base_without_the_new_rows_is_refused_and_says_what_to_do(folder: Any) -> None:
    arch, path, _ = folder
    message = r"102 tokens in its embedding, here it has 99: call model.resize_token_embeddings\(102\) first"
    with pytest.raises(graft.AdapterFileError, match=message):
        graft.load(tiny(arch), path)
    with pytest.raises(graft.AdapterFileError, match=r"token 101 has no row, .* ends at 98; call model.resize_token"):
        graft.load(tiny(arch), path, check="off")


def test_a_base_resized_with_other_random_rows_is_the_same(folder: Any) -> None:
    arch, path, want = folder
    model = resized(arch, VOCAB + 3, seed=5)
    assert graft.load(model, path, "a").note is None
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    got = model(**new_data(arch)).logits
    close(got if tied else got[..., :VOCAB], want if tied else want[..., :VOCAB])


def test_a_base_with_still_more_rows_is_recognised_with_a_note(folder: Any) -> None:
    arch, path, want = folder
    model = resized(arch, 128, seed=5)
    adapter = graft.load(model, path, "a")
    assert adapter.note == "the embedding has 128 tokens here, and had 102 where the adapter was made"
    close(model(**new_data(arch)).logits[..., :VOCAB], want[..., :VOCAB])
    assert adapter.card is not None and adapter.card["probe"]["outputs"] == 102
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        assert graft.files.check_saved(model, "a") < 1e-5


def test_another_base_with_more_rows_is_still_another_base(folder: Any) -> None:
    arch, path, _ = folder
    model = resized(arch, 128)
    with torch.no_grad():
        model.get_input_embeddings().weight[: VOCAB // 2].add_(0.1)
    with pytest.raises(graft.AdapterFileError, match="the values of"):
        graft.load(model, path)


def test_any_adapter_may_go_to_a_base_with_more_tokens(tmp_path: Path) -> None:
    model, data = adapted("llama", graft.LoRA(rank=2)), data_of("llama")
    graft.save(model, "a", tmp_path / "a")
    more = lively("llama")
    more.resize_token_embeddings(128)
    adapter = graft.load(more, tmp_path / "a", "a")
    assert "128 tokens here, and had 99" in str(adapter.note)
    close(more(**data).logits[..., :VOCAB], model(**data).logits)
    assert graft.files.check_saved(more, "a") < 1e-5


def test_errors() -> None:
    for tokens in ((), "5", 5):
        with pytest.raises(graft.ConfigError, match=r"tokens(:| is a list of ids)"):
            graft.TrainableTokens(tokens=tokens)  # type: ignore[arg-type]
    for wrong in (-1, True, 2.5):
        with pytest.raises(graft.ConfigError, match=r"tokens(:| are ids from 0)"):
            graft.TrainableTokens(tokens=(3, wrong))  # type: ignore[arg-type]
    with pytest.raises(graft.ConfigError, match="names 7 twice"):
        graft.TrainableTokens(tokens=(7, 5, 7))
    with pytest.raises(graft.ConfigError, match="layers has no meaning"):
        graft.TrainableTokens(tokens=(7,), layers=1)
    with pytest.raises(graft.SiteError, match=r"token 99 has no row.*resize_token_embeddings\(100\)"):
        graft.attach(tiny("llama"), graft.TrainableTokens(tokens=(7, 99)))
    with pytest.raises(graft.SiteError, match="ViTForImageClassification has no token embedding"):
        graft.attach(tiny("vit"), graft.TrainableTokens(tokens=(7,)))
    with pytest.raises(graft.ConfigError, match="did you mean 'tokens'"):
        from_dict({"method": "trainable_tokens", "token": [5]})


# -------------------------------------------------------------------------------------------------- peft

TASKS = dict.fromkeys(("llama", "llama_tied", "gpt2", "gemma3"), "CAUSAL_LM") | {"bert": "SEQ_CLS"}
TASKS |= dict.fromkeys(("t5", "mt5", "bart"), "SEQ_2_SEQ_LM")


def theirs(arch: str, **options: Any) -> Any:
    import peft

    return peft.TrainableTokensConfig(task_type=TASKS[arch], token_indices=list(used(arch)), **options)


def moved_twin(arch: str, config: Any = None, **options: Any) -> Any:
    twin = peft_twin(arch, config or theirs(arch, **options))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return twin


@quiet
@pytest.mark.parametrize("arch", sorted(TASKS))
def test_peft_writes_we_load_and_back(arch: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    import peft

    data, twin = data_of(arch), moved_twin(arch)
    twin.save_pretrained(tmp_path / "theirs")
    want = twin(**data).logits
    model = lively(arch)
    far(want, model(**data).logits)
    adapter = graft.load(model, tmp_path / "theirs", "a")
    assert adapter.method == method(arch) and adapter.peft_compat
    close(model(**data).logits, want)
    graft.save(model, "a", tmp_path / "ours", form="peft")
    close(peft.PeftModel.from_pretrained(lively(arch), tmp_path / "ours").eval()(**data).logits, want)
    assert not any("keys" in str(warning.message) or "Unexpected" in str(warning.message) for warning in recwarn)
    (tmp_path / "ours" / "graft.json").unlink()
    again = lively(arch)
    graft.load(again, tmp_path / "ours", "b")
    assert torch.equal(again(**data).logits, model(**data).logits)


@pytest.mark.parametrize("arch", ["t5", "bart"])
def test_a_table_that_several_stacks_share_loads_whatever_the_files_order(arch: str, tmp_path: Path) -> None:
    data, model = data_of(arch), adapted(arch, graft.TrainableTokens(tokens=(5, 6)))
    graft.save(model, "a", tmp_path / "a")
    again = lively(arch)
    graft.load(again, tmp_path / "a", "a")
    assert torch.equal(again(**data).logits, model(**data).logits)


def test_a_peft_config_object() -> None:
    import peft

    adapter = graft.attach(tiny("gpt2"), theirs("gpt2", target_modules=["wte"]))
    assert adapter.method == method("gpt2") and adapter.peft_compat
    with pytest.raises(graft.ConfigError, match="lm_head is not the input embedding"):
        graft.attach(tiny("gpt2"), theirs("gpt2", target_modules=["wte", "lm_head"]))
    with pytest.raises(graft.ConfigError, match="init_weights = false"):
        graft.attach(tiny("gpt2"), theirs("gpt2", init_weights=False))
    with pytest.raises(graft.ConfigError, match=r"tokens(:| is a list of ids)"):
        graft.attach(tiny("gpt2"), peft.TrainableTokensConfig(token_indices=[]))


def test_broken_peft_folders(tmp_path: Path) -> None:
    moved_twin("llama", target_modules=["lm_head"]).save_pretrained(tmp_path / "head")
    with pytest.raises(graft.AdapterFileError, match="lm_head is not the input embedding"):
        graft.load(lively("llama"), tmp_path / "head")
    moved_twin("llama").save_pretrained(tmp_path / "short")
    file = tmp_path / "short" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"token_indices": config["token_indices"][:2]}))
    with pytest.raises(graft.AdapterFileError, match=r"has shape \(4, 32\), this model and config need \(2, 32\)"):
        graft.load(lively("llama"), tmp_path / "short")


def test_our_own_form_where_a_head_trains_along(tmp_path: Path) -> None:
    """peft's TRAINABLE_TOKENS trains no head, so such an adapter is a folder of our own."""
    whole = graft.TrainableTokens(tokens=used("bert"))
    model, data = adapted("bert", whole), data_of("bert")
    with pytest.raises(graft.AdapterFileError, match="trains no module whole, such as classifier"):
        graft.save(model, "a", tmp_path / "a", form="peft")
    graft.save(model, "a", tmp_path / "a")
    again = lively("bert")
    assert graft.load(again, tmp_path / "a", "a").method == whole
    assert torch.equal(again(**data).logits, model(**data).logits)


@quiet
@pytest.mark.parametrize("arch", ["llama", "llama_tied", "gpt2", "bert", "t5", "bart"])
def test_tokens_beside_peft_s_lora(arch: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """peft's `trainable_token_indices` is a composition here, and goes back as one folder of peft's."""
    import peft

    config = peft.LoraConfig(task_type=TASKS[arch], r=3, trainable_token_indices=list(used(arch)))
    data, twin = data_of(arch), moved_twin(arch, config)
    twin.save_pretrained(tmp_path / "theirs")
    want = twin(**data).logits
    model = lively(arch)
    method = graft.load(model, tmp_path / "theirs", "a").method
    assert [part.name for part in method.parts] == ["lora", "trainable_tokens"]  # type: ignore[attr-defined]
    close(model(**data).logits, want)
    graft.save(model, "a", tmp_path / "ours")
    assert not any(path.is_dir() for path in (tmp_path / "ours").iterdir())
    close(peft.PeftModel.from_pretrained(lively(arch), tmp_path / "ours").eval()(**data).logits, want)
    assert not any("keys" in str(warning.message) or "Unexpected" in str(warning.message) for warning in recwarn)
    for bare in (False, True):
        if bare:
            (tmp_path / "ours" / "graft.json").unlink()
        again = lively(arch)
        graft.load(again, tmp_path / "ours", "b")
        assert torch.equal(again(**data).logits, model(**data).logits)


@quiet
def test_what_tokens_beside_peft_s_lora_cannot_be(tmp_path: Path) -> None:
    import peft

    def config(**options: Any) -> Any:
        return peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options)

    adapter = graft.attach(tiny("llama"), config(trainable_token_indices={"embed_tokens": [5, 9]}))
    assert adapter.trainable == 2 * 2 * (32 + 32) + 2 * 2 * (32 + 16) + 2 * 32
    with pytest.raises(graft.ConfigError, match="lm_head is not the input embedding"):
        graft.attach(tiny("llama"), config(trainable_token_indices={"lm_head": [5]}))
    composed = adapted("llama", graft.Compose(graft.LoRA(rank=2), graft.IA3()))
    with pytest.raises(graft.AdapterFileError, match="but for trainable tokens beside LoRA"):
        graft.save(composed, "a", tmp_path / "a", form="peft")
