"""Generation with entries side by side equals generation one prompt and one entry at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from speaking import adapted, rows_of, speaking
from transformers import PreTrainedTokenizerBase

import graft
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import ConfigError, DataError, RouteError
from graft.evaluate.generate import Decoding, generate

PLAIN = Template(kind="plain")
SEVEN = Decoding(max_new_tokens=7)


def alone(model: Any, tokenizer: Any, rows: Sequence[Row], template: Template, entry: Any) -> list[str]:
    """Each prompt on its own, without padding, with what is in use."""
    graft.use(model, entry)
    texts = []
    for row in rows:
        batch = graft.prepare(model, {"input_ids": torch.tensor([template.prompt_ids(row, tokenizer)])})
        mask = {"attention_mask": torch.ones_like(batch["input_ids"])} | batch
        out = model.generate(**mask, max_new_tokens=7, do_sample=False, pad_token_id=1, eos_token_id=0)[0]
        start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        texts.append(tokenizer.decode(out[start:], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_one_batch_equals_one_by_one(name: str, tokenizer: PreTrainedTokenizerBase, prompts: list[Row]) -> None:
    lora, soft = graft.LoRA(targets="all-linear"), graft.PromptTuning(length=3)
    model = adapted(speaking(name), 2.0, lora=lora, soft=soft)
    template = Template(kind="plain", mode="seq2seq" if model.config.is_encoder_decoder else "causal")
    graft.use(model, "lora")
    found = generate(model, tokenizer, prompts, template, [None, "soft", "lora"], decoding=SEVEN, batch_size=2)
    assert model.adapters.used == (("lora", 1.0),)
    assert list(found) == ["base", "soft", "lora"]
    assert found["base"] == alone(model, tokenizer, prompts, template, None)
    assert found["soft"] == alone(model, tokenizer, prompts, template, "soft")
    assert found["lora"] == alone(model, tokenizer, prompts, template, "lora")
    assert len({tuple(texts) for texts in found.values()}) == 3, "the adapters change nothing: the test shows nothing"


def test_an_adapter_that_changes_the_base_takes_its_turn(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Row]
) -> None:
    model = speaking("llama")
    before = generate(model, tokenizer, prompts, PLAIN, decoding=SEVEN)
    adapter = graft.attach(model, graft.TopLayers(count=1), "top")
    for parameter in adapter.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    found = generate(model, tokenizer, prompts, PLAIN, ["top", None], decoding=SEVEN)
    assert found["base"] == before["base"] != found["top"]
    assert found["top"] == alone(model, tokenizer, prompts, PLAIN, "top")


def test_templates_of_their_own(tokenizer: PreTrainedTokenizerBase, prompts: list[Row]) -> None:
    model = adapted(speaking("llama"), a=graft.LoRA(targets="all-linear"))
    chat = Template(kind="chat").fit(prompts, tokenizer)
    found = generate(model, tokenizer, prompts, [PLAIN, chat], [None, "a"], decoding=SEVEN, batch_size=3)
    assert found["base"] == alone(model, tokenizer, prompts, PLAIN, None)
    assert found["a"] == alone(model, tokenizer, prompts, chat, "a")


def test_sampling_repeats_itself_and_leaves_the_random_state(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Row]
) -> None:
    model = speaking("llama")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    settings = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 7}
    runs = [generate(model, tokenizer, prompts, PLAIN, decoding=Decoding(**settings, seed=s)) for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(state, torch.get_rng_state())


def test_what_a_model_brings_along_does_not_change_greedy(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Row]
) -> None:
    model = speaking("llama")
    before = generate(model, tokenizer, prompts, PLAIN, decoding=SEVEN)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=2)
    assert generate(model, tokenizer, prompts, PLAIN, decoding=SEVEN) == before


def test_modes_are_as_before(tokenizer: PreTrainedTokenizerBase, prompts: list[Row]) -> None:
    model = speaking("llama").train()
    model.lm_head.eval()
    generate(model, tokenizer, prompts, PLAIN, decoding=SEVEN)
    assert model.training and model.model.layers[0].training and not model.lm_head.training


def test_the_context_bounds_answers_and_prompts(tokenizer: PreTrainedTokenizerBase, tmp_path: Any) -> None:
    model = speaking("gpt2", n_positions=32)
    text = "the cat sat on a mat and " * 3
    rows = rows_of(tmp_path, [{"prompt": text, "completion": "x"}])
    length = len(PLAIN.prompt_ids(rows[0], tokenizer))
    assert 16 < length < 32
    generate(model, tokenizer, rows, PLAIN, decoding=Decoding(max_new_tokens=500))
    rows = rows_of(tmp_path, [{"prompt": text * 3, "completion": "x"}])
    with pytest.raises(DataError, match=r"rows.jsonl row 1: \d+ tokens, the context has 32; shorten"):
        generate(model, tokenizer, rows, PLAIN)


def test_refusals(tokenizer: PreTrainedTokenizerBase, prompts: list[Row]) -> None:
    with pytest.raises(ConfigError, match="cannot generate text"):
        generate(speaking("bert_base"), tokenizer, prompts, PLAIN)
    with pytest.raises(RouteError, match="no adapters"):
        generate(speaking("llama"), tokenizer, prompts, PLAIN, ["a"])
    model = adapted(speaking("llama"), a=graft.LoRA())
    with pytest.raises(RouteError, match="no adapter is named 'b'; attached: a"):
        generate(model, tokenizer, prompts, PLAIN, [None, "b"])
    with pytest.raises(ConfigError, match="two of them are called 'a'"):
        generate(model, tokenizer, prompts, PLAIN, ["a", ("a",)])
    with pytest.raises(ConfigError, match="max_new_tokens 0"):
        Decoding(max_new_tokens=0)
