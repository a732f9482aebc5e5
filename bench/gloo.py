"""Runs a function on several gloo processes of this machine, each given its group; brings back what each returns."""

import io
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nvlm_runtime.parallel import Group


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    threads: int = 1,
    timeout: float = 300,
    backend: str = "gloo",
) -> list[Any]:
    """What `function(group, *args)` returns on each rank. AssertionError with the first rank's traceback if one fails.

    function: of a module, so that a new process can import it. threads: torch's, of each. timeout: seconds for all.
    backend: of torch.distributed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_work, args=(rank, size, port, backend, queue, threads, function, args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = [queue.get(timeout=timeout) for _ in processes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    failed = [words for _, words, _ in found if words]
    assert not failed, "\n".join(failed)
    packed = [value for _, _, value in sorted(found, key=lambda item: item[0])]
    return [torch.load(io.BytesIO(value), weights_only=False) for value in packed]


def _work(
    rank: int,
    size: int,
    port: int,
    backend: str,
    queue: Any,
    threads: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    try:
        dist.init_process_group(
            backend, f"tcp://localhost:{port}", world_size=size, rank=rank, timeout=timedelta(seconds=60)
        )
        value = function(Group(rank, size, dist.group.WORLD), *args)
        dist.barrier()
        packed = io.BytesIO()
        torch.save(value, packed)  # by value: a tensor's memory ends with its process
        queue.put((rank, "", packed.getvalue()))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
