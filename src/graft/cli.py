"""The command line: `graft VERB`. Nothing heavy is imported before a verb runs.

An error that Graft raises on purpose is one line on stderr and exit code 2; Ctrl-C is 130; --debug shows tracebacks.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.errors import ConfigError, GraftError

DEBUG = "GRAFT_DEBUG"
app = typer.Typer(
    name="graft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Base = Annotated[str, typer.Argument(metavar="BASE", help="A folder, a hub name, or 'embedded'.")]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", metavar="[NAME=]FOLDER", help="An adapter folder; may be repeated.")
]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16, fp16, int8 or nf4.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU if there is one.")]
RunFile = Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run's settings.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.lr=2e-4.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """The program `graft`."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:  # wherever it stands
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(args=arguments, prog_name="graft")


def verb(command: Callable[..., None]) -> Callable[..., None]:
    """Register a verb whose expected errors are one line."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        debug = bool(os.environ.get(DEBUG))
        if not debug:
            _calm()
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            if debug:
                raise
            _say("interrupted")
            raise typer.Exit(130) from None
        except (GraftError, OSError) as error:
            if debug or isinstance(error, BrokenPipeError):
                raise
            _say(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(2) from None

    return app.command()(guarded)


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Adapt a frozen pretrained language model to a task."""
    if debug:
        os.environ[DEBUG] = "1"
    if version:
        import graft

        typer.echo(graft.__version__)
        raise typer.Exit


@verb
def quickstart(
    output: Annotated[str, typer.Option(help="The run's folder.")] = "quickstart",
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps; two epochs otherwise.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
) -> None:
    """Train LoRA on the packaged model and data, offline, and show what it does."""
    from graft.quickstart import run_quickstart

    run_quickstart(output, steps=steps, fresh=fresh)


@verb
def describe(
    path: Base,
    adapter: Adapters = None,
    as_json: AsJson = False,
) -> None:
    """Sites, roles, shapes and counts of a model, from its config alone."""
    from graft.description import describe as described
    from graft.description import skeleton

    model = skeleton(path)
    _load_all(model, adapter)
    found = described(model)
    if as_json:
        _print_json(found.to_dict())
    else:
        typer.echo(str(found))


@verb
def data(run: RunFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """What a run's data holds: rows, tokens, lengths, duplicates, leaks, and three examples."""
    raise NotImplementedError


@verb
def train(
    run: RunFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
) -> None:
    """Train an adapter. The same command resumes a run that was cut off."""
    raise NotImplementedError


@verb
def evaluate(
    base: Base,
    data: Annotated[str, typer.Option("--data", help="A file, a folder or a hub name.")],
    adapter: Adapters = None,
    metrics: Annotated[str | None, typer.Option(help="Separated by commas; what fits the rows otherwise.")] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", metavar="OURS=THEIRS", help="A column's name in the data.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    template: Annotated[str | None, typer.Option(help="chat, plain, instruction or alpaca; the adapter's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch, each once for each adapter.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    no_base: Annotated[bool, typer.Option("--no-base", help="Leave the bare base out.")] = False,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut rows longer than the context.")] = False,
    answers: Annotated[str | None, typer.Option(help="Write every answer to this JSONL file.")] = None,
    precision: Precision = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score adapters and their base, side by side in the same batches."""
    from graft import verbs

    found = verbs.run_evaluation(
        base,
        _named(adapter),
        source=data,
        metrics=metrics.split(",") if metrics is not None else None,
        columns=dict(_pair(text, "--column prompt=question") for text in column or ()),
        split=split,
        limit=limit,
        template=template,
        with_base=not no_base,
        answers=answers,
        precision=precision,
        device=device,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        truncate=truncate,
    )
    if as_json:
        _print_json(found.scores)
    else:
        verbs.print_scores(found.scores)


@verb
def chat(
    base: Base,
    adapter: Adapters = None,
    system: Annotated[str | None, typer.Option(help="A message before every conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    precision: Precision = "auto",
    device: Device = None,
) -> None:
    """Talk to a base and its adapters; /adapter NAME and /base switch between answers."""
    from graft import verbs

    verbs.run_chat(
        base,
        _named(adapter),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        precision=precision,
        device=device,
    )
