"""scripts/pretrain_base.py in ten steps: the loss falls, and the folder is a plain transformers one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "src/graft/assets/base"
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
STORY = "Once upon a time there was a {0}. The {0} liked to {1}.\nIt was a very happy {0}."
CHAT = [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "It ran."}]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_base", ROOT / "scripts/pretrain_base.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    stories = [STORY.format(who, what) for who in ("dog", "cat", "bird", "fox") for what in ("run", "sing", "read")] * 9
    file = tmp_path / "stories.txt"
    file.write_text("".join(f"{story} {i}\n<|endoftext|>\n" for i, story in enumerate(stories)), encoding="utf-8")
    return file


@pytest.mark.parametrize("flag", [[], ["--no-muon"]], ids=["muon", "adamw"])
def test_ten_steps(script: ModuleType, text: Path, tmp_path: Path, flag: list[str], capsys) -> None:
    config, out = tmp_path / "config.json", tmp_path / "deep" / "base"
    config.write_text(json.dumps(TINY), encoding="utf-8")
    sizes = ["--steps", "10", "--vocab", "320", "--window", "32", "--batch", "8", "--seed", "3"]
    seen: list[float] = []
    train = script.train
    script.train = lambda *args: seen.extend(train(*args))
    try:
        script.main([str(text), "--out", str(out), "--config", str(config), *sizes, *flag])
    finally:
        script.train = train
    assert len(seen) == 10
    assert seen[-1] < seen[0] - 0.3
    assert "held-out loss" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["base"], "temporary folders must be gone"

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer) == 320
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.decode(tokenizer("A naïve  dog\n").input_ids) == "A naïve  dog\n"
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert rendered == "<|user|>a dog<|assistant|>It ran.<|end|>"
    ids = tokenizer(rendered, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids[0, 0] == 3 and ids[0, -1] == tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert torch.isfinite(model(input_ids=ids).logits).all()

    with pytest.raises(SystemExit, match="there already"):
        script.main([str(text), "--out", str(out), *sizes])


def test_same_words_as_the_embedded_base(script: ModuleType) -> None:
    """The constants of the script are those of the base that ships."""
    embedded = AutoTokenizer.from_pretrained(ASSETS)
    assert embedded.chat_template == script.CHAT_TEMPLATE == (ASSETS / "chat_template.jinja").read_text()
    assert embedded.convert_ids_to_tokens(range(5)) == script.SPECIALS
    config = json.loads((ASSETS / "config.json").read_text())
    assert {key: config[key] for key in script.CONFIG} == script.CONFIG


def test_held_out_documents_and_rate(script: ModuleType) -> None:
    texts = [f"text {i % 75}" for i in range(150)]
    training, held_out = script.split(texts)
    assert held_out == ["text 49", "text 24", "text 74"]
    assert not set(training) & set(held_out)
    assert [script.rate(step, 100) for step in (0, 60)] == [1.0, 1.0]
    assert script.rate(80, 100) == pytest.approx(0.5)
    assert script.rate(99, 100) == pytest.approx(0.025)
    assert script.rate(100, 100) == pytest.approx(0.02)


def test_documents_of_a_file_without_separators(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("<|endoftext|>\nthree\n<|endoftext|>\n\n", encoding="utf-8")
    assert list(script.documents([tmp_path / "a.txt", tmp_path / "b.txt"])) == ["one\ntwo", "three"]
    with pytest.raises(SystemExit, match="one document or none"):
        script.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no such file"):
        script.main([str(tmp_path / "c.txt"), "--out", str(tmp_path / "out")])
