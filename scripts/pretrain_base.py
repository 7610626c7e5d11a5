"""Make a small base like the embedded one from plain text: tokenizer, pretraining, a plain transformers folder.

    python scripts/pretrain_base.py texts/*.txt --out base --steps 3000

Each file is UTF-8 text; documents end with a line `<|endoftext|>` (a file without such lines is one document). A file
named twice counts twice. Every 50th document is held out and never trained on. The steps:

1. a byte-level BPE tokenizer of `--vocab` entries on the training documents, with five special tokens (`<|end|>` closes
   each document and each answer) and a chat template, which the pretraining text does not use;
2. a `LlamaForCausalLM` (tied embeddings, grouped queries; `--config FILE` replaces any entry of `CONFIG` by a JSON
   object) on windows of `--window` tokens cut from the documents laid end to end, shuffled anew each epoch;
3. Muon for the matrices where torch has it (2.9 and later; `--no-muon` turns it off), AdamW for the rest; the
   learning rates are constant, then fall linearly to 2 % over the last 40 % of the steps; bf16 autocast where the
   hardware has it;
4. the folder, bf16: written under a temporary name and renamed, so that a half-written base never stands there.

The embedded base took 2,977 steps of 32 x 256 tokens, 73 minutes on one core, and reached 3.486 nats a held-out token.
The same seed and the same number of threads give the same base.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
END, PAD, *ROLES = SPECIALS = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HELD_OUT_EVERY = 50
DECAY_SHARE, FINAL_SHARE = 0.4, 0.02
CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 704,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; the defaults made the embedded base."""

    steps: int = 3000
    vocab: int = 4096
    window: int = 256
    batch: int = 32
    lr: float = 3e-3
    muon_lr: float = 0.02
    muon: bool = True
    seed: int = 0
    log_every: int = 50


def documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents of the files, in order, stripped; empty ones are left out."""
    for file in files:
        lines: list[str] = []
        for line in [*file.read_text(encoding="utf-8").splitlines(), SEPARATOR]:
            if line.strip() != SEPARATOR:
                lines.append(line)
                continue
            if text := "\n".join(lines).strip():
                yield text
            lines = []


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(training, held-out): every 50th document is held out, wherever a copy of it stands too."""
    held = list(dict.fromkeys(texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])) or [texts[-1]]
    hidden = set(held)
    return [text for text in texts if text not in hidden], held


def make_tokenizer(texts: Iterable[str], vocab: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens and the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, window: int) -> Tensor:
    """(N, T) ids: the documents end to end, each closed by the end token, cut into windows; the rest is dropped."""
    ids: list[int] = []
    for start in range(0, len(texts), 1000):
        for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts[start : start + 1000])):
            ids.extend(encoding.ids)
            ids.append(tokenizer.eos_token_id)
    if len(ids) < window:
        raise SystemExit(f"too little text: {len(ids)} tokens for windows of {window}")
    return torch.tensor(ids[: len(ids) // window * window], dtype=torch.int32).view(-1, window)


def batches(windows_NT: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches (B, T) without end, shuffled anew each epoch; an epoch's last, smaller batch is kept."""
    while True:
        for rows in torch.randperm(len(windows_NT), generator=generator).split(size):
            yield windows_NT[rows].long()


def make_model(tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any]) -> LlamaForCausalLM:
    """A fresh Llama, fp32, for the tokenizer's vocabulary."""
    config = LlamaConfig(
        **CONFIG | overrides,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (if wanted and there), AdamW for embeddings and norms."""
    named = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    muon = settings.muon and hasattr(torch.optim, "Muon")
    matrices = [p for name, p in named.items() if muon and p.ndim == 2 and "embed" not in name and "head" not in name]
    taken = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in taken]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.0))
    return found


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: 1, then linear to 2 % over the last 40 %."""
    decay = max(1, round(steps * DECAY_SHARE))
    return max(FINAL_SHARE, min(1.0, (steps - step) / decay))


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16 itself; emulation is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, windows_NT: Tensor, size: int) -> float:
    """Mean loss in nats a token, fp32."""
    model.eval()
    total = sum(
        float(model(input_ids=ids, labels=ids).loss) * len(ids)
        for ids in (rows.long().to(model.device) for rows in windows_NT.split(size))
    )
    model.train()
    return total / len(windows_NT)


def train(model: LlamaForCausalLM, windows_NT: Tensor, settings: Settings) -> list[float]:
    """Train in place; the loss of every step."""
    device = model.device
    optimizers = make_optimizers(model, settings)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, settings.steps)) for o in optimizers]
    stream = batches(windows_NT, settings.batch, torch.Generator().manual_seed(settings.seed))
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    for step in range(1, settings.steps + 1):
        ids_BT = next(stream).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if not losses[-1] < float("inf"):
            raise SystemExit(f"step {step}: the loss is not finite; try a lower --lr or --muon-lr")
        if step % settings.log_every == 0 or step == settings.steps:
            seconds = time.perf_counter() - start
            print(f"step {step}/{settings.steps}  loss {losses[-1]:.3f}  {seconds:.0f} s", flush=True)
    return losses


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder under a temporary name beside it, then rename it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        part = Path(scratch) / "base"
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, folder)


def pretrain(files: Sequence[Path], out: Path, settings: Settings, overrides: dict[str, Any]) -> list[float]:
    """From text files to a folder; returns the training losses."""
    if out.exists():
        raise SystemExit(f"{out} is there already; name another folder or delete it")
    texts = list(documents(files))
    if len(texts) < 2:
        raise SystemExit(f"one document or none; separate documents by lines {SEPARATOR}")
    training, held_out = split(texts)
    torch.manual_seed(settings.seed)
    tokenizer = make_tokenizer(training, settings.vocab, (CONFIG | overrides)["max_position_embeddings"])
    windows_NT, held_NT = (windows(part, tokenizer, settings.window) for part in (training, held_out))
    model = make_model(tokenizer, overrides).to("cuda" if torch.cuda.is_available() else "cpu")
    counts = f"{windows_NT.numel():,} tokens, {model.num_parameters():,} parameters"
    print(f"{len(training)} documents, {counts}", flush=True)
    losses = train(model, windows_NT, settings)
    print(f"held-out loss {evaluate(model, held_NT, settings.batch):.3f} nats a token ({len(held_out)} documents)")
    save(model, tokenizer, out)
    print(f"saved in {out}")
    return losses


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; defaults are those of `Settings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="UTF-8 text files")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--config", type=Path, help="JSON object with entries of the Llama config to replace")
    for name in ("steps", "vocab", "window", "batch", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name), help="default %(default)s")
    parser.add_argument("--lr", type=float, default=Settings.lr, help="of AdamW, default %(default)s")
    parser.add_argument("--muon-lr", type=float, default=Settings.muon_lr, help="default %(default)s")
    parser.add_argument("--no-muon", dest="muon", action="store_false", help="AdamW for everything")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    given = vars(parse(argv))
    files, out, config = given.pop("files"), given.pop("out"), given.pop("config")
    for file in files:
        if not file.is_file():
            raise SystemExit(f"no such file: {file}")
    pretrain(files, out, Settings(**given), json.loads(config.read_text(encoding="utf-8")) if config else {})


if __name__ == "__main__":
    main(sys.argv[1:])
