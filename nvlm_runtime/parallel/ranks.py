"""Processes of a tensor-parallel group: starting them, joining it, and ending all when one is gone.

torchrun's agent starts the ranks, kills them all when one ends badly, and joins nodes; torch.distributed carries the
tensors, by NCCL between GPUs and gloo between CPUs. Whoever waits for a rank that hangs gives up after `TIMEOUT`.
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
NO_READER = 128 + signal.SIGPIPE  # exit code of a rank whose words nobody reads any more


def in_group() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str, size: int | None, timeout: float = TIMEOUT, option: str = "--tp") -> tuple[Group, str]:
    """The group that torchrun started this process in, SOLO outside; and this rank's own device.

    timeout: seconds a rank waits for another's part of a collective. option: what said the size. Raises ValueError for
    a size below 1 or another than the group's, and for a timeout that is not positive.
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
    """`join` for training: `data` groups of `tensor` ranks that hold one model together, which follow each other, so
    that such a group is of one node. One that is not given makes up the rest.

    Raises ValueError as `join` does, and where the processes cannot be shared out so.
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
    """The mesh of a group, in `data` groups of ranks that follow each other. Every rank calls this."""
    size, patience = world.size // data, timedelta(seconds=timeout)
    rows = [list(range(first, first + size)) for first in range(0, world.size, size)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    mine = [
        next(
            Group(ranks.index(world.rank), len(ranks), handle)
            for ranks, handle in [(ranks, dist.new_group(ranks, timeout=patience)) for ranks in cut]
            if world.rank in ranks
        )
        for cut in (rows, columns)
    ]
    dist.barrier()  # as in `join`
    return Mesh(*mine, world)


def wait_for_loading(group: Group) -> None:
    """Returns when all ranks are here, however long the slowest disk takes, up to an hour."""
    if group.handle is not None:
        dist.barrier()


def leave() -> None:
    """At a rank's end: waits for the others, who may still be in the last collective with it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def abandon(code: int) -> None:
    """Ends a rank of a group at once, before the others miss it. A collective may hold a thread, and an ordinary exit
    then ends in abort(), which would hide the code. Returns where there is no group yet.
    """
    if dist.is_available() and dist.is_initialized():
        sys.stderr.flush()
        os._exit(code)


def tell(words: str, everyone: bool = False) -> None:
    """Why this rank ends. The launcher prints one rank's words, as it may stop the others before they speak; under
    torchrun rank 0 prints its own, or every rank (`everyone`).
    """
    if os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN):
        path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"message": words, "timestamp": int(time.time())}))
        partial.rename(path)  # the launcher may stop this rank at any moment
    elif everyone or os.environ["RANK"] == "0":
        print(f"nvlm: {words}", file=sys.stderr, flush=True)


def launch(argv: Sequence[str], size: int, module: str = "nvlm_runtime") -> int:
    """Runs `python -m module argv` as `size` ranks on this machine. Returns 0, 2 for bad input, 1 where a rank was
    lost, 130 for Ctrl-C, or 128 + the signal that ended the launcher.

    CPU threads are shared out unless OMP_NUM_THREADS says otherwise.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it has pages to say of a lost rank
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
            told = Path(failure.error_file).exists()
            words = failure.message if told else f"rank {lost} of {size} ended with {_words(failure.exitcode)}"
            print(f"nvlm: {words}; all ranks are stopped", file=sys.stderr)
            return 1
        except SignalException as error:
            return 128 + error.sigval.value
    return 0


def _is_effect(code: int) -> int:
    """What ended a rank, from the likeliest cause of the others' end to what the agent did itself."""
    if code < 0 and code != -signal.SIGTERM:
        return 0
    return 1 if code in (2, 130, NO_READER) else 3 if code < 0 else 2


def _words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
