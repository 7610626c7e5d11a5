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
    verbs.command("dial")(guarded(dial))
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


def dial(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    data: Annotated[str | None, typer.Option(help="Rows of the task; the run's own evaluation rows otherwise.")] = None,
    text: Annotated[str | None, typer.Option(help="General text; the run's data.general otherwise.")] = None,
    scales: Annotated[str, typer.Option(help="By commas; 0 is the base, 1 as trained.")] = "0,0.2,0.4,0.6,0.8,1,1.2",
    metric: Annotated[str | None, typer.Option(help="The score; accuracy for labels, else loss.")] = None,
    max_forgetting: Annotated[float | None, typer.Option(help="Largest KL to the base, nats a token.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of general text, at most.")] = 8192,
    store: Annotated[float | None, typer.Option(help="Write the adapter with this scale folded in.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Whose dial, if the run has several.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the run's own otherwise.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Trace an adapter's scale against the task's score and forgetting, without training again."""
    from rich.console import Console

    from graft.measure.dial import Dial
    from graft.measure.dial import dial as traced

    asked = Dial(data, text, _numbers(scales, "--scales", float), metric, max_forgetting, limit, tokens, store, adapter)
    found = traced(run, asked, device=device, console=Console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


def _numbers(text: str, option: str, kind: type) -> tuple[Any, ...]:
    from graft.errors import ConfigError

    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers with commas between them") from None
