"""Runs steps one after the other, each in a process of its own that cannot take the others with it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu.step import Row, Step, Visit
from bench.gpu.worker import read_lines

ROOT = Path(__file__).parents[2]
LEAST = 5  # seconds; a step is not begun with fewer left
STATUSES = ("done", "no time left", "timed out", "failed")  # the worst is the last
TAIL = 2000  # characters of what a step that failed printed last


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        name: of the step.
        status: "done", "failed", "timed out" or "no time left".
        seconds: how long it ran.
        died: how many of its processes died and were followed by another.
        printed: the end of what they printed, where one failed.
        rows: what it found until then.
    """

    name: str
    status: str
    seconds: float
    died: int
    printed: str
    rows: list[Row]


def run_steps(
    steps: Sequence[Step], visit: Visit, budget: float, after: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Runs the steps in order; what happens to one does not stop the next.

    Args:
        steps: what to run.
        visit: what each is given.
        budget: seconds for all of them.
        after: is called with the outcomes so far after every step, to write them down.
    """
    ends = time.monotonic() + budget
    outcomes: list[Outcome] = []
    for step in steps:
        left = ends - time.monotonic()
        if left < LEAST:
            outcomes.append(Outcome(step.name, "no time left", 0.0, 0, "", []))
        else:
            outcomes.append(_run(step, visit, min(step.seconds, left)))
        after(outcomes)
    return outcomes


def _run(step: Step, visit: Visit, seconds: float) -> Outcome:
    """Runs a step, its parts shared out over as many processes as it may have."""
    began = time.monotonic()
    count = step.processes if visit.device == "cuda" else 1
    with ThreadPoolExecutor(count) as threads:
        shares = [threads.submit(_share, step, visit, seconds, f"{number}/{count}") for number in range(count)]
        found = [share.result() for share in shares]
    status = max((share.status for share in found), key=STATUSES.index)
    printed = "\n".join(share.printed for share in found if share.printed)[-TAIL:]
    rows = [row for share in found for row in share.rows]
    return Outcome(step.name, status, time.monotonic() - began, sum(share.died for share in found), printed, rows)


def _share(step: Step, visit: Visit, seconds: float, share: str) -> Outcome:
    """Runs every n-th part of a step. A process that dies in a part is followed by one for the parts after it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines, printed = Path(folder) / "lines", Path(folder) / "printed"
        status, tails, num_begun = "failed", [], -1
        while status == "failed":
            status = _process(step, visit, seconds - (time.monotonic() - began), share, lines, printed)
            found = read_lines(lines)
            if status != "done":
                tails.append(printed.read_text("utf-8", "replace")[-TAIL:])
            if num_begun == (num_begun := sum("begins" in row for row in found)):
                break  # it died before its next part began
        died = len(tails) - (status != "done")
        rows = [row for row in found if "begins" not in row]
        rows += [{"part": part, "failed": "the process died"} for part in _without_rows(found)]
    return Outcome(step.name, status, time.monotonic() - began, died, "\n".join(tails)[-TAIL:], rows)


def _without_rows(found: Sequence[Row]) -> list[str]:
    """Parts that began and left nothing: their process died in them, or was ended."""
    left = {row["part"] for row in found if "part" in row}
    return [row["begins"] for row in found if "begins" in row and row["begins"] not in left]


def _process(step: Step, visit: Visit, seconds: float, share: str, lines: Path, printed: Path) -> str:
    """Runs one process of a step. Returns what became of it."""
    interpreted = {"TRITON_INTERPRET": "1"} if step.interpreted and visit.device == "cpu" else {}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | interpreted
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    given = [share, str(lines), visit.device, "quick" if visit.quick else "full", str(visit.out)]
    with open(printed, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.worker", step.module, *given],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own processes end with it
        )
        try:
            return "done" if process.wait(max(seconds, 0)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The outcomes as JSON takes them."""
    return [asdict(outcome) for outcome in outcomes]
