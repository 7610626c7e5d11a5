"""The verb `graft plan`; like `graft.cli`, nothing heavy is imported before it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer


def plan(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN.yaml] [KEY=VALUE]...", help="A run's settings; or base=... and --length alone."),
    ] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of made-up rows; no data are read.")] = None,
    device: Annotated[
        str | None, typer.Option(help="A GPU's name (a100-80, rtx4090), cpu, or its memory (24GB); else this machine.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure two real steps of the longest batch.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the parts as bars: a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Will it fit: the memory that a run needs, and the smallest changes that make it fit. No weights are loaded."""
    from rich.console import Console

    from graft.errors import ConfigError
    from graft.planning.picture import draw, table
    from graft.planning.plan import plan as planned

    if probe and (length is not None or device is not None):
        raise ConfigError("--probe: it measures the run's own rows on this machine; leave --length and --device out")
    run = _run(settings or [], made_up=length is not None)
    found = planned(run, length=length, device=device)
    if probe and found.training.total > found.room:
        found = replace(found, notes=(*found.notes, "not probed: more memory is predicted than there is"))
    elif probe:
        from graft.planning.probe import probe as measured

        found = replace(found, probe=measured(run))
    if picture is not None:
        draw(found, picture)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        Console().print(table(found), highlight=False, soft_wrap=True, markup=False)


def _run(settings: list[str], *, made_up: bool) -> Any:
    from graft.errors import ConfigError
    from graft.train.config import load_run, settings_of

    files = [each for each in settings if "=" not in each]
    if len(files) > 1:
        raise ConfigError(f"{files[1]}: expected key=value; one run is planned at a time")
    if files:
        return load_run(files[0], [each for each in settings if "=" in each])
    if not made_up:
        raise ConfigError("plan: give the YAML file of a run, or base=... and --length")
    return settings_of({"data": {"train": "made up"}, "output": "none"}, settings)
