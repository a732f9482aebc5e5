"""Checkpoints of a run, whole or not there: a folder is filled under another name, flushed to disk, then renamed.

One process writes a file. Ranks write into a folder that all must see, by torch.distributed.checkpoint: each its own
share of the rows, so that another number of data-parallel ranks can go on; a tensor-parallel rank's part is its own.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from nvlm_runtime.parallel.group import Mesh

NAME = re.compile(r"step-(\d{8})")
ALONE = "state.pt"
SHARED = "ranks.json"  # what ranks have in common, beside the files of torch.distributed.checkpoint


def write_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int, mesh: Mesh | None = None) -> Path:
    """Writes the state of a run into folder/step-NNNNNNNN; all but the newest checkpoints are deleted then.

    Args:
        folder: of the run's checkpoints; made where it does not exist.
        step: number of steps that the run has made.
        state: under "optimizer" what ranks share out, all else small, JSON or a tensor, and the same on every rank.
        keep: number of checkpoints that are kept.
        mesh: the ranks, all of which call this; None is one process.

    Returns:
        The checkpoint's folder.
    """
    world = (mesh or Mesh()).world
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    world.wait()
    if world.size == 1:
        with (partial / ALONE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    else:
        _write_shares(partial, state, mesh)
    world.wait()
    if world.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def _write_shares(folder: Path, state: dict[str, Any], mesh: Mesh) -> None:
    from torch.distributed import checkpoint

    if mesh.world.rank == 0:
        common = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor | dict)}
        (folder / SHARED).write_text(json.dumps({"tensor_parallel": mesh.tensor.size, **common}))
    try:
        checkpoint.save(_shared_out(state, mesh), checkpoint_id=folder, process_group=mesh.world.handle)
    except checkpoint.CheckpointException as error:
        raise OSError(f"{folder} was not written: {_first(error)}") from error


def _shared_out(state: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The tensors; a tensor-parallel rank's under its own name."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors | {f"part-{mesh.tensor.rank}": state["optimizer"]}


def _first(error: BaseException) -> str:
    """The first line of what the first rank that failed had to say."""
    return str(next(iter(error.failures.values()))[0]).splitlines()[0]


def checkpoints(folder: Path) -> list[Path]:
    """Lists the complete checkpoints of a run, the oldest first.

    Args:
        folder: of the run's checkpoints. It need not exist.

    Returns:
        Their folders.
    """
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name)) if folder.is_dir() else []


def read_checkpoint(path: Path, state: dict[str, Any], mesh: Mesh | None = None) -> dict[str, Any]:
    """Reads what `write_checkpoint` was given.

    Args:
        path: the checkpoint's folder.
        state: one of this run, whose tensors ranks read into.
        mesh: the ranks, all of which call this; None is one process.

    Returns:
        The state.

    Raises:
        ValueError: a damaged file, one process where ranks wrote it or the other way round, or another number of
            tensor-parallel ranks.
    """
    mesh = mesh or Mesh()
    alone, ranks = path / ALONE, path / SHARED
    if not (alone if mesh.world.size == 1 else ranks).is_file():
        writer = "one process" if alone.is_file() else "ranks" if ranks.is_file() else "nobody"
        raise ValueError(
            f"{path} was written by {writer}, and cannot be gone on with by {_words(mesh.world.size)}: "
            "a run goes on as it began, alone or over ranks"
        )
    try:
        if mesh.world.size == 1:
            return torch.load(alone, map_location="cpu", weights_only=True)
        common = json.loads(ranks.read_text())
        if common.pop("tensor_parallel") == mesh.tensor.size:
            return _read_shares(path, state, mesh) | common
    except Exception as error:  # pickle, zip and torch each have their own
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    raise ValueError(f"{path} is of another number of tensor-parallel ranks than {mesh.tensor.size}")


def _read_shares(folder: Path, state: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    from torch.distributed import checkpoint

    from nvlm_runtime.training.share_reader import ShareReader, TensorPlanner  # torch.distributed is slow to import

    tensors = _shared_out(state, mesh)
    try:
        checkpoint.load(
            tensors, storage_reader=ShareReader(folder), planner=TensorPlanner(), process_group=mesh.world.handle
        )
    except checkpoint.CheckpointException as error:
        raise ValueError(_first(error)) from error
    optimizer = tensors.pop(f"part-{mesh.tensor.rank}")
    return {**tensors, "optimizer": optimizer}


def _words(size: int) -> str:
    return "one process" if size == 1 else f"{size} ranks"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
