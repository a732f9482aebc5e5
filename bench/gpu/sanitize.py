"""compute-sanitizer over one case per op: memory that no tensor holds, and races in shared memory."""

from collections.abc import Iterator
from functools import partial

from bench.gpu.step import Part, Row, Visit
from bench.gpu.tool import run_tool


def parts(visit: Visit) -> Iterator[Part]:
    """One part per tool of compute-sanitizer."""
    for tool in ("memcheck", "racecheck"):
        yield tool, partial(_checked, visit, tool)


def _checked(visit: Visit, tool: str) -> Iterator[Row]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    row = run_tool(visit, command, "bench.gpu.correctness", "sanitize.txt")
    yield row | {"tool": tool, "right": row["exit_status"] == 0}
