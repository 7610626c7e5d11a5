"""What the command line shows beside a verb's own output: bars, one-line warnings, and nothing of other libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer

CALM = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def say(text: str) -> None:
    typer.echo(text, err=True)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr where that is a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import Progress

    bars: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:

        def tell(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = shown.add_task(what, total=total)
            shown.update(bars[what], completed=done)

        yield tell


class _Say(logging.Handler):
    """Graft's own log on stderr, a line for each message."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"warning: {record.getMessage()}")


def calm() -> None:
    """Of logs, warnings and bars only Graft's own reach the screen."""
    for name, value in CALM.items():
        os.environ.setdefault(name, value)
    for logger, handler in ((logging.getLogger(), logging.NullHandler()), (logging.getLogger("graft"), _Say())):
        if not any(isinstance(old, type(handler)) for old in logger.handlers):
            logger.addHandler(handler)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"graft\b")
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    if "transformers" in sys.modules:  # only when called from Python: the variables above came too late
        sys.modules["transformers"].utils.logging.disable_progress_bar()
