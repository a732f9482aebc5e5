"""Microseconds of a function on a GPU: from CUDA graphs that replay it on data that is not in the L2 cache.

Launches one by one measure Python. A graph of many calls in a row measures the device; each call takes other copies of
its inputs, four times the L2 cache in all, so that it finds nothing there. On a CPU the host's clock is all there is.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.proofs.cases.case import tensors_in

MOST_COPIES, LEAST_CALLS, ROUNDS = 128, 10, 15
Timing = dict[str, Any]  # method, p20, p50, p80: microseconds of a call


def summary(microseconds: Sequence[float], method: str) -> Timing:
    """20th, 50th and 80th percentile."""
    deciles = statistics.quantiles(microseconds, n=10, method="inclusive")
    return {"method": method, "p20": deciles[1], "p50": deciles[4], "p80": deciles[7]}


def num_copies(num_bytes: int) -> int:
    """How many copies of inputs of `num_bytes` are four times the L2 cache, at least 1 and at most 128."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(MOST_COPIES, -(-4 * l2 // max(num_bytes, 1))))


def time_calls(
    calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS, stream: "torch.cuda.Stream | None" = None
) -> Timing:
    """Times functions that do the same on different data, one after the other in one graph.

    Args:
        calls: at least one. They may not wait for the device.
        rounds: how often the graph is replayed.
        stream: where the graph is captured, if a backward has to run where its forward ran; None for a new one.

    Returns:
        Microseconds of a call. Where a graph could not be captured, of launches one by one, and why.
    """
    if not torch.cuda.is_available():
        return _by_clock(calls, rounds)
    repeated = list(calls) * max(1, -(-LEAST_CALLS // len(calls)))
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compiles
            call()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for call in repeated:
                    call()
        except RuntimeError as error:
            torch.cuda.synchronize()
            return _by_events(repeated, rounds) | {"not captured": str(error).splitlines()[0]}
        graph.replay()
        found = _timed(graph.replay, rounds, stream)
    torch.cuda.current_stream().wait_stream(stream)
    return summary([1e3 * t / len(repeated) for t in found], "graph")


def _timed(run: Callable[[], Any], rounds: int, stream: "torch.cuda.Stream") -> list[float]:
    """Milliseconds of each round."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for began, ended in pairs:
        began.record(stream)
        run()
        ended.record(stream)
    torch.cuda.synchronize()
    return [began.elapsed_time(ended) for began, ended in pairs]


def _by_events(calls: Sequence[Callable[[], Any]], rounds: int) -> Timing:
    def run() -> None:
        for call in calls:
            call()

    found = _timed(run, rounds, torch.cuda.current_stream())
    return summary([1e3 * t / len(calls) for t in found], "launches")


def _by_clock(calls: Sequence[Callable[[], Any]], rounds: int) -> Timing:
    times = []
    calls[0]()
    for number in range(max(2, rounds)):
        began = time.perf_counter()
        calls[number % len(calls)]()
        times.append(1e6 * (time.perf_counter() - began))
    return summary(times, "host clock")


def backward_call(output: Any, inputs: Sequence[Any]) -> Callable[[], Any]:
    """The backward of an output that was made once, as a function that can be called again and again."""
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    grads = [torch.ones_like(t) for t in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
