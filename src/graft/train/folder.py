"""The folder of a run: where it is, whether it was begun with the same settings and data, and what is written first."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from graft.disk import LOCK, write_text
from graft.errors import ConfigError
from graft.settings import flat
from graft.train.config import Run, make_run
from graft.train.setup import Data

DATA = "data.json"
"""Written before `run.yaml`: a folder with settings alone is a user's, not a run's."""
PAGE = "profile.md"
"""Where the time of a few steps went: `graft train --profile` writes it, before or after the run itself."""


def place(run: Run, fresh: bool) -> Path:
    """Where the run goes: a new folder, or one that was begun with the same settings."""
    folder = Path(run.output).expanduser()
    if fresh:
        number, first = 2, folder
        while folder.exists():
            folder, number = first.with_name(f"{first.name}-{number}"), number + 1
        return folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file; name a folder")
    settings = folder / "run.yaml"
    if settings.is_file() and not (folder / DATA).is_file():
        raise ConfigError(f"output: {settings} is no run's own and would be overwritten; take another folder")
    if settings.is_file():
        _check_same(settings, run)
    elif folder.is_dir() and any(item.name not in ("checkpoints", DATA, LOCK, PAGE) for item in folder.iterdir()):
        raise ConfigError(f"output: {folder} holds something else than a run; take another folder")
    return folder


def _check_same(settings: Path, run: Run) -> None:
    try:
        stored = make_run(yaml.safe_load(settings.read_text(encoding="utf-8")), str(settings))
        before = flat(stored.model_dump(mode="json"), lists=False)
    except (ConfigError, yaml.YAMLError, OSError) as error:
        raise ConfigError(f"output: the settings in {settings} cannot be read ({error}); use --fresh") from None
    now = flat(run.model_dump(mode="json"), lists=False)
    for key in [*before, *now]:
        if key != "output" and before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: {settings.parent} was begun with {before.get(key)!r}, not {now.get(key)!r}; put it back, "
                "take another output, or use --fresh"
            )


def begun(folder: Path, data: Data) -> bool:
    """Whether the run was begun before; then the data must be what it was."""
    file = folder / DATA
    if not file.is_file():
        return False
    for key in changed(folder, data):
        raise ConfigError(f"data.{key}: the content changed since {folder} was begun; put it back or use --fresh")
    return True


def changed(folder: Path, data: Data) -> list[str]:
    """Which sources of a run that was begun are not what they were: train, eval, general."""
    before = json.loads((folder / DATA).read_text(encoding="utf-8"))["sha256"]
    return [key for key, value in data.hashes.items() if before.get(key) != value]


def begin(run: Run, folder: Path, data: Data) -> None:
    """Write the settings, which make the folder a run, and the data report."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {"sha256": data.hashes, "report": data.report.to_dict()}
    text = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(folder / DATA, json.dumps(shown, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "run.yaml", text)


@contextlib.contextmanager
def undone(folder: Path) -> Iterator[None]:
    """Remove the empty folders that were made, if the block fails before it wrote anything."""
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in (folder / "checkpoints", *missing):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
