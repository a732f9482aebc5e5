"""Small datasets on disk: noise pictures of several grids, conversations of several lengths, text alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvlm_runtime.checkpoint.weights import save
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.training.records import JsonLines
from nvlm_runtime.training.source import Dataset
from tests.model.test_model import picture
from tests.small import CONFIGS, micro_tokenizer, randomise

SIZES = [(96, 64), (32, 32), (64, 32), (32, 96)]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write_records(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_data(folder: Path, count: int = 14) -> tuple[Path, Path]:
    """JSON lines with pictures, and of text alone."""
    rows = []
    for i in range(count):
        picture(SIZES[i % len(SIZES)], i).save(folder / f"{i}.png")
        said = [f"<image>\nWhat is number {i}?", f"It is {i}."]
        if i % 3 == 0:
            said += ["And then?", f"Then comes {i + 1}, and that was all there is to say."]
        rows.append({"id": i, "image": f"{i}.png", "conversations": turns(*said)})
    rows.append({"image": ["0.png", "1.png"], "conversations": turns("<image> and <image>: the same?", "No.")})
    text = [{"conversations": turns(f"Say {i}.", str(i))} for i in range(count)]
    return write_records(folder / "seen.jsonl", rows), write_records(folder / "text.jsonl", text)


def datasets(folder: Path) -> list[Dataset]:
    seen, text = write_data(folder)
    return [Dataset("seen", JsonLines(seen), 0.7), Dataset("text", JsonLines(text), 0.3)]


def write_model(folder: Path, variant: str, **cross: str) -> Path:
    config = CONFIGS[variant]
    if cross and config.cross:
        config = replace(config, cross=replace(config.cross, **cross))
    save(randomise(NVLMModel(config)), folder)
    micro_tokenizer().save(folder)
    return folder
