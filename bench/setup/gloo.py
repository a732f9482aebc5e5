"""Runs a function on several gloo processes of this machine, each given its group; brings back what each returns."""

import io
import queue
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nvlm_runtime.parallel.group import Group


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    threads: int = 1,
    timeout: float = 300,
    backend: str = "gloo",
) -> list[Any]:
    """What `function(group, *args)` returns on each rank. AssertionError with the ranks' tracebacks if one fails, and
    with its exit code as soon as one is gone.

    function: of a module, so that a new process can import it. threads: torch's, of each. timeout: seconds for all.
    backend: of torch.distributed.
    """
    # held here on a port that the system gives it: one chosen for the ranks could be taken before they have it
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(
            target=_work, args=(rank, size, store.port, backend, results, threads, function, args), daemon=True
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = _results(processes, results, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    failed = [words for _, words, _ in found if words]
    assert not failed, "\n".join(failed)
    packed = [value for _, _, value in sorted(found, key=lambda item: item[0])]
    return [torch.load(io.BytesIO(value), weights_only=False) for value in packed]


def _results(processes: Sequence[Any], results: Any, deadline: float) -> list[tuple[int, str, bytes | None]]:
    """What every process put, (rank, traceback, value); AssertionError where one ended without, or time is up."""
    found = []
    while len(found) < len(processes):
        lost = [
            rank for rank, process in enumerate(processes) if process.exitcode is not None
        ]  # seen before the queue is read
        try:
            found.append(results.get(timeout=1))
        except queue.Empty:
            silent = sorted({*range(len(processes))} - {rank for rank, _, _ in found})
            ends = {rank: processes[rank].exitcode for rank in lost if rank in silent}
            assert not ends, f"ranks {silent} brought nothing back; exit codes {ends}"
            assert time.monotonic() < deadline, f"ranks {silent} brought nothing back in time"
    return found


def _work(
    rank: int,
    size: int,
    port: int,
    backend: str,
    results: Any,
    threads: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    try:
        limit = timedelta(seconds=60)
        store = dist.TCPStore("localhost", port, is_master=False, timeout=limit)
        dist.init_process_group(backend, store=store, world_size=size, rank=rank, timeout=limit)
        value = function(Group(rank, size, dist.group.WORLD), *args)
        dist.barrier()
        packed = io.BytesIO()
        torch.save(value, packed)  # by value: a tensor's memory ends with its process
        results.put((rank, "", packed.getvalue()))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
