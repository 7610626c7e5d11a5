"""`graft quickstart`: the main job once from end to end, offline, on the packaged model and data.

LoRA teaches a small storyteller to write restaurant descriptions (E2E NLG) from lists of facts; then base and adapter
answer held-out rows side by side, in one batch.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graft.data.rows import load_rows
from graft.errors import ConfigError
from graft.evaluate.generate import Decoding
from graft.evaluate.opening import open_base
from graft.evaluate.run import examine
from graft.train.config import Run, make_run
from graft.train.result import Result
from graft.train.run import train

NAME = "e2e"
BASE = "embedded"
RESULTS = "quickstart.json"
COLUMNS = {"prompt": "meaning_representation", "completion": "reference"}
SHOWN = (12, 48, 84)
"""Held-out rows whose answers are shown, chosen for three restaurants, not for their answers."""
LONGEST = 96
"""Tokens of an answer; the longest reference has fewer."""

Found = dict[str, Any]


def run_quickstart(
    output: str, *, steps: int | None = None, fresh: bool = False, console: Console | None = None
) -> Found:
    """Train, compare, show. The same call goes on where it was stopped; after the end it shows the results again.

    Args:
        output: the run's folder.
        steps: optimizer steps; None: two epochs over 2,400 rows.
        fresh: start over in a new folder.

    Returns:
        `bleu` before and after, three `examples`, and the adapter's folder.

    Raises:
        GraftError: see `train`.
    """
    console = console or Console()
    console.print("[bold]Graft quickstart[/bold]: a small language model learns to describe restaurants, offline.")
    result = train(settings(output, steps), fresh=fresh, console=console)
    stored = result.folder / RESULTS
    if stored.is_file():
        found = _read(stored)
    else:
        with console.status("base and adapter answer 100 held-out rows, side by side"):
            found = compare(result)
        _write(stored, found)
    show(found, result, console)
    return found


def settings(output: str, steps: int | None = None) -> Run:
    """The run: what a trial found good on this model and data."""
    return make_run(
        {
            "base": BASE,
            "precision": "fp32",
            "method": {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
            "name": NAME,
            # Batches of mixed lengths: grouped by length the answers came out shorter and 5 BLEU worse.
            "data": {"train": _asset("train.jsonl"), "columns": COLUMNS, "template": "chat", "group": False},
            "train": {"lr": 4e-3, "epochs": 2, "max_steps": steps, "batch_size": 16, "save_every": 50},
            "output": output,
        },
        "quickstart",
    )


def compare(result: Result) -> Found:
    """Base and adapter on the held-out rows in the same batches: BLEU of both, and some of their answers."""
    rows = load_rows(_asset("dev.jsonl"), columns={"prompt": COLUMNS["prompt"]})
    opened = open_base(BASE, {NAME: str(result.adapter)}, precision="fp32")
    found = examine(
        opened.model,
        opened.tokenizer,
        rows,
        opened.templates[NAME],
        [None, NAME],
        ["bleu"],
        batch_size=50,
        decoding=Decoding(max_new_tokens=LONGEST),
    )
    examples = [
        {
            "facts": rows[number].prompt,
            "before": found.answers["base"][number],
            "after": found.answers[NAME][number],
            "person": rows[number].references[0],
        }
        for number in SHOWN
    ]
    bleu = {"before": found.scores["base"]["bleu"], "after": found.scores[NAME]["bleu"]}
    return {"bleu": bleu, "rows": len(rows), "examples": examples}


def show(found: Found, result: Result, console: Console) -> None:
    """The comparison, where the adapter lies, and what to try next."""
    bleu = found["bleu"]
    console.print()
    console.print(
        f"[bold]BLEU on {found['rows']} held-out rows: {bleu['before']:.1f} before, {bleu['after']:.1f} after[/bold]",
        highlight=False,
    )
    for example in found["examples"]:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, style in (("facts", ""), ("before", "red"), ("after", "green"), ("person", "")):
            text = textwrap.shorten(example[name], 200, placeholder=" ...") or "(no text)"
            table.add_row(name, f"[{style}]{escape(text)}[/{style}]" if style else escape(text))
        console.print()
        console.print(table, highlight=False)
    console.print()
    where = escape(str(result.adapter))
    console.print(
        f"The adapter ({result.saved:,} values; the base is unchanged) is in [bold]{where}[/bold]",
        highlight=False,
        soft_wrap=True,
    )
    console.print("Next:", highlight=False)
    for command in next_commands(result):
        console.print(f"  {escape(command)}", highlight=False, soft_wrap=True, style="cyan")


def next_commands(result: Result) -> list[str]:
    """Three commands that work when they are pasted into the shell that this program runs in."""
    adapter, folder = shlex.quote(str(result.adapter)), result.folder
    merged, other = (shlex.quote(str(folder.with_name(f"{folder.name}-{end}"))) for end in ("merged", "rank4"))
    program = _program()
    return [
        f"{program} chat {BASE} --adapter {adapter}",
        f"{program} merge {BASE} {adapter} {merged}",
        f"{program} train {shlex.quote(str(folder / 'run.yaml'))} method.rank=4 output={other}",
    ]


def _program() -> str:
    """How this shell can call `graft`: by its name if that is this very one, else by its path."""
    script = Path(sys.executable).parent / "graft"
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m graft"
    found = shutil.which("graft")
    if found is not None and Path(found).resolve() == script.resolve():
        return "graft"
    here = os.path.relpath(script)
    return shlex.quote(str(script) if here.startswith("..") else here)


def _asset(name: str) -> str:
    return str(resources.files("graft") / "assets" / "e2e" / name)


def _read(file: Path) -> Found:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"bleu", "rows", "examples"} <= set(found):
            raise ValueError("something else")
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); delete it to compare again") from None
    return found


def _write(file: Path, found: Found) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)
