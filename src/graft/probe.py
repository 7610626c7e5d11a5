"""Is it the right base, and does the adapter still compute what it did? A fingerprint and a probe, stored at save.

The fingerprint is the base's config and a few values of each of its tensors: equal in the same precision, close in
another, anything else is another base. The probe is a few token ids and the adapter's logits for them, compared with a
tolerance by precision.

Shape legend: B rows, T tokens, V outputs.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graft import freeze, roles, slots
from graft.adapt import prepare
from graft.bank import Bank
from graft.errors import AdapterFileError
from graft.routes import Route, entry_of
from graft.weights import quantized, weight_OI

log = logging.getLogger("graft")

FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "hidden_act", "rope_theta", "max_position_embeddings"),
)
PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
TOLERANCES = {"fp64": 1e-3, "fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2, "quantized": 0.25}
"""How far logits may lie apart, as a share of the largest one (at least of 1), coarsest last."""
SAMPLES, TOKENS, LOGITS = 4, 8, 64
MARKS = ("_token_id", "_token_index")
"""How the fields of a config end that give a token a meaning."""
QUANTIZED_ERROR = 0.35
"""Relative error of the sampled weights up to which a quantized base counts as the same; NF4 has about 0.1."""


def fingerprint(model: nn.Module, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What tells this base from another one; `check_base` compares it.

    Args:
        model: with or without adapters; what selection methods changed counts with its original values.
        without: paths of modules to leave out (task heads that the adapter trains: they start at random).

    Returns:
        Name, class, precision, config fields, and for each tensor its shape and a few of its values.
    """
    config = _text_config(model)
    fields = {field: getattr(config, field, None) for field in FIELDS}
    return {
        "name": str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""),
        "class": type(model).__name__,
        "precision": precision(model),
        "config": {field: value for field, value in fields.items() if value is not None},
        "without": sorted(without),
        "tensors": {name: _sample(tensor) for name, tensor in _base_tensors(model, without)},
    }


def check_base(model: nn.Module, expected: dict[str, Any]) -> str | None:
    """Compare the model's base with a stored fingerprint.

    Returns:
        None, or a note that the base is the same in another precision, or with more tokens in its embedding.

    Raises:
        AdapterFileError: another base, or one with fewer tokens; says which was expected and what was found.
    """
    found = fingerprint(model, tuple(expected.get("without", ())))
    grown = _as_many_rows(model, expected, found)
    different = _difference(expected, found)
    if different:
        raise AdapterFileError(
            f"made for {_title(expected)}, but the model is {_title(found)}; they differ in {different}: "
            'load that base, or pass check="warn" or check="off"'
        )
    if expected["precision"] == found["precision"]:
        return grown
    other = f"the adapter was made on this base in {expected['precision']}, here it is in {found['precision']}"
    return other if grown is None else f"{other}; {grown}"


def precision(model: nn.Module) -> str:
    """ "quantized", or the name of the dtype of the base's first floating parameter."""
    modules = roles.modules_of_base(model).values()
    if any(quantized(module) for module in modules):
        return "quantized"
    floating = (p for module in modules for p in module.parameters(recurse=False) if p.is_floating_point())
    first = next(floating, None)
    return "fp32" if first is None else PRECISIONS.get(first.dtype, "fp32")


def probe(model: nn.Module, entry: Any, *, every: bool = False) -> dict[str, Any] | None:
    """The logits of a few fixed token ids under an entry, in eval mode; nothing of the model's state is changed.

    Args:
        every: every logit, as a tensor, in place of the few values that a file holds.

    Returns:
        `ids`, `logits` (at most 64 values of the last two positions, fp32), `outputs` (the size of the vocabulary) and
        `precision`; None on the meta device, for sharded models and for models that take no token ids.
    """
    first = next(model.parameters(), None)
    takes_ids = getattr(model, "main_input_name", "input_ids") == "input_ids" and hasattr(model, "config")
    if first is None or first.is_meta or hasattr(first, "device_mesh") or not takes_ids:
        return None
    ids = _token_ids(model, entry)
    logits_V = logits(model, entry, ids, every=every)
    if not bool(torch.isfinite(logits_V).all()):
        return None
    values = logits_V if every else [_short(value) for value in logits_V.tolist()]
    return {"ids": ids, "precision": precision(model), "outputs": _outputs(model), "logits": values}


