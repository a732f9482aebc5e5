"""GPUs this runtime knows the limits of, and what any machine multiplies and reads in a second.

Sources: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM.
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Device:
    """name: as torch.cuda gives it. memory: bytes. bandwidth: bytes a second. flops: of dense bf16 a second. The last
    two are None where they are not known.
    """

    name: str
    memory: int
    bandwidth: float | None = None
    flops: float | None = None


DEVICES = {
    "a100": Device("NVIDIA A100-SXM4-80GB", 80 * 10**9, 2.039e12, 312e12),
    "h100": Device("NVIDIA H100 80GB HBM3", 80 * 10**9, 3.35e12, 989e12),
    "h200": Device("NVIDIA H200", 141 * 10**9, 4.8e12, 989e12),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second: a known GPU's published ones in bfloat16; else those of the best of five square products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = {known.name: known.flops for known in DEVICES.values()}
        if (flops := known.get(torch.cuda.get_device_name(device))) is not None:
            return flops
    size = 8192 if device.type == "cuda" else 1024
    x = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):  # the first is a warm-up, and never the best
        began = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def read_bandwidth(device: torch.device | str, num_bytes: int | None = None, rounds: int = 5) -> float:
    """Bytes a second of a sum over `num_bytes`, the median of `rounds`: 2**30 on a GPU, 2**28 elsewhere unless given.
    On a CPU by torch's threads (numpy asks for huge pages).
    """
    num_bytes = num_bytes or (2**30 if torch.device(device).type == "cuda" else 2**28)
    x = torch.from_numpy(np.ones(num_bytes // 4, np.float32)).to(device)
    times = []
    for _ in range(rounds + 1):  # the first is a warm-up
        began = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - began)
    return x.nbytes / statistics.median(times[1:])
