"""Rows of a dataset on disk: JSON lines in the LLaVA/ShareGPT form, read one at a time.

    {"image": "a.png",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A receipt."}]}

"image" is a path, a list of paths or absent (text alone), relative to the file's folder or an image root; a first turn
may be from "system". The file is scanned once for where its lines begin and never held.
Source: the published format of LLaVA's and ShareGPT's training files.
"""

import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


class BadRecord(ValueError):
    """A row that cannot be learnt from; says which file and line, and why."""


@dataclass(frozen=True)
class Record:
    """messages: as `prompt.build_prompt` takes them. where: file and line, for messages to people."""

    messages: tuple[dict[str, str], ...]
    images: tuple[Path, ...]
    where: str


class JsonLines:
    """Rows of a file by number. Raises FileNotFoundError, or ValueError for a file without a row."""

    def __init__(self, path: Path, image_root: Path | None = None):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: expected a file of JSON lines")
        self.path, self.image_root = path, image_root or path.parent
        starts, lines, at = array("q"), array("q"), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    starts.append(at)
                    lines.append(number)
                at += len(line)
        if not starts:
            raise ValueError(f"{path} is empty: expected a JSON object a line")
        self._starts, self._lines = starts, lines

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord where the line is no conversation, or a picture of it is not there."""
        where = f"{self.path}, line {self._lines[index]}"
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"{where}: not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise BadRecord(f"{where}: expected a JSON object, got {type(values).__name__}")
        return Record(_messages(values.get("conversations"), where), self._images(values.get("image"), where), where)

    def _images(self, given: Any, where: str) -> tuple[Path, ...]:
        names = [] if given is None else [given] if isinstance(given, str) else given
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise BadRecord(f"{where}: 'image' must be a path or a list of paths, got {given!r:.60}")
        paths = tuple(self.image_root / name for name in names)
        if missing := [path for path in paths if not path.is_file()]:
            raise BadRecord(f"{where}: the picture {missing[0]} does not exist")
        return paths


def _messages(turns: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"{where}: 'conversations' must be a list of turns, got {turns!r:.60}")
    found: list[dict[str, str]] = []
    for number, turn in enumerate(turns, 1):
        role = ROLES.get(turn.get("from")) if isinstance(turn, dict) and isinstance(turn.get("from"), str) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            raise BadRecord(
                f"{where}: turn {number} must have 'from' (human, gpt or system) and a text 'value', got {turn!r:.80}"
            )
        spoken = sum(message["role"] != "system" for message in found)
        expected = "system or user" if not found else ("user", "assistant")[spoken % 2]
        if role not in expected.split(" or "):
            raise BadRecord(f"{where}: turn {number} is from {turn['from']!r} where {expected}'s was expected")
        if role == "assistant" and not text.strip():
            raise BadRecord(f"{where}: turn {number}, an answer, is empty")
        found.append({"role": role, "content": text})
    if found[-1]["role"] != "assistant":
        raise BadRecord(f"{where}: the last turn must be an answer, and is from {turns[-1]['from']!r}")
    return tuple(found)
