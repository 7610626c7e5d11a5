"""Which batches a run sees, from the first to the last, and at what rates: computed at once; to resume is to skip.

Trainer resumes by counting batches of an epoch; packs differ in number from epoch to epoch. So the whole run is one
list, and what Trainer calls an epoch is the run.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from graft.data.collate import LengthGrouped
from graft.errors import ConfigError


class Schedule:
    """All batches of a run, for `DataLoader(batch_sampler=...)`; a pure function of its arguments.

    Args:
        lengths: tokens of each example.
        sides: of an encoder-decoder the tokens of its input and of its target; else none.
        batch_size: examples in a batch; not used with `pack`.
        accumulate: batches in one optimizer step.
        epochs, max_steps: how long; `max_steps`, in optimizer steps, wins.
        pack: longest pack in tokens, or None for padded batches.
    """

    drop_last = False

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        accumulate: int = 1,
        epochs: float = 1.0,
        max_steps: int | None = None,
        seed: int = 0,
        group: bool = True,
        pack: int | None = None,
        sides: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.sides = [(each,) for each in lengths] if sides is None else sides
        self.lengths, self.batch_size, self.accumulate = lengths, batch_size, accumulate
        source = LengthGrouped(lengths, batch_size, seed=seed, group=group, max_length=pack)
        self.batches: list[list[int]] = []
        self.ends: list[int] = []
        """How many batches there are at the end of each epoch, the last one counted whole."""
        wanted = math.inf if max_steps is None else max_steps * accumulate
        while len(self.batches) < wanted and len(self.ends) < (math.inf if max_steps else math.ceil(epochs)):
            source.set_epoch(len(self.ends))
            self.batches += source.batches()
            self.ends.append(len(self.batches))
        if max_steps is None:
            before = self.ends[-2] if len(self.ends) > 1 else 0
            part = epochs - (len(self.ends) - 1)
            wanted = before + math.ceil(part * (self.ends[-1] - before))
        del self.batches[int(wanted) :]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return -(-len(self.batches) // self.accumulate)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch."""
        return -(-self.ends[0] // self.accumulate)

    def at(self, step: int) -> list[list[int]]:
        """The batches of optimizer step `step`, from 0, as example numbers."""
        return self.batches[step * self.accumulate : (step + 1) * self.accumulate]

    def tokens(self, step: int) -> int:
        """Tokens of optimizer step `step`, without padding."""
        return sum(self.lengths[i] for batch in self.at(step) for i in batch)

    def epoch(self, step: int) -> float:
        """How many epochs are done after `step` optimizer steps."""
        done = min(step * self.accumulate, len(self.batches))
        number = bisect_right(self.ends, done)
        if number == len(self.ends):
            return float(number)
        start = self.ends[number - 1] if number else 0
        return number + (done - start) / (self.ends[number] - start)

    def longest(self, *, flat: bool = False) -> list[int]:
        """See `heaviest`."""
        return heaviest(self.batches, self.sides, flat=flat)


def heaviest(batches: Sequence[list[int]], sides: Sequence[Sequence[int]], *, flat: bool = False) -> list[int]:
    """The batch that needs most memory: rows times the longest of each side, or all tokens where nothing is padded.

    Args:
        batches: example numbers.
        sides: tokens of each example; of an encoder-decoder those of its input and of its target.
        flat: nothing is padded.
    """

    def tokens(batch: list[int]) -> int:
        columns = zip(*(sides[i] for i in batch), strict=True)
        return sum(sum(column) if flat else len(batch) * max(column) for column in columns)

    return max(batches, key=tokens)


def rate(step: int, *, kind: str, steps: int, warmup: int) -> float:
    """The factor on the learning rate in optimizer step `step`, from 0: never 0, for transformers' first step is lost.

    Args:
        kind: what follows the warm-up: "linear" and "cosine" fall towards 0 behind the last step, "constant" stays.
        steps: all optimizer steps of the run.
        warmup: in so many steps, fewer than `steps`, the rate grows by equal parts; the last of them has all of it.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / (steps - warmup))
    return {"linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2, "constant": 1.0}[kind]


def warmup_steps(warmup: float, steps: int) -> int:
    """`train.warmup` in steps: below 1 it is a share of all steps, rounded up, and leaves at least one.

    Raises:
        ConfigError: as many steps as the run has, or more: it would never train at its rate.
    """
    if warmup < 1:
        return min(math.ceil(warmup * steps), steps - 1)
    if warmup >= steps:
        raise ConfigError(
            f"train.warmup: {warmup:g} steps, and the run has {steps}; use fewer, or a share of them such as 0.03"
        )
    return int(warmup)
