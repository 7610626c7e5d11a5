"""A finished run opened again: its base, its adapters beside it, its evaluation rows; and what it forgot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from graft.base import load_config, load_tokenizer
from graft.data.rows import Row, load_rows
from graft.errors import ConfigError, DataError
from graft.evaluate.forgetting import TEXTS, Forgetting, forgetting
from graft.evaluate.general import LIMIT
from graft.evaluate.opening import Opened, open_base
from graft.evaluate.run import Evaluation, examine
from graft.train.config import Run, make_run
from graft.train.folder import changed
from graft.train.setup import read_data


@dataclass(frozen=True)
class OpenedRun:
    """A finished run. `names`: its adapters, as routes call them."""

    run: Run
    folder: Path
    opened: Opened
    names: tuple[str, ...]

    def rows(self, source: str | None = None, limit: int | None = None, adapter: str | None = None) -> list[Row]:
        """The rows of a source; None: the run's own evaluation rows, also where they were held out of the training's.

        Args:
            limit: the first so many of those that count.
            adapter: only rows of this one, and rows that name none; None: all.

        Raises:
            ConfigError: the run has no evaluation rows, or its data are not what they were.
            DataError: no row of the adapter, or see `load_rows`.
        """
        if source is not None:
            rows = load_rows(source, columns=self.run.data.columns, limit=limit if adapter is None else None)
        else:
            data = read_data(self.run, load_tokenizer(self.run.base), load_config(self.run.base))
            if data.evaluation is None:
                raise ConfigError(f"{self.folder}: the run has no data.eval; name rows with --data")
            key = next((key for key in changed(self.folder, data) if key != "general"), None)
            if key is not None:
                raise ConfigError(
                    f"data.{key}: the content changed since {self.folder} was begun, so its evaluation rows are others "
                    "now; put it back, or name rows with --data"
                )
            rows = [example.row for example in sorted(data.evaluation, key=lambda each: each.row.index)]
        chosen = [row for row in rows if adapter is None or row.adapter in (None, adapter)]
        if not chosen:
            raise DataError(
                f"{source or self.folder}: no row is of adapter {adapter!r}; name rows that are with --data"
            )
        return chosen[:limit]


def open_run(folder: str | Path, *, device: str | None = None) -> OpenedRun:
    """Load the base of a finished run and its adapters.

    Args:
        folder: of the run (`output`).
        device: None: the run's own.

    Raises:
        ConfigError: no run, or one that is not finished.
        AdapterFileError: a broken adapter.
    """
    folder = Path(folder).expanduser()
    if not (folder / "run.yaml").is_file():
        raise ConfigError(f"{folder}: it holds no run; give the folder that a run's output names")
    if not (folder / "result.json").is_file():
        raise ConfigError(f"{folder}: the run is not finished; graft train {folder / 'run.yaml'} goes on with it")
    run = make_run(yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8")), str(folder / "run.yaml"))
    adapter = folder / "adapter"
    several = [place for place in sorted(adapter.iterdir()) if (place / "adapter_config.json").is_file()]
    alone = (adapter / "adapter_config.json").is_file()
    places = {run.name: str(adapter)} if alone else {place.name: str(place) for place in several}
    opened = open_base(run.base, places, precision=run.precision, device=device or run.device)
    return OpenedRun(run, folder, opened, tuple(places))


def run_forgetting(
    folder: str | Path,
    text: str | Path | None = None,
    *,
    limit: int = LIMIT,
    seed: int = 0,
    batch_size: int = TEXTS,
    device: str | None = None,
) -> dict[str, Forgetting]:
    """What each adapter of a finished run forgot of a general text.

    Args:
        folder: of the run.
        text: see `forgetting`; None: the run's `data.general`.

    Raises:
        ConfigError: no finished run, or no text.
    """
    found = open_run(folder, device=device)
    chosen = text_of(found.run, text, found.folder)
    opened = found.opened
    each = forgetting(
        opened.model, opened.tokenizer, chosen, found.names, limit=limit, seed=seed, batch_size=batch_size
    )
    return dict(zip(found.names, each, strict=True))


def before_and_after(
    opened: Opened,
    tasks: Mapping[str, Sequence[Row]],
    entries: Sequence[Any],
    metrics: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
) -> dict[str, Evaluation]:
    """Scores of the base and of entries on other tasks, side by side in the same batches.

    Args:
        tasks: name to rows.
        entries: names of adapters, or dicts of name to weight; the base is added in front.
        metrics: see `examine`; None: what fits each task's rows.
    """
    template = opened.templates[None]
    return {
        name: examine(opened.model, opened.tokenizer, rows, template, [None, *entries], metrics, batch_size=batch_size)
        for name, rows in tasks.items()
    }


def text_of(run: Run, text: str | Path | None, folder: Path) -> str | Path:
    """The text that was asked for, or else the run's own.

    Raises:
        ConfigError: there is neither.
    """
    chosen = text if text is not None else run.data.general
    if chosen is None:
        raise ConfigError(f"{folder}: the run has no data.general; name a file of text with --text")
    return chosen
