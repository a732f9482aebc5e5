"""The rows of a benchmark's file, each with the place it stands at: JSON, JSONL, TSV, CSV, or a folder of them."""

import csv
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".tsv", ".csv")


@dataclass(frozen=True)
class Row:
    """where: its file and line, or its number in a JSON list, for error messages. number: that line or number."""

    where: str
    path: Path
    number: int
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """Names the row among those of one benchmark, where the benchmark does not."""
        return f"{self.path.parent.name}/{self.path.name}:{self.number}"

    def error(self, reason: str) -> ValueError:
        """Makes an error that names the row.

        Args:
            reason: what was found and what was expected.

        Returns:
            The error, to be raised.
        """
        return ValueError(f"{self.where}: {reason}")

    def get(self, *names: str) -> Any:
        """The first of these that the row has and that is not empty; None without one."""
        return next((self.values[name] for name in names if not _is_empty(self.values.get(name))), None)

    def need(self, *names: str) -> Any:
        """`get`; ValueError that says what the row has where it has none of these."""
        value = self.get(*names)
        if value is None:
            has = ", ".join(name for name in self.values if not _is_empty(self.values[name])) or "nothing"
            raise self.error(f"expected {' or '.join(map(repr, names))}, the row has {has}")
        return value

    def text(self, *names: str) -> str:
        """Returns the text under the first of some names that the row has.

        Args:
            *names: names of columns or keys.

        Raises:
            ValueError: the row has none of them, or its value is no text.
        """
        value = self.need(*names)
        if not isinstance(value, str):
            raise self.error(f"{names[0]!r} must be a text, got {value!r:.60}")
        return value

    def texts(self, *names: str) -> list[str]:
        """One text, or a list of them. ValueError for an empty list."""
        value = self.need(*names)
        values = [value] if isinstance(value, str | int | float) else value
        if not isinstance(values, list) or not values or not all(isinstance(v, str | int | float) for v in values):
            raise self.error(f"{names[0]!r} must be a text or a list of texts, got {value!r:.60}")
        return [str(value) for value in values]


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", []) or isinstance(value, float) and math.isnan(value)


def read_rows(path: Path, columns: Sequence[str] | None = None, key: str | None = None) -> list[Row]:
    """Reads every row of a file, or of all the files of a folder in the order of their names.

    Args:
        path: a file or folder.
        columns: of a CSV without a header.
        key: the name under which a JSON object holds its list of rows; an object without it is a row itself, or, where
            its values are objects, holds its rows by name ("key" in each).

    Returns:
        The rows, at least one.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: a file cannot be read, or there are no rows; names file and line.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    elif path.exists():
        files = [path]
    else:
        raise FileNotFoundError(f"{path} does not exist")
    rows = [row for file in files for row in _read(file, columns, key)]
    if not rows:
        raise ValueError(f"{path} has no rows, expected {', '.join(SUFFIXES)} with at least one")
    return rows


def _read(path: Path, columns: Sequence[str] | None, key: str | None) -> Iterator[Row]:
    readers: dict[str, Callable[[], Iterator[Row]]] = {
        ".json": lambda: _read_json(path, key),
        ".jsonl": lambda: _read_jsonl(path),
        ".tsv": lambda: _read_table(path, "\t", None),
        ".csv": lambda: _read_table(path, ",", columns),
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a file in {', '.join(SUFFIXES)}; write other forms, as Parquet, as JSONL")
    try:
        yield from readers[path.suffix]()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _read_json(path: Path, key: str | None) -> Iterator[Row]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if isinstance(whole, dict) and key in whole:
        shared = {name: value for name, value in whole.items() if isinstance(value, str)}
        whole = [shared | row if isinstance(row, dict) else row for row in _list(path, whole[key])]
    elif isinstance(whole, dict) and whole and all(isinstance(value, dict) for value in whole.values()):
        whole = [{"key": name} | value for name, value in whole.items()]
    elif isinstance(whole, dict):
        yield _row(str(path), path, 1, whole)
        return
    for number, values in enumerate(_list(path, whole), 1):
        yield _row(f"{path}, row {number}", path, number, values)


def _list(path: Path, value: Any) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(value).__name__}")
    return value


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _row(f"{path}:{number}", path, number, json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error.msg}") from error


def _read_table(path: Path, delimiter: str, columns: Sequence[str] | None) -> Iterator[Row]:
    before = csv.field_size_limit(sys.maxsize)  # a picture in base64 is longer than the default; the limit is global
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            names = list(columns) if columns else next(reader, [])
            rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(f"{path}: not a table: {error}") from error
    finally:
        csv.field_size_limit(before)
    for line, cells in rows:
        if len(cells) != len(names):
            raise ValueError(f"{path}:{line}: expected {len(names)} columns, got {len(cells)}")
        yield _row(f"{path}:{line}", path, line, dict(zip(names, cells)))


def _row(where: str, path: Path, number: int, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object of names and values, got {type(values).__name__}")
    return Row(where, path, number, values)
