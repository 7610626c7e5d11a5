"""Tokenizers for the data tests: the embedded one where it is, and tiny ones built on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ASSETS = Path(__file__).parents[2] / "src" / "graft" / "assets"
TEXTS = [
    "the quick brown fox jumps over the lazy dog and asks: is the review positive or negative?\n",
    "user assistant system hello there, how are you today? I am fine, thank you. name[The Vaults], area[city centre]\n",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_bpe(**special: str) -> PreTrainedTokenizerBase:
    """GPT-2's kind: byte-level BPE; leading blanks belong to words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    names = ["<|im_start|>", "<|im_end|>", "<pad>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    special = {"eos_token": "<|im_end|>", "pad_token": "<pad>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerBase:
    """Byte-level BPE with a ChatML template that also marks the assistant's tokens itself."""
    tokenizer = byte_bpe()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def bos_bpe() -> PreTrainedTokenizerBase:
    """The same, but every text begins with <s>."""
    tokenizer = byte_bpe(bos_token="<s>")
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerBase:
    """BERT's kind: whole words, [CLS] and [SEP], segment numbers; its end token is [SEP]."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {w: i for i, w in enumerate([*names, *sorted({w for t in TEXTS for w in t.split()})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]", "bos_token": "[CLS]"}
    names_out = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names_out, **special)


@pytest.fixture(scope="session")
def base() -> PreTrainedTokenizerBase:
    """The embedded tokenizer."""
    if not (ASSETS / "base" / "tokenizer.json").is_file():
        pytest.skip("the embedded base is not here")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "base")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(name, *rows): a JSONL file of objects, or a file of text or bytes."""

    def write_file(name: str, *content: Any) -> str:
        path = tmp_path / name
        if content and isinstance(content[0], bytes):
            path.write_bytes(content[0])
        elif content and isinstance(content[0], str):
            path.write_text(content[0], encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(path)

    return write_file
