"""Processes of a tensor-parallel group: starting them, joining it, and ending all when one is gone.

torchrun's agent starts the ranks, kills them all when one ends badly, and joins nodes; torch.distributed carries the
tensors, by NCCL between GPUs and gloo between CPUs. A rank that waits for another one gives up after `TIMEOUT`.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nvlm_runtime.parallel.group import SOLO, Group, Mesh

TIMEOUT = 20.0  # seconds; starting and loading have LOADING
LOADING = 3600.0
RUN = "nvlm-"  # begins the names of the runs that `launch` starts
NO_READER = 128 + signal.SIGPIPE  # exit code of a rank whose output nobody reads any more


def in_group() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str, size: int | None, timeout: float = TIMEOUT, option: str = "--tp") -> tuple[Group, str]:
    """Joins the group that torchrun started this process in.

    Args:
        device: "cpu", or "cuda" for the GPU of this rank's number on its machine.
        size: the expected number of ranks; None takes any.
        timeout: seconds a rank waits for another rank's part of a collective.
        option: the command-line option that gave the size, for messages.

    Returns:
        The group, SOLO outside of torchrun; and this rank's own device.

    Raises:
        ValueError: the size is below 1 or not the group's, or the timeout is not positive.
    """
    if size is not None and size < 1:
        raise ValueError(f"{option} must be at least 1, got {size}")
    if not timeout > 0:
        raise ValueError(f"--tp-timeout must be above 0 seconds, got {timeout}")
    if not in_group():
        return SOLO, device
    world = int(os.environ["WORLD_SIZE"])
    if size not in (None, world):
        raise ValueError(
            f"{option} {size} in a group of {world} processes: torchrun's --nproc-per-node is the group's size"
        )
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)  # what is wrong is in its errors
    if not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=LOADING))
        dist.barrier()  # processes start and load at their own pace, but answer at one
    handle = dist.new_group(timeout=timedelta(seconds=timeout))
    dist.barrier()  # a rank that ends now would cut off one that still connects
    return Group(dist.get_rank(), world, handle), device


def join_mesh(device: str, tensor: int | None, data: int | None, timeout: float = TIMEOUT) -> tuple[Mesh, str]:
    """Joins the ranks of a training run: `data` groups of `tensor` ranks that hold one model together.

    The ranks of such a group have consecutive numbers, so that a group stays on one node.

    Args:
        device: as in `join`.
        tensor: ranks that hold one model together (--tp). None: all processes divided by `data`.
        data: groups that share out the rows of the weights (--fsdp). None: 1.
        timeout: as in `join`.

    Returns:
        The mesh, and this rank's own device.

    Raises:
        ValueError: as `join`, or the processes do not divide into such groups.
    """
    if data is not None and data < 1:
        raise ValueError(f"--fsdp must be at least 1, got {data}")
    if data in (None, 1):
        group, device = join(device, tensor, timeout)
        return Mesh(tensor=group, world=group), device
    world, device = join(device, None if tensor is None else tensor * data, timeout, "--tp x --fsdp of")
    if world.size % data or world.size == 1:
        raise ValueError(f"--fsdp {data} in a group of {world.size} processes, which {data} must divide")
    return mesh_of(world, data, timeout), device


def mesh_of(world: Group, data: int, timeout: float = TIMEOUT) -> Mesh:
    """Cuts a group into tensor groups of consecutive ranks. Every rank has to call this.

    Args:
        world: all ranks.
        data: number of tensor groups. It must divide `world.size`.
        timeout: seconds that a collective waits for the other ranks.

    Returns:
        The mesh as this rank sees it.
    """
    size, patience = world.size // data, timedelta(seconds=timeout)
    rows = [list(range(first, first + size)) for first in range(0, world.size, size)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    mine, across = (
        next(
            Group(ranks.index(world.rank), len(ranks), handle)
            for ranks, handle in [(ranks, dist.new_group(ranks, timeout=patience)) for ranks in cut]
            if world.rank in ranks
        )
        for cut in (rows, columns)
    )
    dist.barrier()  # as in `join`
    return Mesh(mine, across, world)


def wait_for_loading(group: Group) -> None:
    """Returns when all ranks have called it. Waits up to `LOADING` seconds, for the slowest disk.

    Args:
        group: the ranks. A group of one returns at once.
    """
    if group.handle is not None:
        dist.barrier()


def leave() -> None:
    """Leaves the group at a rank's end, after the last collective of all ranks is over."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def abandon(code: int) -> None:
    """Ends a rank of a group at once; returns where there is no group yet.

    A thread may hang in a collective. An ordinary exit would then end in abort(), which hides the exit code.

    Args:
        code: the process's exit code.
    """
    if dist.is_available() and dist.is_initialized():
        sys.stderr.flush()
        os._exit(code)


def report(message: str, everyone: bool = False) -> None:
    """Reports why this rank ends.

    The launcher prints the message of one rank, because it may stop the others before they report.

    Args:
        message: one line.
        everyone: under torchrun, whether every rank prints its message; otherwise rank 0 alone does.
    """
    if os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN):
        path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
        partial.rename(path)  # the launcher may stop this rank at any moment
    elif everyone or os.environ["RANK"] == "0":
        print(f"nvlm: {message}", file=sys.stderr, flush=True)


def launch(argv: Sequence[str], size: int, module: str = "nvlm_runtime") -> int:
    """Runs `python -m module argv` as `size` ranks on this machine.

    The ranks share the CPU's threads, unless OMP_NUM_THREADS is set.

    Args:
        argv: the arguments of every rank.
        size: number of ranks.
        module: what to run.

    Returns:
        The exit code: 0, 2 for bad input, 1 where a rank was lost, 130 for Ctrl-C, or 128 plus the signal that ended
        the launcher.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it prints pages about a lost rank
    with tempfile.TemporaryDirectory(prefix="nvlm-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            run_id=RUN + uuid.uuid4().hex,
            nproc_per_node=size,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *argv)
        except ChildFailedError as error:
            lost, failure = min(error.failures.items(), key=lambda item: _is_effect(item[1].exitcode))
            if failure.exitcode in (130, NO_READER):
                return 130 if failure.exitcode == 130 else 0
            if failure.exitcode == 2:
                print(f"nvlm: {failure.message}", file=sys.stderr)
                return 2
            reported = Path(failure.error_file).exists()
            message = failure.message if reported else f"rank {lost} of {size} ended with {_ending(failure.exitcode)}"
            print(f"nvlm: {message}; all ranks are stopped", file=sys.stderr)
            return 1
        except SignalException as error:
            return 128 + error.sigval.value
    return 0


def _is_effect(code: int) -> int:
    """Orders exit codes: from the likeliest cause of the other ranks' end to what the agent caused itself."""
    if code < 0 and code != -signal.SIGTERM:
        return 0
    return 1 if code in (2, 130, NO_READER) else 3 if code < 0 else 2


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
