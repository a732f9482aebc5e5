"""Tables for people, JSON lines for everything else, and what they were measured with."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

RESULTS = Path(__file__).parents[1] / "results"
ENVIRONMENT = ("THP_MEM_ALLOC_ENABLE", "OMP_PROC_BIND", "OMP_NUM_THREADS", "NVLM_KERNELS")  # what moves a CPU's times


def commit() -> str:
    """The checkout's commit, with "-dirty" behind it when code differs; "unknown" outside a checkout."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True)

    try:
        name = git("describe", "--always", "--abbrev=12").stdout.strip()
        # results and the text made of them differ while a bench writes one after the other
        differs = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if differs.stdout.strip() else name


def cpu() -> str | None:
    """The processor's name, None where Linux does not tell it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else ()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), None)


def huge_pages() -> str | None:
    """The kernel's setting for transparent huge pages: always, madvise or never."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.read_text().split("[")[1].split("]")[0] if path.exists() else None


def setting() -> dict[str, Any]:
    """The machine and versions a row holds for."""
    found = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or torch.version.hip}
    else:
        found |= {"gpu": None, "cpu_threads": torch.get_num_threads()}
    found |= {"cpu": cpu(), "cpus": os.cpu_count(), "huge_pages": huge_pages()}
    found |= {"environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}}
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
