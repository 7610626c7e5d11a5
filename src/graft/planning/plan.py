"""`graft plan`: what a run needs, whether it fits, and the smallest changes that make it fit. No weight is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from graft import base, roles
from graft.description import describe
from graft.errors import ConfigError, SiteError
from graft.planning.devices import CONTEXT, room
from graft.planning.memory import Memory, answering, training
from graft.planning.model import BITS, config_of, heaviest, made_up, quantized_away, shapes_of
from graft.train.config import Run, make_run
from graft.train.guards import checkpointing
from graft.train.setup import Data, read_data

MARGIN = 0.95
"""Of the room: what is predicted above this is said not to fit."""
OFFERED = 3
"""Changes that are named."""
ANSWER = 128
"""New tokens of an answer."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Settings under which a run fits, and what they cost."""

    settings: dict[str, Any]
    """By dotted key."""
    total: int
    price: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs on a device."""

    base: str
    method: str
    precision: str
    device: str
    room: int
    """Bytes that a process may take there."""
    rows: int
    tokens: int
    """Positions of the heaviest batch, padding among them."""
    total: int
    trainable: int
    """Values."""
    training: Memory
    inference: Memory | None
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.training.total <= self.room * MARGIN

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        found = asdict(self) | {"fits": self.fits, "training": self.training.to_dict()}
        return found | {"inference": None if self.inference is None else self.inference.to_dict()}


@dataclass(frozen=True)
class _Needs:
    memory: Memory
    inference: Memory | None
    rows: int
    tokens: int
    total: int
    trainable: int
    arithmetic: int


def plan(run: Run, *, length: int | None = None, device: str | None = None, changes: bool = True) -> Plan:
    """What a run needs; nothing is loaded but the base's config, its tokenizer and the rows.

    Args:
        run: its settings.
        length: tokens of made-up rows; None: the run's own rows are read.
        device: see `planning.devices.room`; None: where the run would be.
        changes: look for changes that make it fit, if it does not.

    Raises:
        ConfigError, SiteError, DataError: as training would.
    """
    name, space, on_cpu = room(device or run.device)
    config = config_of(run.base)
    tokenizer: Any = None if length is not None and config_alone(run.base) else base.load_tokenizer(run.base)
    filler = tokenizer or SimpleNamespace(pad_token_id=0, eos_token_id=0)
    data = made_up(run, _mode(run, config), length) if length is not None else read_data(run, tokenizer, config)

    def needs(of: Run) -> _Needs:
        mine = data if length is None else made_up(of, data.template.mode, length)
        return _needs(of, config, mine, tokenizer, filler, on_cpu=on_cpu)

    found = needs(run)
    made = Plan(
        base=run.base,
        method=run.method.name,
        precision=_precision(run, on_cpu),
        device=name,
        room=space,
        rows=found.rows,
        tokens=found.tokens,
        total=found.total,
        trainable=found.trainable,
        training=found.memory,
        inference=found.inference,
        notes=tuple(_notes(run, on_cpu)),
    )
    if made.fits or not changes:
        return made
    return replace(made, changes=tuple(itertools.islice(_changes(run, found, needs, space), OFFERED)))


def config_alone(path: str) -> bool:
    """Whether a base is given by a file, its config."""
    return path.endswith(".json")


def _needs(run: Run, config: Any, data: Data, tokenizer: Any, filler: Any, *, on_cpu: bool) -> _Needs:
    dtype = torch.float32 if _precision(run, on_cpu) == "fp32" else torch.bfloat16
    mode = data.template.mode
    labels = len(data.template.label_names) or 2
    model = shapes_of(run, config, dtype, mode, tokenizer, labels)
    counts = describe(model)
    batch = heaviest(run, data, model, filler)
    settings = run.train
    with checkpointing(model, settings.gradient_checkpointing):
        memory, arithmetic = training(
            model, batch, optimizer=settings.optimizer, accumulate=settings.accumulate, on_cpu=on_cpu
        )
    longest = max(len(row.input_ids) for row in data.train)
    inference = None
    if roles.is_decoder(model) and mode == "causal":
        inference = answering(model, settings.batch_size, longest, ANSWER, on_cpu=on_cpu)
    beside = 0 if on_cpu else CONTEXT
    less = quantized_away(model, run.precision) if run.precision in BITS else 0
    memory = replace(memory, weights=memory.weights - less, other=memory.other + beside)
    if inference is not None:
        inference = replace(inference, weights=inference.weights - less, other=inference.other + beside)
    rows = len(batch.get("segments") or batch["input_ids"])
    return _Needs(memory, inference, rows, batch["input_ids"].numel(), counts.total, counts.trainable, arithmetic)


def _changes(run: Run, now: _Needs, needs: Any, space: int) -> Iterator[Change]:
    """Settings that fit, the smallest change first."""
    for settings in _candidates(run):
        try:
            changed = _with(run, settings)
            found = needs(changed)
        except (ConfigError, SiteError):
            continue  # a method that these settings cannot have
        if found.memory.total <= space * MARGIN:
            yield Change(settings=settings, total=found.memory.total, price=_price(settings, found, now))


def _candidates(run: Run) -> Iterator[dict[str, Any]]:
    halves: list[dict[str, Any]] = [{}]
    rows, accumulate = run.train.batch_size, run.train.accumulate
    while rows > 1:
        accumulate, rows = accumulate * 2 if rows % 2 == 0 else -(-accumulate * rows // (rows // 2)), rows // 2
        halves.append({"train.batch_size": rows, "train.accumulate": accumulate})
    again = [] if run.train.gradient_checkpointing else [{"train.gradient_checkpointing": True}]
    smaller: list[dict[str, Any]] = [{}]
    if run.precision in ("auto", "fp32"):
        smaller.append({"precision": "bf16"})
    if run.precision != "nf4":
        smaller.append({"precision": "nf4"})
    for precision in smaller:
        for kept in ({}, *again):
            for half in halves if kept or not again else halves[:2]:
                if precision or kept or half:
                    yield precision | kept | half


def _with(run: Run, settings: dict[str, Any]) -> Run:
    plain = run.model_dump()
    for key, value in settings.items():
        *parents, last = key.split(".")
        place = plain
        for parent in parents:
            place = place[parent]
        place[last] = value
    return make_run(plain | {"method": run.method})


def _price(settings: dict[str, Any], found: _Needs, now: _Needs) -> str:
    parts = []
    if "train.gradient_checkpointing" in settings:
        share = found.arithmetic / max(1, found.rows) / (now.arithmetic / max(1, now.rows)) - 1
        parts.append(f"{share:.0%} more arithmetic")
    if "train.batch_size" in settings:
        parts.append("the same steps in more and smaller batches")
    if settings.get("precision") == "bf16":
        parts.append("the base rounds to 16 bits")
    if settings.get("precision") == "nf4":
        parts.append("the base rounds to 4 bits, and each use makes its weights anew")
    return ", ".join(parts)


def _precision(run: Run, on_cpu: bool) -> str:
    if run.precision != "auto":
        return run.precision
    return "bf16" if not on_cpu or base.computes_bf16("cpu") else "fp32"


def _mode(run: Run, config: Any) -> str:
    given = run.data.template
    if isinstance(given, dict) and "mode" in given:
        return str(given["mode"])
    return "seq2seq" if config.is_encoder_decoder else "causal"


def _notes(run: Run, on_cpu: bool) -> Iterator[str]:
    if run.train.compute == "bf16":
        yield "autocast is not in the prediction: activations are counted in the base's own precision"
    if run.train.compile:
        yield "train.compile is not in the prediction"
    if not on_cpu:
        yield "no GPU has measured this prediction; CUDA's own part is taken as 600 MB"
