"""The verb `graft compare`; like `graft.cli`, nothing heavy is imported before it runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def compare(
    settings: Annotated[str, typer.Argument(metavar="COMPARE.yaml", help="The comparison's settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example seeds=5.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Do runs again that failed or were skipped.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at once; the settings' own otherwise.")] = None,
    executor: Annotated[str | None, typer.Option(help="local or ray; the settings' own otherwise.")] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Only fine-tuning against in-context learning, as the key matrix says.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try methods on your own data, and say which is best. The same command goes on after a stop."""
    from rich.console import Console

    from graft.compare.run import compare as run
    from graft.compare.run import with_matrix
    from graft.compare.settings import load_compare

    asked = [*(overrides or ())]
    asked += [f"executor.workers={workers}"] if workers is not None else []
    asked += [f"executor.kind={executor}"] if executor is not None else []
    console = Console(stderr=as_json)
    found = with_matrix(settings, asked, console) if matrix else run(load_compare(settings, asked), retry, console)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
