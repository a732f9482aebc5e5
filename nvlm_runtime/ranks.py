"""Processes of a tensor-parallel group: starting them, joining it, and ending all when one is gone.

torchrun's agent starts the ranks, kills them all when one ends badly, and joins nodes; torch.distributed carries the
tensors, by NCCL between GPUs and gloo between CPUs. Whoever waits for a rank that hangs gives up after `TIMEOUT`.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from nvlm_runtime.parallel import SOLO, Group

TIMEOUT = 20.0  # seconds; starting and loading have LOADING
LOADING = 3600.0


def in_group() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def join(device: str, size: int | None, timeout: float = TIMEOUT) -> tuple[Group, str]:
    """The group that torchrun started this process in, SOLO outside; and this rank's own device.

    timeout: seconds a rank waits for another's part of a collective. Raises ValueError where `size` is given and the
    group has another, and for a timeout that is not positive.
    """
    if not in_group():
        return SOLO, device
    if not timeout > 0:
        raise ValueError(f"--tp-timeout must be above 0 seconds, got {timeout}")
    world = int(os.environ["WORLD_SIZE"])
    if size not in (None, 1, world):
        raise ValueError(
            f"--tp {size} in a group of {world} processes: torchrun's --nproc-per-node is the group's size"
        )
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=LOADING))
        dist.barrier()  # processes start and load at their own pace, but answer at one
    return Group(dist.get_rank(), world, dist.new_group(timeout=timedelta(seconds=timeout))), device


def wait_for_loading(group: Group) -> None:
    """Returns when all ranks are here, however long the slowest disk takes, up to an hour."""
    if group.handle is not None:
        dist.barrier()


def leave() -> None:
    """At a rank's end: waits for the others, who may still be in the last collective with it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def launch(argv: Sequence[str], size: int) -> int:
    """Runs `nvlm argv` as `size` ranks on this machine and returns rank 0's exit code, or 1 where a rank was lost.

    CPU threads are shared out unless OMP_NUM_THREADS says otherwise.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it has pages to say of a lost rank
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        run_id=uuid.uuid4().hex,
        nproc_per_node=size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "nvlm_runtime", *argv)
    except ChildFailedError as error:
        lost, failure = min(error.failures.items(), key=lambda item: _is_effect(item[1].exitcode))
        if failure.exitcode in (2, 130):
            return failure.exitcode  # bad input, which rank 0 has told of, or Ctrl-C
        print(
            f"nvlm: rank {lost} of {size} ended with {_words(failure.exitcode)}; all ranks are stopped", file=sys.stderr
        )
        return 1
    except SignalException as error:
        return 128 + error.sigval.value
    return 0


def _is_effect(code: int) -> int:
    """What ended a rank, from the likeliest cause of the others' end to what the agent did itself."""
    if code < 0 and code != -signal.SIGTERM:
        return 0
    return 1 if code in (2, 130) else 3 if code < 0 else 2


def _words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
