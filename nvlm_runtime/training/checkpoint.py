"""Checkpoints of a run, whole or not there: a folder is filled under another name, flushed to disk, then renamed.

Every rank of a group writes a file of its own into the folder, which all must see; rank 0 makes and renames it.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from nvlm_runtime.parallel import SOLO, Group

NAME = re.compile(r"step-(\d{8})")


def write_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int, group: Group = SOLO) -> Path:
    """`state` of a run after `step` steps into folder/step-NNNNNNNN; all but the newest `keep` are deleted then."""
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    if group.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    group.wait()
    with (partial / _file(group)).open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    group.wait()
    if group.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def _file(group: Group) -> str:
    return "state.pt" if group.size == 1 else f"state-{group.rank}-of-{group.size}.pt"


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name)) if folder.is_dir() else []


def read_checkpoint(path: Path, group: Group = SOLO) -> dict[str, Any]:
    """Raises ValueError for a file that is damaged, and for a checkpoint of another number of ranks."""
    if not (path / _file(group)).is_file():
        files = sorted(file.name for file in path.glob("state*.pt"))
        raise ValueError(f"{path} is not of {group.size} rank{'s' * (group.size > 1)}: it holds {', '.join(files)}")
    try:
        return torch.load(path / _file(group), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
