"""Checkpoints of a run, whole or not there: a folder is filled under another name, flushed to disk, then renamed."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

NAME = re.compile(r"step-(\d{8})")


def write_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """`state` of a run after `step` steps into folder/step-NNNNNNNN; all but the newest `keep` are deleted then."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with (partial / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name)) if folder.is_dir() else []


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is damaged."""
    try:
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
