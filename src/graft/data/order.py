"""Which examples go together, in which order: pure functions of lengths, seed and epoch, so that resume is exact.

The batches of an epoch can be computed again at any time; to resume at step n is to skip n batches of the list.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from graft.errors import ConfigError, DataError

POOL = 50  # batches whose examples are sorted by length together: large enough to group, small enough to stay random


def order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, group: bool = True) -> list[list[int]]:
    """The batches of an epoch as lists of example numbers; each example stands in exactly one.

    Examples are shuffled; with `group`, each pool of 50 batches is then sorted by length and cut into batches, so that
    a batch needs little padding, and the batches are shuffled. A short batch is always the last.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: give at least 1")
    chance = random.Random(f"order {seed} {epoch}")
    numbers = list(range(len(lengths)))
    chance.shuffle(numbers)
    if group:
        pools = (numbers[i : i + POOL * batch_size] for i in range(0, len(numbers), POOL * batch_size))
        numbers = [n for pool in pools for n in sorted(pool, key=lambda n: -lengths[n])]
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    short = [batches.pop()] if batches and len(batches[-1]) < batch_size else []
    chance.shuffle(batches)
    return batches + short


def packed_order(lengths: Sequence[int], max_length: int, seed: int, epoch: int) -> list[list[int]]:
    """The packed batches of an epoch: `bins`, shuffled. Examples are shuffled before too, so bins vary by epoch."""
    chance = random.Random(f"packed order {seed} {epoch}")
    numbers = list(range(len(lengths)))
    chance.shuffle(numbers)
    packed = [[numbers[i] for i in one] for one in bins([lengths[n] for n in numbers], max_length)]
    chance.shuffle(packed)
    return packed


def bins(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """First-fit-decreasing: numbers of examples whose lengths sum to at most `max_length`; ties in the given order.

    A tree over the bins holds the largest room of each half, so the first bin with room is found in log n steps.
    """
    size = 1
    while size < max(1, len(lengths)):
        size *= 2
    room = [max_length] * (2 * size)
    packed: list[list[int]] = [[] for _ in lengths]
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if lengths[number] > max_length:
            raise DataError(
                f"example {number}: {lengths[number]} tokens do not fit a pack of {max_length}; truncate first"
            )
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= lengths[number] else 2 * node + 1
        packed[node - size].append(number)
        room[node] -= lengths[number]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [one for one in packed if one]


class LengthGrouped:
    """The batches as an iterable for `torch.utils.data.DataLoader(batch_sampler=...)`; its whole state is `epoch`.

    `group=False` is plain shuffling; with `max_length` the batches are packs (and `batch_size` is not used).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int = 1,
        *,
        seed: int = 0,
        group: bool = True,
        max_length: int | None = None,
    ) -> None:
        self.lengths, self.batch_size, self.max_length = lengths, batch_size, max_length
        self.seed, self.group = seed, group
        self.epoch = 0
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches come next."""
        self.epoch = epoch

    def batches(self) -> list[list[int]]:
        """The batches of this epoch."""
        if self.max_length is not None:
            return packed_order(self.lengths, self.max_length, self.seed, self.epoch)
        return order(self.lengths, self.batch_size, self.seed, self.epoch, self.group)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches())

    def __len__(self) -> int:
        return len(self.batches()) if self.max_length is not None else -(-len(self.lengths) // self.batch_size)
