"""`graft plan`: what a run needs, whether it fits, and the smallest changes that make it fit. No weight is loaded."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from graft import base
from graft.bank import bank_of
from graft.description import describe
from graft.errors import ConfigError, SiteError
from graft.fast.trunk import lowest
from graft.planning.devices import CONTEXT, Device, room
from graft.planning.memory import Memory, answering, evaluating, training
from graft.planning.model import QUANTIZED, Given, batches, config_of, made_up, quantized_away, shapes_of
from graft.planning.probe import Probe
from graft.train.config import Run, make_run
from graft.train.guards import checkpointing
from graft.train.setup import read_data, schedule_of

MARGIN = 0.95
"""Of the room: what is predicted above this is said not to fit."""
OFFERED = 3
"""Changes that are named."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
    evaluation: Memory | None
    """None: the run has none."""
    inference: Memory | None
    changes: tuple[Change, ...] | None = None
    """Where it does not fit what would, each alone; None where that was not looked for."""
    probe: Probe | None = None
    notes: tuple[str, ...] = ()

    @property
    def need(self) -> int:
        """Bytes at the peak of the run, in a step or in an evaluation."""
        return _peak(self.training, self.evaluation)

    @property
    def fits(self) -> bool:
        return self.need <= self.room * MARGIN

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        parts = {name: getattr(self, name) for name in ("training", "evaluation", "inference")}
        found = asdict(self) | {"need": self.need, "fits": self.fits}
        return found | {name: None if part is None else part.to_dict() for name, part in parts.items()}


def _peak(step: Memory, evaluation: Memory | None) -> int:
    return max(step.total, 0 if evaluation is None else evaluation.total)


@dataclass(frozen=True)
class _Needs:
    memory: Memory
    evaluation: Memory | None
    inference: Memory | None
    rows: int
    tokens: int
    total: int
    trainable: int
    arithmetic: int
    evaluated: tuple[int, int] = (0, 0)
    """Rows and positions of evaluation's heaviest batch."""
    steps: int = 0
    """Of the optimizer, in the whole run."""
    keeps: bool = False
    """Whether training may keep states of frozen blocks."""

    @property
    def need(self) -> int:
        return _peak(self.memory, self.evaluation)


def plan(
    run: Run,
    *,
    length: int | None = None,
    device: str | None = None,
    given: Given | None = None,
    changes: int = OFFERED,
    answers: bool = True,
) -> Plan:
    """What a run needs; nothing is loaded but the base's config, its tokenizer and the rows.

    Args:
        run: its settings.
        length: tokens of made-up rows; None: the run's own rows are read.
        device: see `planning.devices.room`; None: where the run would be.
        given: what of it was read already.
        changes: how many changes that make it fit to look for, if it does not.
        answers: predict generation too.

    Raises:
        ConfigError, SiteError, DataError: as training would.
    """
    where = room(device or run.device)
    given = given or _read(run, length)

    def needs(of: Run) -> _Needs:
        now = given if length is None else replace(given, data=made_up(of, given.data.template.mode, length))
        return _needs(of, now, where, answers=answers and of is run)

    found = needs(run)
    made = Plan(
        base=run.base,
        method=run.method.name,
        precision=_precision(run, where),
        device=where.name,
        room=where.room,
        rows=found.rows,
        tokens=found.tokens,
        total=found.total,
        trainable=found.trainable,
        training=found.memory,
        evaluation=found.evaluation,
        inference=found.inference,
        notes=(*_larger_evaluation(found), *_notes(run, where, found.keeps)),
    )
    if made.fits or not changes:
        return made
    return replace(made, changes=tuple(itertools.islice(_changes(run, found, needs, where), changes)))


def _read(run: Run, length: int | None) -> Given:
    config = config_of(run.base)
    if length is None:
        tokenizer = base.load_tokenizer(run.base)
        return Given(config=config, tokenizer=tokenizer, data=read_data(run, tokenizer, config))
    data = made_up(run, _mode(run, config), length)
    try:
        return Given(config=config, tokenizer=base.load_tokenizer(run.base), data=data)
    except ConfigError:
        return Given(config=config, tokenizer=None, data=data)


