"""Tables for people, JSON lines for everything else, and what they were measured with."""

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

RESULTS = Path(__file__).with_name("results")


def commit() -> str:
    """The checkout's commit, with "-dirty" behind it when files differ; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def setting() -> dict[str, Any]:
    """The machine and versions a row holds for."""
    found = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or torch.version.hip}
    else:
        found |= {"gpu": None, "cpu_threads": torch.get_num_threads()}
    return found | {"commit": commit()}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as their cells; numbers to the right."""
    cells = [[str(cell) for cell in head], *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(path: Path | None, kind: str, rows: list[dict[str, Any]], some: bool) -> None:
    """The setting and the rows as JSON. path None: results/KIND.json, which a run of `some` cases leaves alone."""
    if path is None:
        if some:
            return
        path = RESULTS / f"{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bench": kind, "setting": setting(), "rows": rows}, indent=1) + "\n")
    print(f"\n{len(rows)} rows in {path}")
