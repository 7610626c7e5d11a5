"""The verbs `graft measure ...`; like `graft.cli`, nothing heavy is imported before one runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer


def group(guarded: Callable[[Callable[..., None]], Callable[..., None]]) -> typer.Typer:
    """The verbs, each `guarded` (see `graft.cli`)."""
    verbs = typer.Typer(no_args_is_help=True, help="Measure what a task needs.")
    verbs.command("intrinsic-dimension")(guarded(intrinsic_dimension))
    return verbs


def intrinsic_dimension(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run's settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.max_steps=200.")
    ] = None,
    sizes: Annotated[str | None, typer.Option(help="Dimensions to try, by commas; 10,30,100,... otherwise.")] = None,
    lrs: Annotated[str, typer.Option(help="Rates to try, for d = 1000; others by sqrt(1000 / d).")] = "1e-3,1e-2",
    full_lrs: Annotated[str | None, typer.Option(help="The same for full fine-tuning; train.lr otherwise.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds from the run's own.")] = 3,
    share: Annotated[float, typer.Option(help="Of full fine-tuning's score, to be reached.")] = 0.9,
    every: Annotated[bool, typer.Option("--all", help="Go on after the first dimension that reaches it.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search the fewest dimensions that reach 90 % of full fine-tuning. The same command goes on after a stop."""
    from rich.console import Console

    from graft.measure.intrinsic import Search, measure
    from graft.train.config import load_run

    search = Search(
        sizes=None if sizes is None else _numbers(sizes, "--sizes", int),
        lrs=_numbers(lrs, "--lrs", float),
        full_lrs=None if full_lrs is None else _numbers(full_lrs, "--full-lrs", float),
        seeds=seeds,
        share=share,
        every=every,
    )
    console = Console(stderr=as_json)
    found = measure(load_run(run, overrides or ()), search, fresh=fresh, console=console)
    if as_json:
        typer.echo(json.dumps(found, indent=2))


def _numbers(text: str, option: str, kind: type) -> tuple[Any, ...]:
    from graft.errors import ConfigError

    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers with commas between them") from None
