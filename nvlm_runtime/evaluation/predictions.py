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
    """Makes a line of the file: the answer with its score and what the metric read from it.

    Args:
        sample: the question.
        answer: the model's text.
        **more: further values of the line.

    Returns:
        The line's values.
    """
    score, parsed = sample.score(answer)
    return {"id": sample.id, "prompt": sample.prompt, "answer": answer, "parsed": parsed, "score": score, **more}


def kept(path: Path, settings: Record, samples: Sequence[Sample], resume: bool) -> list[Record]:
    """Reads the lines that a run does not have to answer again. Changes nothing.

    Args:
        path: the file of predictions.
        settings: what its first line must say, at least.
        samples: the questions.
        resume: whether an existing file is continued.

    Returns:
        The lines after the first; none without `resume`.

    Raises:
        FileNotFoundError: the file's folder does not exist.
        ValueError: the file exists and `resume` is not given, or as `read` raises it.
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
    """Opens the file after its last whole line; half a line at its end is cut off. A new one gets its first line.

    Args:
        path: the file of predictions.
        settings: values of the first line.

    Returns:
        The file, open for `append`.
    """
    whole = len(_whole_lines(path))
    if path.exists():
        os.truncate(path, whole)
    file = path.open("a", encoding="utf-8")
    if not whole:
        append(file, settings)
    return file


def append(file: TextIO, record: Record) -> None:
    """Writes a line and flushes it, so that it is whole whoever kills the process afterwards.

    Args:
        file: from `append_to`.
        record: values of the line.
    """
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def read(path: Path, samples: Sequence[Sample], settings: Record, *, complete: bool) -> list[Record]:
    """Reads the predictions for these questions.

    Args:
        path: the file of predictions.
        samples: the questions, in the order of the lines.
        settings: what the first line must say, at least.
        complete: whether a line for each question is expected.

    Returns:
        The lines after the first.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is damaged or is of another question or run; names the line.
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
    """Replaces the lines after the first, the file as a whole.

    Args:
        path: the file of predictions.
        records: values of the new lines.
    """
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
