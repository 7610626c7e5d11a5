"""The verb `graft data`: what a run's data holds, or data that a recipe makes. Nothing heavy is imported early."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer


def data(
    file: Annotated[
        str, typer.Argument(metavar="RUN.yaml|RECIPE.yaml", help="A run's settings, or a recipe (it has sources).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example data.limit=100 or size=1000.")
    ] = None,
    preview: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only show N rows of each source and template (recipe).")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="Instead of generate.endpoint (recipe).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new folder (recipe).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a run's data holds; or, from a recipe, make instruction data."""
    from graft.data.recipe import is_recipe
    from graft.errors import ConfigError

    if is_recipe(file):
        _recipe(file, overrides or [], preview, endpoint, fresh, as_json)
        return
    given = {"--preview": preview, "--endpoint": endpoint, "--fresh": fresh or None}
    for option, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{option}: {file} is a run, and {option} is for recipes, which have sources; leave it out"
            )
    _run(file, overrides or [], as_json)


def _run(file: str, overrides: list[str], as_json: bool) -> None:
    from graft.base import load_config, load_tokenizer
    from graft.train.config import load_run
    from graft.train.setup import check_data, read_data

    settings = load_run(file, overrides)
    config = load_config(settings.base)
    found = read_data(settings, load_tokenizer(settings.base), config)
    typer.echo(_json(found.report.to_dict()) if as_json else str(found.report))
    check_data(settings, found)


def _recipe(
    file: str, overrides: list[str], preview: int | None, endpoint: str | None, fresh: bool, as_json: bool
) -> None:
    from graft.data import make as making
    from graft.data.recipe import load_recipe
    from graft.errors import ConfigError

    recipe = load_recipe(file, overrides, endpoint)
    if preview is not None:
        if as_json:
            raise ConfigError("--json: a preview is text alone; leave one of --preview and --json out")
        typer.echo(making.preview(recipe, preview))
        return
    with _progress() as progress:
        made = making.make(
            recipe, fresh=fresh, progress=progress, tell=lambda line: typer.echo(f"note: {line}", err=True)
        )
    typer.echo(_json(made.report | {"folder": str(made.folder)}) if as_json else str(made))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr where that is a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        bars: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = shown.add_task(what, total=total)
            shown.update(bars[what], completed=done)

        yield tell
