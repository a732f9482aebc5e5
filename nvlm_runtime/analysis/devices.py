"""Limits of known GPUs, and measurements of how fast any machine multiplies matrices and reads memory.

Source: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM.
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Device:
    """A device and its limits.

    Attributes:
        name: As torch.cuda returns it.
        memory: Bytes.
        bandwidth: Bytes per second, or None where unknown.
        flops: Dense bf16 flops per second, or None where unknown.
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
    """Finds the peak of matrix products.

    Args:
        device: Where to multiply.
        dtype: Of the matrices.

    Returns:
        Flops per second: the published value of a known GPU in bfloat16, else the best of five square products.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = {known.name: known.flops for known in DEVICES.values()}
        if (flops := known.get(torch.cuda.get_device_name(device))) is not None:
            return flops
    size = 8192 if device.type == "cuda" else 1024
    x = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):  # the first one is the warm-up and is never the best
        began = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def read_bandwidth(device: torch.device | str, num_bytes: int | None = None, rounds: int = 5) -> float:
    """Measures how fast memory is read, by summing an fp32 tensor; on a CPU with torch's threads.

    Args:
        device: Whose memory to read.
        num_bytes: Of the tensor; None is 2**30 on a GPU, 2**28 elsewhere.
        rounds: Sums to time, after a warm-up.

    Returns:
        Bytes per second of the median sum.
    """
    num_bytes = num_bytes or (2**30 if torch.device(device).type == "cuda" else 2**28)
    # numpy's memory, because numpy asks for huge pages
    x = torch.from_numpy(np.ones(num_bytes // 4, np.float32)).to(device)
    times = []
    for _ in range(rounds + 1):  # the first one is the warm-up
        began = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - began)
    return x.nbytes / statistics.median(times[1:])
