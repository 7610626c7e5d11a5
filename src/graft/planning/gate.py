"""What `train` says of memory before it loads a base, and the refusal of a run that cannot fit."""

from __future__ import annotations

import functools
from typing import Any

from rich.console import Console

from graft.errors import ConfigError
from graft.planning.picture import changed, size, verdict
from graft.planning.plan import Given, plan
from graft.train.config import Run
from graft.train.setup import Data


def check_room(run: Run, config: Any, tokenizer: Any, data: Data, *, force: bool, console: Console) -> None:
    """Print whether the run will fit; a failure of the prediction itself is said and stops nothing.

    Args:
        run: its settings.
        config, tokenizer, data: the base's, and the rows as they are trained.
        force: go on where it does not fit.
        console: where the verdict goes.

    Raises:
        ConfigError: more memory is predicted than the device has; the settings that would fit are named.
    """
    told = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    given = Given(config=config, tokenizer=tokenizer, data=data)
    try:
        made = plan(run, given=given, changes=0, answers=False)
    except Exception as error:  # a model's own code that shapes alone do not carry: training may well work
        told(f"memory is not predicted: {' '.join(str(error).split())[:200] or type(error).__name__}")
        return
    if made.room <= 0:
        return
    told(verdict(made))
    for note in made.notes:
        told(f"note: {note}")
    if made.need <= made.room or force:
        return
    offered = plan(run, given=given, changes=1, answers=False).changes
    hint = f"; it would with {changed(offered[0].settings)}" if offered else ""
    raise ConfigError(
        f"train: this needs {size(made.need)} at its peak, and {made.device} has {size(made.room)}{hint}; "
        "or --force tries it all the same"
    )
