"""Runs one of NVIDIA's command-line tools over a step, and keeps what it printed."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.processes import ROOT
from bench.gpu.step import Row, Visit

MOST = 4 * 2**20  # characters that are kept


def run_tool(visit: Visit, command: Sequence[str], module: str, report: str) -> Row:
    """Runs a step's module, quick, under a tool.

    Args:
        visit: of the step that asks for it.
        command: the tool and its options.
        module: the step whose parts run under it.
        report: file in the results that takes what was printed.

    Returns:
        Exit status and the last lines.

    Raises:
        FileNotFoundError: The tool is not installed.
    """
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        worker = [sys.executable, "-m", "bench.gpu.worker", module, "0/1", str(lines), visit.device, "quick", folder]
        run = subprocess.run([*command, *worker], cwd=ROOT, capture_output=True, text=True)
    printed = run.stdout + run.stderr
    (visit.out / report).write_text(printed[-MOST:])
    return {"file": report, "exit_status": run.returncode, "last": printed.strip().splitlines()[-3:]}