def _needs(run: Run, given: Given, where: Device, *, answers: bool) -> _Needs:
    data, settings = given.data, run.train
    mode = data.template.mode
    dtype = DTYPES[run.precision if run.precision in DTYPES else _computes(where)]
    model = shapes_of(run, given, dtype)
    counts = describe(model)
    tokenizer = given.tokenizer or SimpleNamespace(pad_token_id=0, eos_token_id=0)
    batch, evaluated = batches(run, data, model, tokenizer)
    alike: dict[str, Any] = {"optimizer": settings.optimizer, "on_cpu": where.on_cpu}
    alike["compute"] = torch.bfloat16 if settings.compute == "bf16" else None
    with checkpointing(model, settings.gradient_checkpointing):
        memory, arithmetic = training(model, batch, accumulate=settings.accumulate, **alike)
        evaluation = None if evaluated is None else evaluating(model, evaluated, **alike)
    inference = None
    if answers and mode != "classification":
        longest = max(len(row.input_ids) for row in data.train)
        inference = answering(model, settings.batch_size, longest, ANSWER, on_cpu=where.on_cpu)
    less = quantized_away(model, run.precision) if run.precision in QUANTIZED else 0

    def there(memory: Memory) -> Memory:
        return replace(memory, weights=memory.weights - less, other=memory.other + where.context)

    rows, tokens = _size(batch, mode)
    return _Needs(
        memory=there(memory),
        evaluation=evaluation and there(evaluation),
        inference=inference and there(inference),
        rows=rows,
        tokens=tokens,
        total=counts.total,
        trainable=counts.trainable,
        arithmetic=arithmetic,
        evaluated=(0, 0) if evaluated is None else _size(evaluated, mode),
        steps=schedule_of(run, data).steps,
        keeps=_keeps(run, model),
    )


def _keeps(run: Run, model: Any) -> bool:
    """Whether training may keep what frozen blocks make of each text: by the setting, else where there are any."""
    if run.train.trunk_cache is not None:
        return run.train.trunk_cache
    return all(lowest(model, adapter) > 0 for adapter in bank_of(model))


def _size(batch: dict[str, Any], mode: str) -> tuple[int, int]:
    """Rows and positions of a batch, of an encoder-decoder those of both sides."""
    both = ("input_ids", "labels") if mode == "seq2seq" else ("input_ids",)
    return len(batch.get("segments") or batch["input_ids"]), sum(batch[key].numel() for key in both)


def _larger_evaluation(found: _Needs) -> Iterator[str]:
    if found.need > found.memory.total:
        rows, tokens = found.evaluated
        yield f"evaluation needs more than training: its heaviest batch has {rows} rows, {tokens:,} tokens"


def _changes(run: Run, now: _Needs, needs: Any, where: Device) -> Iterator[Change]:
    """Of each kind of change the smallest that fits, the kinds that cost least first."""

    def tried(settings: dict[str, Any]) -> Change | None:
        try:
            found = needs(_with(run, settings))
        except (ConfigError, SiteError):
            return None  # a method that these settings cannot have
        if found.need > where.room * MARGIN:
            return None
        return Change(settings=settings, total=found.need, price=_price(settings, found, now))

    whole, smaller = _batches(run, now.memory.total <= where.room * MARGIN)
    for kind in _kinds(run, where):
        change = next(filter(None, (tried(kind | each) for each in whole if kind or each)), None)
        change = change or _first([kind | each for each in smaller], tried)
        if change is not None:
            yield change


def _first(settings: list[dict[str, Any]], tried: Callable[[dict[str, Any]], Change | None]) -> Change | None:
    """The first that fits, where after it all do: each needs less than the one before it."""
    change = functools.cache(lambda number: tried(settings[number]))
    number = bisect.bisect_left(range(len(settings)), True, key=lambda each: change(each) is not None)
    return change(number) if number < len(settings) else None


