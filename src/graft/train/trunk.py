"""When to keep the frozen trunk's states during a run, and where."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from graft.errors import ConfigError, SiteError
from graft.fast.store import Store
from graft.fast.trunk import Trunk
from graft.planning.devices import available
from graft.train.result import peak_bytes
from graft.train.schedule import Schedule

logger = logging.getLogger("graft")

FOLDER = "trunk"
"""Of a run's folder, while it trains: what memory does not hold."""
LEAST = 0.05
"""Of the blocks' work over all tokens, what must be saved at least; less is not worth the memory."""


class RunTrunk(Trunk):
    """A trunk for one run.

    Attributes:
        once, often: tokens of the run's texts, each counted once, and each as often as it is read.
        needed: bytes of the states of all texts.
    """

    once = often = needed = 0

    @property
    def share(self) -> float:
        """Of `needed`, what there is room for."""
        return min(1.0, ((self.store.memory or 0) + self.store.disk) / max(1, self.needed))

    @property
    def plan(self) -> str:
        """A line that says what it does."""
        blocks, size = f"{self.depth} of {self.blocks} blocks", f"{self.needed * self.share / 1e6:,.0f} MB"
        if self.encoder is not None:  # rows are as long as their longer side: the encoder's may be less
            kept = f"what it makes of a text is kept (at most {size}), and computed once"
            return f"the encoder ({blocks}) is frozen: {kept}"
        return (
            f"{blocks} are frozen below the adapter: what they make of a text is kept ({size}), "
            f"so {self.often - self.once:,} of {self.often:,} tokens start above them"
        )

    @property
    def told(self) -> str:
        """A line that says what it did."""
        return (
            f"the frozen blocks ran for {self.computed:,} tokens and were skipped for {self.served:,}, "
            f"which saved about {self.saved:.0f} s"
        )

    def bound(self) -> None:
        """Keep in memory at most a quarter of what is spare: beside the longest batch, once that was tried."""
        self.store.memory = spare(self.model.device) // 4


def spare(device: torch.device) -> int:
    """Bytes that stay free on a device, or in this container, when this process has as many again as it ever had."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])  # PyTorch gives nothing back of what it had
    returned = peak_bytes(device) - psutil.Process().memory_info().rss
    return max(0, available() - max(0, returned))


@contextlib.contextmanager
def open_trunk(
    model: Any,
    wanted: bool | None,
    schedule: Schedule,
    evaluation: Sequence[int],
    evaluations: int,
    folder: Path,
    shared: Path | None = None,
) -> Iterator[RunTrunk | None]:
    """The trunk of a run while it trains; None where there is none, or where it would save nothing.

    Args:
        model: with its adapters.
        wanted: True, False, or None for where it pays and changes nothing but the time.
        schedule: of the training rows.
        evaluation: tokens of each evaluation row.
        evaluations: how often they are evaluated.
        folder: of the run.
        shared: a folder in which runs, one after the other or at once, find what others computed; it is left there.
            None: states are the run's own and go when it ends.

    Raises:
        ConfigError: it is wanted and the model or the method has none.
    """
    trunk = None if wanted is False else _trunk(model, bool(wanted))
    if trunk is None:
        yield None
        return
    seen = {i for batch in schedule.batches for i in batch}
    trunk.once = sum(schedule.lengths[i] for i in seen) + sum(evaluation)
    trunk.often = sum(schedule.lengths[i] for batch in schedule.batches for i in batch) + evaluations * sum(evaluation)
    trunk.needed = trunk.once * model.config.get_text_config().hidden_size * model.dtype.itemsize
    place = folder / f"{FOLDER}{os.environ.get('RANK', '')}" if shared is None else shared
    trunk.store.disk = shutil.disk_usage(_existing(place)).free // 2
    trunk.bound()
    saved = (1 - trunk.once / max(1, trunk.often)) * trunk.share * trunk.depth / trunk.blocks
    if not (wanted or shared) and saved < LEAST:
        yield None
        return
    trunk.store = Store(trunk.store.memory, place, trunk.store.disk, trunk.key)
    try:
        yield trunk
    finally:
        trunk.store.close(delete=shared is None)


def _existing(folder: Path) -> Path:
    return folder if folder.exists() or folder.parent == folder else _existing(folder.parent)


def _trunk(model: Any, wanted: bool) -> RunTrunk | None:
    try:
        return RunTrunk(model, Store(0), dropout=wanted)
    except SiteError as error:
        if wanted:
            raise ConfigError(f"train.trunk_cache: {error}; leave it out") from error
        if "first block" not in str(error) and "one stack" not in str(error):
            logger.info("the frozen blocks run at every step: %s", error)
        return None
