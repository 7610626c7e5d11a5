"""Files and hub names to records: plain dicts with the number of the row they came from. Knows formats, not columns."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from graft.errors import DataError

Record = dict[str, Any]
Numbered = tuple[int, Record]


def near(name: object, known: Iterable[str]) -> str:
    """' (did you mean ...?)' with the nearest known name, or nothing."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""


def records(source: str, split: str | None = None) -> Iterator[Numbered]:
    """The records of a source, in order, each with its row number, which counts from 1 (in JSONL it is the line).

    `source` is a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet), a folder in the form of a hub data set, or a hub
    name with an optional configuration ("nyu-mll/glue:sst2"). `split` is for the last two ("train" if not said).
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _hub(str(path), split)
    reader = READERS.get(path.suffix.lower())
    if path.is_file() and reader is None:
        raise DataError(f"{source}: unknown kind of data file '{path.suffix}'; use one of {', '.join(READERS)}")
    if reader is None and _is_hub_name(source):
        return _hub(source, split)
    if not path.is_file() or reader is None:
        raise DataError(f"{source}: no such file{_neighbour(path)}")
    if split is not None:
        raise DataError(f"{source}: a file has no split '{split}'; leave data split out, or name another file")
    return reader(path)


def _is_hub_name(source: str) -> bool:
    """name, owner/name, or either with :configuration."""
    repository, _, configuration = source.partition(":")
    parts = [*repository.split("/"), *configuration.split()]
    plain = all(part and all(c.isalnum() or c in "._-" for c in part) for part in parts)
    return plain and repository.count("/") <= 1 and not source.startswith(".")


def _neighbour(path: Path) -> str:
    """The nearest name in the folder that should hold the file, or that the folder is missing."""
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    return near(path.name, (p.name for p in path.parent.iterdir() if p.suffix.lower() in READERS))


def _jsonl(path: Path) -> Iterator[Numbered]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                record = _parse(line.removeprefix(b"\xef\xbb\xbf"), path, f"line {number}")
                yield number, _object(record, path, number, _escapes(line))


def _json(path: Path) -> Iterator[Numbered]:
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    content, escapes = _parse(text, path, None), _escapes(text)
    if isinstance(content, dict):
        content = content.get("data")
    if not isinstance(content, list):
        raise DataError(f'{path}: expected a list of objects or {{"data": [...]}}; for one object a line use .jsonl')
    for number, record in enumerate(content, start=1):
        yield number, _object(record, path, number, escapes)


def _parse(content: bytes, path: Path, where: str | None) -> Any:
    place = f"{path} {where}" if where else str(path)
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if where else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{place}: not valid JSON ({error.msg}, {at}); mend or remove it") from None
    except RecursionError:
        raise DataError(f"{place}: JSON nested too deeply; mend or remove it") from None


def _escapes(content: bytes) -> bool:
    """Whether JSON escapes may stand for surrogates, the halves of characters beyond the first 65536."""
    return b"\\ud" in content or b"\\uD" in content


def _object(record: Any, path: Path, number: int, escapes: bool) -> Record:
    if not isinstance(record, dict):
        raise DataError(f"{path} row {number}: expected a JSON object with named columns, not {type(record).__name__}")
    if escapes:
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise DataError(
                f"{path} row {number}: half a character ({half}), which no file can hold; mend or remove the row"
            ) from None
    return record


def _csv(path: Path) -> Iterator[Numbered]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    number = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(table, [])
            if len(set(header)) < len(header) or (header and not all(header)):
                raise DataError(f"{path}: the first line must name each column once; it is {header}")
            for cells in table:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    raise DataError(f"{path} row {number}: {len(cells)} cells, but the first line names {len(header)}")
                yield number, dict(zip(header, cells, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 near row {number + 1} ({error.reason}); save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path} row {number + 1}: not valid CSV ({error}); mend or remove it") from None


def _parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None


def _hub(name: str, split: str | None) -> Iterator[Numbered]:
    """A folder or hub name by `datasets`, which runs no code of the data set."""
    import datasets

    repository, _, configuration = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        table = datasets.load_dataset(repository, configuration or None, split=split or "train")
    except Exception as error:  # it raises a dozen unrelated classes: connection, hub, value and file errors
        raise DataError(
            f"{name} (split '{split or 'train'}'): neither a file here nor a data set that could be loaded "
            f"({_first_line(error)}); check the name and split, or give a local file"
        ) from error
    for number, record in enumerate(table, start=1):
        yield number, dict(record)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