def check_probe(model: nn.Module, expected: dict[str, Any] | None, entry: Any) -> float | None:
    """Compare the model's logits under an entry (what is merged, while the model is merged) with a stored probe.

    Returns:
        The largest difference as a share of the largest logit; None without a stored probe.

    Raises:
        AdapterFileError: the difference is over the tolerance of the coarser of the two precisions.
    """
    if not expected or next(model.parameters()).is_meta:
        return None
    want_V = torch.as_tensor(expected["logits"])
    every = isinstance(expected["logits"], Tensor)
    got_V = logits(model, entry, expected["ids"], expected.get("outputs"), every=every)
    order = list(TOLERANCES)
    coarser = max(expected["precision"], precision(model), key=order.index)
    if got_V.shape != want_V.shape:
        raise AdapterFileError(f"the probe has {len(want_V)} logits, the model gives {len(got_V)}: it is another model")
    apart = float((got_V - want_V).abs().max() / want_V.abs().max().clamp(min=1.0))
    if not apart <= TOLERANCES[coarser]:
        raise AdapterFileError(
            f"the logits of the probe stored with the adapter differ by {apart:.2g} ({coarser} allows "
            f"{TOLERANCES[coarser]:g}): it computes something else than when it was saved"
        )
    return apart


@torch.no_grad()
def logits(model: nn.Module, entry: Any, ids: list[int], outputs: int | None = None, *, every: bool = False) -> Tensor:
    """At most 64 of the output's values (V), fp32, on the CPU: evenly spaced over the last two positions; or `every`.

    `outputs`: of a language model's logits only the first so many, for a base that has got more tokens since.
    """
    with _quiet(model, entry):
        device = next(model.parameters()).device
        embedding = next((s.module for s in roles.sites(model) if s.role == "embedding"), None)
        if isinstance(embedding, nn.Embedding):
            device = embedding.weight.device
        ids_BT = torch.tensor([ids], device=device)
        batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        if roles.is_encoder_decoder(model) and not type(model).__name__.endswith("ForSequenceClassification"):
            batch["decoder_input_ids"] = torch.tensor([[_start(model), *ids[:2]]], device=device)
        bank = getattr(model, "adapters", None)
        if isinstance(bank, Bank) and bank.originals is None:
            batch = prepare(model, batch)
        out = model(**batch, return_dict=True)
    names = ("logits", "start_logits", "last_hidden_state")
    value: Tensor = next(out[name] for name in names if name in out)
    if outputs is not None and value.shape[-1] == _outputs(model):
        value = value[..., :outputs]
    flat = (value[:, -2:] if value.dim() == 3 and not every else value).float().flatten().cpu()
    if every:
        return flat
    count = min(LOGITS, flat.numel())
    return flat[torch.tensor([i * (flat.numel() - 1) // max(count - 1, 1) for i in range(count)])]


@contextlib.contextmanager
def random_kept(model: nn.Module) -> Iterator[None]:
    """Put every random state that the block draws from back as it was."""
    found = (p.device for module in roles.modules_of_base(model).values() for p in module.parameters(recurse=False))
    devices = {device for device in found if device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind):
        yield


@contextlib.contextmanager
def _quiet(model: nn.Module, entry: Any) -> Iterator[None]:
    """Eval mode and one entry for all rows; afterwards modes, random states, route and what is in use are as before."""
    training = {module: module.training for module in model.modules()}
    bank = getattr(model, "adapters", None)
    routed = isinstance(bank, Bank) and bank.originals is None
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(random_kept(model))
            stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if routed:
                stack.enter_context(_in_use(model, bank, entry))  # type: ignore[arg-type]
            yield
    finally:
        for module, was in training.items():
            module.training = was


@contextlib.contextmanager
def _in_use(model: nn.Module, bank: Bank, entry: Any) -> Iterator[None]:
    chosen = entry_of(entry)
    state, own_slots, scales = bank.snapshot(), bank.slots, {name: bank[name].scale for name, _ in chosen}
    try:
        freeze.select(model, bank, chosen)
        bank.current, bank.slots, bank.asleep = Route.everywhere(chosen), slots.Slots(), False
        for name in scales:
            bank[name].scale = 1.0
        yield
    finally:
        bank.restore(state)
        bank.slots = own_slots
        for name, scale in scales.items():
            bank[name].scale = scale
        freeze.select(model, bank, bank.used)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _token_ids(model: nn.Module, entry: Any) -> list[int]:
    """Tokens whose rows the entry trains, ordinary ones, and the end-of-sequence token, which some classifiers read."""
    config = _text_config(model)
    ordinary = slots.slot_token(config)
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")}
    ids = [(997 * i + 13) % int(config.vocab_size) for i in range(TOKENS)]
    ids = [*_trained_rows(model, entry), *(ordinary if token in special else token for token in ids)]
    end = getattr(config, "eos_token_id", None)
    return [*ids, end] if isinstance(end, int) else ids


def _trained_rows(model: nn.Module, entry: Any) -> list[int]:
    """The first tokens that an adapter of single rows names; without them nothing shows whether it acts.

    Not those with a meaning of their own in the config: one may stand for an image that is not there.
    """
    bank = getattr(model, "adapters", None)
    if not isinstance(bank, Bank):
        return []
    shared = [bank[name].shared for name, _ in bank.leaves(entry_of(entry))]
    tokens = [token for each in shared for token in getattr(each, "tokens", ())]
    fields = [item for config in (model.config, _text_config(model)) for item in vars(config).items()]
    marks = {value for name, value in fields if name.endswith(MARKS) and isinstance(value, int)}
    return [token for token in tokens if token not in marks][:TOKENS]


def _outputs(model: nn.Module) -> int | None:
    """How many tokens a language model's head tells apart; None for models without one."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    weight = getattr(getter(), "weight", None) if getter is not None else None
    return None if weight is None else int(weight_OI(getter()).shape[0])


def _start(model: nn.Module) -> int:
    config = _text_config(model)
    found = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad"))
    return next((token for token in found if isinstance(token, int)), 0)


def _base_tensors(model: nn.Module, without: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of the base once, dequantized, and as it was before a selection method trained it."""
    bank = getattr(model, "adapters", None)
    originals: dict[str, Tensor] = {}
    for adapter in bank if isinstance(bank, Bank) else ():
        originals |= adapter.other if adapter.acting else {}
    seen: set[int] = set()
    for path, module in roles.modules_of_base(model).items():
        if any(path == p or path.startswith(f"{p}.") for p in without):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{key}" if path else key
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if key == "weight" and quantized(module):
                yield name, weight_OI(module).detach()
            else:
                yield name, originals.get(name, parameter).detach()


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in roles.modules_of_base(model).items():
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{key}" if path else key, parameter


def _as_many_rows(model: nn.Module, expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Let a base with more tokens in its embedding count with the rows that the stored one had: a note if it does."""
    getters = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    modules = [module for getter in getters if getter is not None and isinstance(module := getter(), nn.Module)]
    tables = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    note = None
    for name, parameter in _base_parameters(model):
        was = str(expected["tensors"].get(name, "")).split(" ")[0].split("x")
        here = [str(size) for size in parameter.shape]
        if id(parameter) not in tables or name not in found["tensors"] or was[1:] != here[1:] or was == here:
            continue
        rows, now = int(was[0]), parameter.shape[0]
        if now < rows:
            raise AdapterFileError(
                f"made for a base with {rows} tokens in its embedding, here it has {now}: "
                f"call model.resize_token_embeddings({rows}) first"
            )
        found["tensors"][name] = _sample(parameter.detach()[:rows])
        found["config"]["vocab_size"] = expected["config"].get("vocab_size", rows)
        note = f"the embedding has {now} tokens here, and had {rows} where the adapter was made"
    return note


def _sample(tensor: Tensor) -> str:
    """Shape and values in one word: "32x48 0.01 -0.2 ..."; the shape alone on the meta device."""
    shape = "x".join(str(size) for size in tensor.shape) or "1"
    count = tensor.numel()
    if tensor.is_meta or not count or hasattr(tensor, "device_mesh"):
        return shape
    places = torch.tensor([count * (2 * k + 1) // (2 * SAMPLES) for k in range(SAMPLES)], device=tensor.device)
    values = tensor.reshape(-1).index_select(0, places).float().tolist()
    return " ".join([shape, *(str(_short(value)) for value in values)])


def _short(value: float) -> float:
    """Nine digits: all that an fp32 value has."""
    return float(f"{value:.9g}")


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first thing in which two fingerprints differ by more than their precisions explain."""
    for field, value in expected["config"].items():
        if field in found["config"] and found["config"][field] != value:
            return f"{field}: {value} and {found['config'][field]}"
    mine, theirs = found["tensors"], expected["tensors"]
    odd = next((name for name in [*theirs, *mine] if (name in mine) != (name in theirs)), None)
    if odd is not None:
        return f"{odd}, which only one of them has"
    coarse = "quantized" in (expected["precision"], found["precision"])
    wrong = total = 0.0
    for name, sample in theirs.items():
        if sample == mine[name]:
            continue
        (shape, *want), (other, *got) = sample.split(), mine[name].split()
        if shape != other:
            return f"{name}: shape {shape} and {other}"
        pairs = [(float(a), float(b)) for a, b in zip(want, got, strict=False)]
        wrong += sum((a - b) ** 2 for a, b in pairs)
        total += sum(a * a for a, _ in pairs)
        if not coarse and pairs and (expected["precision"] == found["precision"] or not all(_close(*p) for p in pairs)):
            return f"the values of {name}"
    if coarse and total and math.sqrt(wrong / total) > QUANTIZED_ERROR:
        return "the values of its weights"
    return None


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 2**-7 * max(abs(a), abs(b)) + 1e-6


def _title(base: dict[str, Any]) -> str:
    config = base["config"]
    size = f"hidden size {config.get('hidden_size', '?')}, {config.get('num_hidden_layers', '?')} layers"
    return f"{base['class']} {base['name'] or '(unnamed)'} ({size}, {base['precision']})"
