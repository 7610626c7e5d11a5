"""When to keep the frozen trunk's states during a run, and where."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graft.errors import ConfigError, SiteError
from graft.fast.store import Store, room
from graft.fast.trunk import Trunk
from graft.train.schedule import Schedule

logger = logging.getLogger("graft")

FOLDER = "trunk"
"""Of a run's folder, while it trains: what memory does not hold."""
LEAST = 0.05
"""Of the blocks' work over all tokens, what must be saved at least; less is not worth the memory."""


class RunTrunk(Trunk):
    """A trunk for one run.

    Attributes:
        plan: a line that says what it does.
    """

    plan = ""

    @property
    def told(self) -> str:
        """A line that says what it did."""
        return (
            f"the frozen blocks ran for {self.computed:,} tokens and were skipped for {self.served:,}, "
            f"which saved about {self.saved:.0f} s"
        )


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
    once = sum(schedule.lengths[i] for i in seen) + sum(evaluation)
    often = sum(schedule.lengths[i] for batch in schedule.batches for i in batch) + evaluations * sum(evaluation)
    place = folder / f"{FOLDER}{os.environ.get('RANK', '')}" if shared is None else shared
    memory, disk = room(place, model.device)
    needed = once * model.config.get_text_config().hidden_size * model.dtype.itemsize
    kept = min(1.0, (memory + disk) / max(1, needed))
    if not (wanted or shared) and (1 - once / max(1, often)) * kept * trunk.depth / trunk.blocks < LEAST:
        yield None
        return
    trunk.store = Store(memory, place, disk, trunk.key)
    trunk.plan = _plan(trunk, f"{needed * kept / 1e6:,.0f} MB", once, often)
    try:
        yield trunk
    finally:
        trunk.store.close(delete=shared is None)


def _plan(trunk: Trunk, size: str, once: int, often: int) -> str:
    blocks = f"{trunk.depth} of {trunk.blocks} blocks"
    if trunk.encoder is not None:  # rows are as long as their longer side: the encoder's may be less
        return f"the encoder ({blocks}) is frozen: what it makes of a text is kept (at most {size}), and computed once"
    return (
        f"{blocks} are frozen below the adapter: what they make of a text is kept ({size}), "
        f"so {often - once:,} of {often:,} tokens start above them"
    )


def _trunk(model: Any, wanted: bool) -> RunTrunk | None:
    try:
        return RunTrunk(model, Store(0), dropout=wanted)
    except SiteError as error:
        if wanted:
            raise ConfigError(f"train.trunk_cache: {error}; leave it out") from error
        if "first block" not in str(error) and "one stack" not in str(error):
            logger.info("the frozen blocks run at every step: %s", error)
        return None
