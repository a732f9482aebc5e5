"""Nsight Compute over one case per op: throughput, occupancy and what stalls each kernel."""

from collections.abc import Iterator
from functools import partial

from bench.gpu.step import Part, Row, Visit
from bench.gpu.tool import run_tool


def parts(visit: Visit) -> Iterator[Part]:
    """One part."""
    yield "ncu", partial(_profiled, visit)


def _profiled(visit: Visit) -> Iterator[Row]:
    command = ["ncu", "--set", "basic", "--launch-count", "200", "--kernel-name", "regex:_kernel$"]
    yield run_tool(visit, command, "bench.gpu.correctness", "ncu.txt")
