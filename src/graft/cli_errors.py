"""Errors on the command line: one line on stderr, in the command line's own words, and exit code 2."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from typing import Any

import typer
from typer.core import TyperGroup

SPELLED = {
    ', or pass check="warn" or check="off"': "",  # no verb has an option for it
    "tied='untie'": "--untie",
    "into='bf16'": "--into bf16",
}
"""What Python's errors advise, as the options say it."""
OPTIONS = ("precision", "into", "device", "alpha", "parts", "layers")
"""Settings that errors begin with and that are options of a verb that has them."""
Mistake: Any = typer.BadParameter.__base__  # typer moves these classes from version to version
NoArguments: Any = sys.modules[Mistake.__module__].NoArgsIsHelpError


def one_line(text: str, options: Collection[str] = ()) -> str:
    """An error's text in one line.

    Args:
        options: the settings that the verb has as options.
    """
    text = " ".join(text.split())
    for python, here in SPELLED.items():
        text = text.replace(python, here)
    named = text.partition(":")[0]
    return f"--{text}" if named in OPTIONS and named in options else text


class OneLineGroup(TyperGroup):
    """Verbs whose wrong use (an unknown verb or option, a missing argument) is one line too, not typer's box."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except NoArguments:
        raise  # it shows the help
    except Mistake as error:
        text = one_line(error.format_message()).rstrip(".?").replace(". Did", "; did")
        where = error.ctx.command_path if error.ctx is not None else "graft"
        typer.echo(f"error: {text[0].lower()}{text[1:]}; see {where} --help", err=True)
        raise typer.Exit(error.exit_code) from None