def _kinds(run: Run, where: Device) -> Iterator[dict[str, Any]]:
    again = [] if run.train.gradient_checkpointing else [{"train.gradient_checkpointing": True}]
    smaller: list[dict[str, Any]] = [{}]
    if where.bf16 and _precision(run, where) == "fp32":
        smaller.append({"precision": "bf16"})
    if run.precision != "nf4":
        smaller.append({"precision": "nf4"})
    for precision in smaller:
        for kept in ({}, *again):
            yield precision | kept


def _batches(run: Run, trains: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The run's own batches of training, and smaller ones that make the same steps, each of them less than the last.

    The first of these may need more than the run's own: with several in a step all gradients stand beside a forward.
    `trains`: a step fits as it is, so that only an evaluation may be what does not.
    """
    rows, accumulate, evaluated = run.train.batch_size, run.train.accumulate, run.train.eval_batch_size
    if run.data.packing or trains:  # a batch of packs is one pack; only an evaluation has rows
        most = (evaluated or rows) if run.data.eval is not None else 1
        return [{}], [{"train.eval_batch_size": size} for size in _divisors(most)]
    whole: list[dict[str, Any]] = [{}]
    if (evaluated or 0) > rows:
        whole.append({"train.eval_batch_size": rows})
    smaller = []
    for size in _divisors(rows):
        smaller.append({"train.batch_size": size, "train.accumulate": accumulate * (rows // size)})
        if (evaluated or 0) > size:
            smaller[-1]["train.eval_batch_size"] = size
    return whole, smaller


def _divisors(number: int) -> list[int]:
    """The smaller ones, largest first."""
    return [each for each in range(number // 2, 0, -1) if number % each == 0]


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
        share = found.arithmetic / max(1, found.tokens) / (now.arithmetic / max(1, now.tokens)) - 1
        parts.append(f"{share:.0%} more arithmetic")
    if "train.batch_size" in settings:
        steps = "the same steps" if found.steps == now.steps else f"{found.steps} steps in place of {now.steps},"
        parts.append(f"{steps} in more and smaller batches")
    elif "train.eval_batch_size" in settings:
        parts.append("evaluation in smaller batches")
    if settings.get("precision") == "bf16":
        parts.append("the base rounds to 16 bits")
    if settings.get("precision") == "nf4":
        parts.append("the base rounds to 4 bits (needs bitsandbytes), and each use makes its weights anew")
    return ", ".join(parts)


def _precision(run: Run, where: Device) -> str:
    """As the run says it; auto as `load_base` takes it."""
    return run.precision if run.precision != "auto" else _computes(where)


def _computes(where: Device) -> str:
    return "bf16" if where.bf16 else "fp32"


def _mode(run: Run, config: Any) -> str:
    given = run.data.template
    if isinstance(given, dict) and "mode" in given:
        return str(given["mode"])
    return "seq2seq" if config.is_encoder_decoder else "causal"


def _notes(run: Run, where: Device, keeps: bool = False) -> Iterator[str]:
    settings = run.train
    if "bf16" in (run.precision, settings.compute) and not where.bf16:
        yield f"{where.name} does not compute in bf16, and training would refuse it there; use fp32 or auto"
    if run.method.wants_batches():
        yield "of the method's start from data, its gradients are in the prediction, its forward and backward are not"
    if settings.on_forgetting == "regularise":
        yield "the second forward of train.on_forgetting: regularise is not in the prediction"
    if run.data.general is not None:
        yield "the batches of data.general are not in the prediction"
    if keeps:
        yield "the states that train.trunk_cache may keep are not in the prediction: at most a quarter of what is left"
    if settings.compile:
        yield "train.compile is not in the prediction"
    if not where.on_cpu:
        taken = f"; CUDA's own part is taken as {CONTEXT / 2**20:.0f} MB" if where.context else ""
        yield f"no GPU has measured this prediction{taken}"
