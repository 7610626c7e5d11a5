"""loralib (microsoft/LoRA): `torch.save(lora.lora_state_dict(model))`, in and out.

    lora.Linear         <module>.lora_A (R, I), <module>.lora_B (O, R)
    lora.MergedLinear   of a fused linear in G equal blocks, E of them enabled: lora_A (E R, I), lora_B (E O / G, R);
                        block e of the output gains s B_e A_e x
    lora.Embedding      lora_A (R, V), lora_B (D, R)

The factor s = lora_alpha / R stands in the code that made the file, not in the file, and so do the enabled blocks and
the dropout: the user says them. Module names are those of transformers. Biases (`bias="all"` or "lora_only") and a task
head beside the pairs are taken too.

Shape legend: I in, O out, R rank, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft import files_lora, roles
from graft.adapter import Adapter
from graft.errors import AdapterFileError, ConfigError
from graft.foreign.base import (
    Slots,
    chosen,
    fill,
    filled,
    head_keys,
    head_outputs,
    head_slots,
    own_path,
    read_state,
    write_state,
)
from graft.forms.base import Slot, number, plain
from graft.method import CopyDelta
from graft.methods.lora import BiasDelta, EmbeddingLoRADelta, LoRA, LoRADelta
from graft.roles import PARTS, Site
from graft.weights import is_embedding, is_linear

FORM = "loralib"
Pair = tuple[Tensor, Tensor]


def read_loralib(
    model: nn.Module,
    file: str | Path,
    name: str | None = None,
    *,
    alpha: float | None = None,
    parts: Sequence[str] = (),
    trainable: bool = False,
) -> Adapter:
    """Attach a LoRA that loralib trained.

    Args:
        model: the base that it was made for.
        file: of tensors alone.
        name: what routes call it; None: the file's name.
        alpha: the `lora_alpha` of its layers; the file does not say it.
        parts: what its `MergedLinear`s enable of a fused linear: "query", "key", "value" (or "gate", "up").
        trainable: whether it goes on training.

    Raises:
        ConfigError: no alpha, or parts that the file's shapes contradict.
        AdapterFileError: a broken file, or a tensor that has no place in this model.
    """
    file = Path(file)
    if alpha is None:
        raise ConfigError(f"alpha: {file} does not hold it; give the lora_alpha that its layers had")
    found = _named(model, read_state(file), file)
    pairs = _pairs(found, file)
    sites = {site.path: site for site in roles.sites(model, unnamed=True)}
    blocks = {path: _blocks(model, sites.get(path), pair, parts, f"{file}: {path}") for path, pair in pairs.items()}
    if parts and not any(blocks.values()):
        raise ConfigError(f"parts: no pair of {file} is one of a fused linear's parts; leave it out")
    grouped = {path for path, rows in blocks.items() if rows}
    method = _method(model, pairs, blocks, alpha, parts, found)

    def take(adapter: Adapter) -> None:
        slots = head_slots(model, adapter, FORM)
        for site, delta in adapter.items():
            if isinstance(delta, LoRADelta | EmbeddingLoRADelta):
                whole = site.path in grouped and not getattr(delta, "rows", None)
                slots |= _joined(site.path, delta, blocks[site.path]) if whole else _pair_slots(site.path, delta)
            elif isinstance(delta, BiasDelta):
                slots[f"{site.path}.bias"] = plain(delta.bias)
        fill(slots, found, file)

    return filled(model, method, file.stem if name is None else name, file, take, trainable=trainable)


def write_loralib(model: nn.Module, name: str, file: str | Path) -> tuple[str, ...]:
    """Write a LoRA adapter as loralib's checkpoint.

    Args:
        name: the adapter. What another method computes as a pair at each linear is written as that pair.
        file: must not exist; `.pt` and the like are torch's form, `.safetensors` the other.

    Returns:
        What the file cannot hold and the layers must be given: `lora_alpha`, `enable_lora`, the dropout.

    Raises:
        AdapterFileError: loralib's layers would compute something else (it says what), or the file exists.
    """
    adapter = files_lora.exported(model, chosen(model, name, FORM))
    slots = head_slots(model, adapter, FORM)
    alphas: dict[str, float] = {}
    enabled: dict[str, list[bool]] = {}
    for site, delta in adapter.items():
        if type(delta) is LoRADelta or type(delta) is EmbeddingLoRADelta:
            slots |= _pair_slots(site.path, delta)
            alphas[site.path] = delta.scale * slots[f"{site.path}.lora_B"].shape[1]
            if rows := getattr(delta, "rows", None):
                enabled[site.path] = _enabled(site, rows)
            if getattr(delta, "B_bias", None) is not None:
                raise AdapterFileError(f"adapter {name!r} has a bias on B (lora_bias), which {FORM} lacks")
        elif isinstance(delta, BiasDelta):
            slots[f"{site.path}.bias"] = plain(delta.bias)
        elif not isinstance(delta, CopyDelta):
            raise AdapterFileError(
                f"adapter {name!r}: {FORM}'s form holds low-rank pairs; {adapter.method.name} has none at {site.path}"
            )
    one = next(iter(alphas.values()), 0.0)
    other = next((path for path, alpha in alphas.items() if not math.isclose(alpha, one)), None)
    if other is not None:
        raise AdapterFileError(
            f"adapter {name!r}: lora_alpha would be {one:g} in one layer and {alphas[other]:g} in {other}; {FORM}'s "
            "file is read with one"
        )
    write_state(Path(file), slots)
    lost = [f"lora_alpha={number(one)}"]
    for on in {tuple(each): None for each in enabled.values()}:
        first, *others = [path for path, each in enabled.items() if tuple(each) == on]
        lost.append(f"enable_lora={list(on)} in {first}" + (f" and {len(others)} more" if others else ""))
    dropout = getattr(adapter.method, "dropout", 0.0)
    return (*lost, *([f"lora_dropout={dropout}"] if dropout else []))


def labels_of(source: str | Path) -> int | None:
    """How many outputs the classification head of a file has, for the base to be built; None: it has none."""
    return head_outputs(read_state(Path(source)))


# ------------------------------------------------------------------------------------------------- reading


def _named(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors under this model's own names; training scripts leave a prefix in front, or out."""
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    if any(".lora_A." in key for key in tensors):
        raise AdapterFileError(f"{file}: its keys are peft's (lora_A.weight); put adapter_config.json beside it")
    own = {own_path(model, path): path for path, _ in model.named_modules()}
    named = {}
    for key, value in tensors.items():
        path, _, leaf = key.rpartition(".")
        named[f"{own.get(own_path(model, path), path)}.{leaf}"] = value
    return named


