"""Versions, the device, and its ceilings: how fast it copies, and how fast the vendor's library multiplies."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.step import Part, Row, Visit
from bench.gpu.timing import time_calls
from bench.reports.report import setting

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" and so on."""
    return str(dtype).removeprefix("torch.")


def parts(visit: Visit) -> Iterator[Part]:
    """Versions, copies, products."""
    yield "setting", lambda: [{**setting(), **(_device() if visit.device == "cuda" else {})}]
    for megabytes in (16,) if visit.quick else (64, 1024, 4096):
        yield f"copy of {megabytes} MiB", partial(_copy, visit, megabytes * 2**20)
    for dtype in DTYPES:
        size = 256 if visit.quick else 8192
        yield f"product of {size} in {name_of(dtype)}", partial(_product, visit, size, dtype)


def _copy(visit: Visit, num_bytes: int) -> Iterator[Row]:
    source = torch.empty(num_bytes, dtype=torch.uint8, device=visit.device)
    target = torch.empty_like(source)
    timing = time_calls([lambda: target.copy_(source)], 5 if visit.quick else 15)
    yield {"us": timing, "bytes_per_s": 2 * num_bytes / timing["p50"] * 1e6}


def _product(visit: Visit, size: int, dtype: torch.dtype) -> Iterator[Row]:
    a, b = (torch.randn(size, size, device=visit.device).to(dtype) for _ in range(2))
    timing = time_calls([lambda: a @ b], 3 if visit.quick else 10)
    yield {"us": timing, "flops": 2 * size**3 / timing["p50"] * 1e6}


def _device() -> Row:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    return {
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": total,
        "free_bytes": free,
        "capability": list(torch.cuda.get_device_capability()),
    }
