"""When to keep the frozen trunk's states during a run, and where."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graft.errors import ConfigError, SiteError
from graft.fast.store import Store, default_store
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
    model: Any, wanted: bool | None, schedule: Schedule, evaluation: Sequence[int], evaluations: int, folder: Path
) -> Iterator[RunTrunk | None]:
    """The trunk of a run while it trains; None where there is none, or where it would save nothing.

    Args:
        model: with its adapters.
        wanted: True, False, or None for where it pays and changes nothing but the time.
        schedule: of the training rows.
        evaluation: tokens of each evaluation row.
        evaluations: how often they are evaluated.
        folder: of the run.

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
    key = f"{model.config.name_or_path} {model.dtype} {trunk.depth}"
    store = default_store(folder / f"{FOLDER}{os.environ.get('RANK', '')}", key, model.device)
    needed = once * model.config.get_text_config().hidden_size * model.dtype.itemsize
    kept = min(1.0, ((store.memory or 0) + store.disk) / max(1, needed))
    if not wanted and (1 - once / max(1, often)) * kept * trunk.depth / trunk.blocks < LEAST:
        yield None
        return
    trunk.store = store
    trunk.plan = (
        f"{trunk.depth} of {trunk.blocks} blocks are frozen below the adapter: what they make of a text is kept "
        f"({needed * kept / 1e6:,.0f} MB), so {often - once:,} of {often:,} tokens start above them"
    )
    try:
        yield trunk
    finally:
        store.close()


def _trunk(model: Any, wanted: bool) -> RunTrunk | None:
    try:
        return RunTrunk(model, Store(0), dropout=wanted)
    except SiteError as error:
        if wanted:
            raise ConfigError(f"train.trunk_cache: {error}; leave it out") from error
        if "first block" not in str(error) and "one stack" not in str(error):
            logger.info("the frozen blocks run at every step: %s", error)
        return None
