"""The most memory a call keeps at once, above what was there before it: resident on a CPU (Linux only), or allocated on
a CUDA device.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def field_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def resident_bytes() -> int | None:
    """What is resident now, what was freed being given back first. None where the kernel does not tell."""
    if not STATUS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    return field_bytes("VmRSS")


def peak_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """None where the kernel does not tell. What earlier calls freed is given back first, so that it is not hidden."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before = resident_bytes()
    if before is None:
        return None
    try:
        CLEAR.write_text("5")  # the peak starts anew from here
    except OSError:
        return None
    run()
    return max(0, field_bytes("VmHWM") - before)
