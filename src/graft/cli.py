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

from graft import cli_data
from graft.cli_errors import OneLineGroup, one_line
from graft.cli_screen import calm, progress, say
from graft.compare import command as comparing
from graft.errors import ConfigError, GraftError
from graft.measure import command as measure
from graft.planning import command as planning

DEBUG = "GRAFT_DEBUG"
HELP = "/help lists the commands, /exit ends."
app = typer.Typer(
    name="graft",
    cls=OneLineGroup,
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


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose expected errors are one line."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = bool(os.environ.get(DEBUG))
        if not debug:
            calm()
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            if debug:
                raise
            say("interrupted")
            raise typer.Exit(130) from None
        except (GraftError, OSError) as error:
            if debug or isinstance(error, BrokenPipeError):
                raise
            code = getattr(error, "exit_code", 2)
            say(("" if code == 130 else "error: ") + one_line(str(error), kwargs))
            raise typer.Exit(code) from None

    return run


def verb(command: Callable[..., None]) -> Callable[..., None]:
    """Register a verb."""
    return app.command()(guarded(command))


verb(cli_data.data)
app.add_typer(measure.group(guarded), name="measure")
verb(comparing.compare)
verb(planning.plan)


def _version(asked: bool) -> None:
    if asked:
        import graft

        typer.echo(graft.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Adapt a frozen pretrained language model to a task."""
    if debug:
        os.environ[DEBUG] = "1"


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
    from graft.files import load

    model = skeleton(path)
    for name, folder in _named(adapter).items():
        load(model, folder, name)
    found = described(model)
    if as_json:
        _print_json(found.to_dict())
    else:
        typer.echo(str(found))


@verb
def train(
    run: RunFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train also where too much memory is predicted.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Only say where the time of a few steps goes.")] = False,
) -> None:
    """Train an adapter. The same command resumes a run that was cut off."""
    from graft.train import config
    from graft.train import profile as profiling
    from graft.train import run as running

    settings = config.load_run(run, overrides or ())
    profiling.profile(settings, fresh) if profile else running.train(settings, fresh=fresh, force=force)


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
    from graft.data.rows import load_rows
    from graft.evaluate.generate import Decoding
    from graft.evaluate.opening import open_base, with_kind
    from graft.evaluate.run import check_request, examine

    adapters, asked = _named(adapter), [each.strip() for each in metrics.split(",")] if metrics is not None else None
    columns = dict(_pair(text, "--column", "prompt=question") for text in column or ())
    if no_base and not adapters:
        raise ConfigError("--no-base: name at least one --adapter to evaluate")
    check_request(asked, answers)
    rows = load_rows(data, split=split, columns=columns, limit=limit)
    opened = open_base(base, adapters, precision=precision, device=device)
    entries = [*([] if no_base else [None]), *adapters]
    templates = [opened.templates[entry] for entry in entries]
    if template is not None:
        templates = [with_kind(each, template) for each in templates]
    _notes(opened.notes)
    with progress() as tell:
        found = examine(
            opened.model,
            opened.tokenizer,
            rows,
            templates,
            entries,
            asked,
            batch_size=batch_size,
            decoding=Decoding(max_new_tokens=max_new_tokens),
            truncate=truncate,
            progress=tell,
        )
    if answers is not None:
        found.write(answers, rows)
    _print_json(found.scores) if as_json else typer.echo(str(found))


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
    from graft.chat import Chat, lines_of
    from graft.evaluate.generate import Decoding
    from graft.evaluate.opening import open_base

    adapters = _named(adapter)
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, seed=None)
    opened = open_base(base, adapters, precision=precision, device=device)
    _notes(opened.notes)
    talk = Chat(
        opened.model,
        opened.tokenizer,
        opened.templates,
        functools.partial(print, end="", flush=True),
        entry=next(iter(adapters), None),
        system=system,
        decoding=decoding,
    )
    talk.run(lines_of(sys.stdin, f"{talk.speaker} answers.  {HELP}"))


@verb
def merge(
    base: Base,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter folder.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A new folder.")],
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied weight that changes a copy of its own.")] = False,
    precision: Annotated[str, typer.Option(help="How to load the base; as its checkpoint is otherwise.")] = "auto",
    into: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32: what a base in nf4 or int8 becomes.")] = None,
    device: Device = None,
) -> None:
    """Write the base with an adapter merged in as a plain transformers folder, checked against the adapter's probe."""
    from graft.convert import merge_folder

    name = _name_of(adapter)
    apart = merge_folder(base, adapter, output, precision=precision, into=into, untie=untie, device=device, name=name)
    typer.echo(f"{output}: a plain transformers model; its logits are the adapter's{_within(apart)}")


@verb
def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder or file.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A new folder or file.")],
    base: Annotated[str, typer.Option(help="The base that the adapter was made for.")],
    to: Annotated[str, typer.Option(help="graft, peft, adapterhub, loralib or llama-adapter.")],
    source_form: Annotated[
        str | None,
        typer.Option("--from", help="adapterhub, loralib, llama-adapter or longlora; a folder of peft's or Graft's."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="loralib: the lora_alpha of its layers.")] = None,
    parts: Annotated[str | None, typer.Option(help="loralib: what a fused linear enables, as query,value.")] = None,
    layers: Annotated[int | None, typer.Option(help="llama-adapter: how many top layers have prompts.")] = None,
    rope_factor: Annotated[float | None, typer.Option(help="longlora: what positions are divided by.")] = None,
    device: Device = None,
) -> None:
    """Write an adapter in another form; what it cannot hold is named, never dropped."""
    from graft.convert import convert_adapter

    asked: dict[str, Any] = {
        "alpha": alpha,
        "parts": None if parts is None else tuple(parts.split(",")),
        "layers": layers,
    }
    given = {key: value for key, value in {**asked, "rope_factor": rope_factor}.items() if value is not None}
    given["name"] = _name_of(adapter)
    done = convert_adapter(adapter, output, base=base, to=to, source_form=source_form, device=device, **given)
    typer.echo(f"{done.path}: in {to}'s form")
    _notes([f"it does not hold {what}" for what in done.lost])


@verb
def schema() -> None:
    """The JSON schema of a run's YAML, for editors."""
    from graft.train.config import schema as run_schema

    _print_json(run_schema())


def _named(adapters: list[str] | None) -> dict[str, str]:
    """Name to folder; where none is given the folder's own name, and for a run's `adapter` that of the run."""
    found: dict[str, str] = {}
    for text in adapters or ():
        name, equals, folder = text.partition("=")
        if not equals:
            name, folder = _name_of(text), text
        if name in found:
            raise ConfigError(f"--adapter {text}: the name {name!r} is taken; write another as NAME=FOLDER")
        found[name] = folder
    return found


def _name_of(folder: str) -> str:
    place = Path(folder).resolve()
    return (place.parent if place.name == "adapter" else place).name  # a run's result


def _pair(text: str, option: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ConfigError(f"{option} {text}: expected OURS=THEIRS, for example {example}")
    return name, value


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _notes(notes: list[str]) -> None:
    for note in notes:
        say(f"note: {note}")


def _within(apart: float | None) -> str:
    return "" if apart is None else f" within {apart:.1g} of the largest"
