"""One question of a benchmark: what is asked, about which pictures, and how an answer is scored."""

import ast
import base64
import binascii
import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from nvlm_runtime.evaluation.choices import LETTERS
from nvlm_runtime.evaluation.rows import Row

MARK = "<image>"  # stands for a picture in a prompt that is shown or kept
LONGEST_INDEX = 64  # what is not longer is no base64, but the index of another row, whose picture it is (VLMEvalKit)

Source = Path | bytes  # a picture: its file, or what is in it
Score = Callable[[str], tuple[float, str | None]]  # an answer: from 0 to 1, and what was read from it, None for nothing


@dataclass(frozen=True)
class Sample:
    """parts: texts and pictures in their order. categories: pairs of a division of the benchmark and a part of it."""

    row: Row
    id: str
    parts: tuple[str | Source, ...]
    score: Score
    categories: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> str:
        """The question as text, `MARK` in the place of each image."""
        return "".join(part if isinstance(part, str) else MARK for part in self.parts)

    @property
    def pictures(self) -> list[Source]:
        """The images of the question, in order."""
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """One user turn, its text literal."""
        parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in self.parts]
        return [{"role": "user", "content": parts}]


@dataclass(frozen=True)
class Pictures:
    """Where a row's pictures are: files under `folder`, or base64 in the column "image" of a TSV, as VLMEvalKit has it.

    tables: of each TSV, that column by "index".
    """

    folder: Path
    tables: dict[Path, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Row], folder: Path) -> "Pictures":
        """Collects where the images of a file's rows are.

        Args:
            rows: of one file or folder. A TSV's rows hold images in base64, or the index of the row that does.
            folder: of image files that other rows name.

        Returns:
            The images of these rows.
        """
        tables: dict[Path, dict[str, str]] = {}
        for row in rows:
            if row.path.suffix == ".tsv" and row.get("index") and row.get("image"):
                tables.setdefault(row.path, {})[row.values["index"]] = row.values["image"]
        return cls(folder, tables)

    def all(self, row: Row, *names: str) -> list[Source]:
        """Finds the images of a row.

        Args:
            row: the row.
            *names: columns; the first that the row has is read.

        Returns:
            Paths or files' bytes, in order.

        Raises:
            ValueError: the row has none, or its base64 is bad.
        """
        if row.path.suffix == ".tsv" and row.get("image"):
            encoded = row.text("image")
            if len(encoded) <= LONGEST_INDEX:
                encoded = self.tables.get(row.path, {}).get(encoded, encoded)
            return [_decode(row, one) for one in (literal_list(encoded) or [encoded])]
        value = row.need(*names)
        values = literal_list(value) or [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
            raise row.error(f"{names[0]!r} must be the name of a picture's file, got {value!r:.60}")
        return [self.folder / name for name in values]

    def one(self, row: Row, *names: str) -> Source:
        """Finds the one image of a row.

        Args:
            row: the row.
            *names: columns; the first that the row has is read.

        Returns:
            A path or a file's bytes.

        Raises:
            ValueError: as `all`, and where the row has several.
        """
        pictures = self.all(row, *names)
        if len(pictures) != 1:
            raise row.error(f"expected one picture, got {len(pictures)}")
        return pictures[0]


def literal_list(text: str) -> list | None:
    """Parses a list written as Python or JSON writes it.

    Args:
        text: any text.

    Returns:
        The list; None for any other text.
    """
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _decode(row: Row, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise row.error(f"'image' is not a picture in base64: {error}") from error


def check_pictures(samples: Iterable[Sample]) -> None:
    """Reads the header of every image.

    Args:
        samples: the questions.

    Raises:
        ValueError: an image is missing or is none; names the row.
    """
    seen: set[Path] = set()
    for sample in samples:
        for source in sample.pictures:
            if isinstance(source, Path):
                if source in seen:
                    continue
                seen.add(source)
                if not source.is_file():
                    raise sample.row.error(f"the picture {source} does not exist (--images FOLDER says where they are)")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the model's limit is looser
                    Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).close()
            except Exception as error:  # Pillow's readers raise nearly everything, see image.py
                name = source if isinstance(source, Path) else "in 'image'"
                raise sample.row.error(f"the picture {name} cannot be read: {error}") from error


def opened(source: Source) -> Path | Image.Image:
    """Makes of an image what the model takes.

    Args:
        source: a path or a file's bytes.

    Returns:
        The path, or a PIL image.
    """
    return Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source


def options(row: Row, *names: str) -> list[str]:
    """Reads the options of a multiple-choice question: columns A, B, ... that have a text, or a list.

    Args:
        row: the row.
        *names: columns that may hold the list, or the list written as text.

    Returns:
        Texts of the options, at least 2.

    Raises:
        ValueError: there is no such list, or it has too few or too many options.
    """
    if columns := [row.values.get(letter) for letter in LETTERS if row.get(letter)]:
        found = [str(value) for value in columns]
    else:
        value = row.need(*names)
        found = literal_list(value) if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str | int | float) for one in found):
            raise row.error(f"{names[0]!r} must be a list of texts, got {value!r:.60}")
        found = [str(one) for one in found]
    if not 2 <= len(found) <= len(LETTERS):
        raise row.error(f"expected 2 to {len(LETTERS)} options, got {len(found)}")
    return found


def gold_letter(row: Row, among: Sequence[str], *names: str) -> str:
    """Reads the right option, given as its letter or as its number from 0.

    Args:
        row: the row.
        among: texts of the options.
        *names: columns; the first that the row has is read.

    Returns:
        The option's letter.

    Raises:
        ValueError: the value names no option.
    """
    value = row.need(*names)
    letters = LETTERS[: len(among)]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = str(value).strip()
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    if text.isdecimal() and int(text) < len(letters):
        return letters[int(text)]
    raise row.error(f"{names[0]!r} must be one of {', '.join(letters)} or a number from 0, got {value!r:.60}")