def _pairs(tensors: dict[str, Tensor], file: Path) -> dict[str, Pair]:
    """A and B by module."""
    halves = {key.rpartition(".")[0] for key in tensors if key.endswith((".lora_A", ".lora_B"))}
    pairs = {}
    for path in sorted(halves):
        missing = [key for key in (f"{path}.lora_A", f"{path}.lora_B") if key not in tensors]
        if missing:
            raise AdapterFileError(f"{file}: {missing[0]} is missing")
        pairs[path] = (tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"])
        if any(matrix.ndim != 2 or not matrix.numel() for matrix in pairs[path]):
            raise AdapterFileError(f"{file}: {path}.lora_A and .lora_B are no pair of matrices")
    if not pairs:
        raise AdapterFileError(f"{file}: no lora_A and lora_B in it")
    return pairs


def _blocks(model: nn.Module, site: Site | None, pair: Pair, parts: Sequence[str], where: str) -> list[Tensor]:
    """The rows of the output that each block of a grouped pair writes to; none for a pair of a whole weight.

    Raises:
        AdapterFileError: shapes that fit neither, or a linear that loralib would cut elsewhere.
    """
    A, B = pair
    if site is None or not (is_linear(site.module) or is_embedding(site.module)):
        raise AdapterFileError(f"{where} is no linear or embedding of this model")
    shapes = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
    bad = AdapterFileError(f"{where}: {shapes} do not fit its weight, {site.out_features} by {site.in_features}")
    if A.shape[1] != site.in_features:
        raise bad
    if A.shape[0] == B.shape[1] and B.shape[0] == site.out_features:
        return []
    names = PARTS.get(site.role.removeprefix("cross_"), ())
    count, rest = divmod(A.shape[0], B.shape[1])
    if not names or rest or len(B) * len(names) != site.out_features * count:
        raise bad
    asked = tuple(parts) or (names if count == len(names) else ())
    if not asked:
        raise ConfigError(f"parts: {where} has {count} of {', '.join(names)}; the file does not say which, give them")
    wrong = [part for part in asked if part not in names]
    if wrong or len(set(asked)) != count:
        raise ConfigError(f"parts: {', '.join(asked)} are not {count} of {', '.join(names)}, as {where} has")
    cut = torch.arange(site.out_features).view(len(names), -1)
    rows = [cut[names.index(part)] for part in names if part in asked]
    own = [roles.part_rows(site, part, model.config) for part in names if part in asked]
    if not all(map(torch.equal, rows, own)):
        raise AdapterFileError(f"{where}: {FORM} cuts it into {len(names)} blocks in a row, and this model does not")
    return rows


def _method(
    model: nn.Module,
    pairs: dict[str, Pair],
    blocks: dict[str, list[Tensor]],
    alpha: float,
    parts: Sequence[str],
    found: dict[str, Tensor],
) -> LoRA:
    """LoRA at exactly these modules. Grouped pairs keep their blocks if they are at every fused linear of the model,
    and are one block-diagonal pair elsewhere."""
    grouped = [path for path, rows in blocks.items() if rows]
    words = tuple(f"{site.role.rpartition('.')[0]}.{part}" for site in _sites(model, grouped) for part in parts)
    words = tuple(dict.fromkeys(words))
    by_words = bool(words) and [site.path for site in roles.select(model, words)] == _ordered(model, grouped)
    joined = {} if by_words else {path: len(blocks[path]) for path in grouped}
    ranks = {path: B.shape[1] * joined.get(path, 1) for path, (_, B) in pairs.items()}
    alphas = {path: alpha * count for path, count in joined.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    heads, rest = head_keys(model, found), {key for key in found if not key.endswith((".lora_A", ".lora_B"))}
    biased = {key.removesuffix(".bias") for key in rest - heads if key.endswith(".bias")}
    return LoRA(
        rank=rank,
        alpha=alpha,
        targets=(*(words if by_words else ()), *(path for path in pairs if not (by_words and path in grouped))),
        rank_pattern={_escaped(path): own for path, own in ranks.items() if own != rank},
        alpha_pattern={_escaped(path): own for path, own in alphas.items()},
        bias="none" if not biased else "lora_only" if biased <= set(pairs) else "all",
        head=bool(heads),
    )


def _sites(model: nn.Module, paths: list[str]) -> list[Site]:
    return [site for site in roles.sites(model) if site.path in paths]


def _ordered(model: nn.Module, paths: list[str]) -> list[str]:
    return [site.path for site in _sites(model, paths)]


def _escaped(path: str) -> str:
    return path.replace(".", r"\.")


# ------------------------------------------------------------------------------------------------- tensors


def _pair_slots(path: str, delta: LoRADelta | EmbeddingLoRADelta) -> Slots:
    A, B = delta.pair() if isinstance(delta, LoRADelta) else (delta.A, delta.B)
    slots = {f"{path}.lora_A": plain(A), f"{path}.lora_B": plain(B)}
    bias: Any = getattr(delta, "bias", None)
    return slots if bias is None else slots | {f"{path}.bias": plain(bias)}


def _joined(path: str, delta: Any, blocks: list[Tensor]) -> Slots:
    """A grouped pair as one of the whole weight: B's blocks on the diagonal of (O, E R)."""
    rank = delta.B.shape[1] // len(blocks)

    def spread(new: Tensor) -> None:
        delta.B.data.zero_()
        for i, (rows, block) in enumerate(zip(blocks, new.to(delta.B).chunk(len(blocks)), strict=True)):
            delta.B.data[rows.to(delta.B.device), i * rank : (i + 1) * rank] = block

    slot = Slot((sum(map(len, blocks)), rank), lambda: delta.B, spread)
    return _pair_slots(path, delta) | {f"{path}.lora_B": slot}


def _enabled(site: Site, rows: list[Tensor]) -> list[bool]:
    """Which of the equal blocks of a fused output the pairs write to.

    Raises:
        AdapterFileError: the parts are no such blocks.
    """
    names = PARTS[site.role.removeprefix("cross_")]
    size = site.out_features // len(names)
    starts = [int(part[0]) // size for part in rows]
    cut = torch.arange(site.out_features)
    if any(not torch.equal(part.cpu(), cut[i * size : (i + 1) * size]) for i, part in zip(starts, rows, strict=True)):
        raise AdapterFileError(f"{site.path}: its parts are not {len(names)} equal blocks in a row, as {FORM} cuts it")
    return [i in starts for i in range(len(names))]
