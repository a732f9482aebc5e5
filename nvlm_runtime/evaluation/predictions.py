"""What a model answered, kept line by line as JSON: a first line that says what was asked of which model, then a line a
question, in the order of the questions, so that a run that was killed goes on behind its last complete line.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from nvlm_runtime.evaluation.samples import Sample

Record = dict[str, Any]  # id, prompt, answer, parsed, score, finish_reason, num_tokens


def scored(sample: Sample, answer: str, **more: Any) -> Record:
    """A line of the file: the answer with its score and what the metric read from it."""
    score, parsed = sample.score(answer)
    return {"id": sample.id, "prompt": sample.prompt, "answer": answer, "parsed": parsed, "score": score, **more}


def kept(path: Path, settings: Record, samples: Sequence[Sample], resume: bool) -> list[Record]:
    """The lines that a run finds and does not have to answer again; none without `resume`. Changes nothing.

    Raises ValueError where there is a file and no `resume`, FileNotFoundError where its folder does not exist, and as
    `read` does.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist, expected the folder of the predictions")
    if path.exists() and not resume:
        raise ValueError(f"{path} exists: --resume goes on with it, --predictions names another file")
    records = read(path, samples, settings, complete=False) if _whole_lines(path) else []
    for number, record in enumerate(records, 2):
        if not isinstance(record.get("score"), int | float) or "parsed" not in record:
            raise ValueError(f"{path}:{number}: expected a 'score' and what was 'parsed'")
    return records


def append_to(path: Path, settings: Record) -> TextIO:
    """The file, open behind its last whole line; half a line at its end is cut off. A new one gets its first line."""
    whole = len(_whole_lines(path))
    if path.exists():
        os.truncate(path, whole)
    file = path.open("a", encoding="utf-8")
    if not whole:
        append(file, settings)
    return file


def append(file: TextIO, record: Record) -> None:
    """A line, whole, for whoever kills the process afterwards."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def read(path: Path, samples: Sequence[Sample], settings: Record, *, complete: bool) -> list[Record]:
    """The lines of a file of predictions for these questions, without the first.

    complete: whether a line for each is expected. settings: what the first line must say, at least. Raises
    FileNotFoundError, or ValueError that names the line, for everything else.
    """
    lines = _whole_lines(path, must_exist=True).split(b"\n")[:-1]
    values = [_object(path, number, line) for number, line in enumerate(lines, 1)]
    if not values or "task" not in values[0]:
        raise ValueError(f"{path}:1: expected a line that names the task and the model: no file of predictions")
    if wrong := [name for name in settings if values[0].get(name) != settings[name]]:
        was, now = values[0].get(wrong[0]), settings[wrong[0]]
        raise ValueError(f"{path}:1: {wrong[0]} was {was!r}, now it is {now!r}: the file is another run's")
    records = values[1:]
    if len(records) > len(samples):
        raise ValueError(
            f"{path} has {len(records)} predictions, but {len(samples)} are asked for: --limit, other data?"
        )
    for number, (record, sample) in enumerate(zip(records, samples), 2):
        if record.get("id") != sample.id or record.get("prompt") != sample.prompt:
            raise ValueError(
                f"{path}:{number}: the prediction is for {record.get('id')!r}, expected {sample.id!r} as asked in "
                f"{sample.row.where}: --limit, --seed, other data?"
            )
        if not isinstance(record.get("answer"), str):
            raise ValueError(f"{path}:{number}: expected an 'answer', a text")
    if complete and len(records) < len(samples):
        raise ValueError(f"{path} has {len(records)} of {len(samples)} predictions: finish it with --resume")
    return records


def rewrite(path: Path, records: Sequence[Record]) -> None:
    """The same file with other lines behind the first, replaced as a whole."""
    first = _whole_lines(path, must_exist=True).split(b"\n", 1)[0].decode("utf-8")
    temporary = path.with_name(f"{path.name}.tmp")
    lines = [first, *(json.dumps(record, ensure_ascii=False) for record in records)]
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def _whole_lines(path: Path, must_exist: bool = False) -> bytes:
    if not path.exists() and not must_exist:
        return b""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, expected a file of predictions")
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{number}: expected an object, got {type(value).__name__}")
    return value
