"""Every op against fp64: outputs, gradients and caches, in bf16, fp16 and fp32, small and at the 72B model's shapes.

The error may be at most twice eager's. A case that fails says so in its row, and the next one follows.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial

import torch

from bench.gpu.ceilings import DTYPES, name_of
from bench.gpu.step import Part, Row, Visit
from bench.proofs.cases import CASES, Case
from bench.proofs.errors import errors_of


def parts(visit: Visit) -> Iterator[Part]:
    """bf16 first, the main dtype; small shapes first."""
    for dtype in DTYPES[: 1 if visit.quick else None]:
        for size in ("small",) if visit.quick else ("small", "full"):
            for case in _quick() if visit.quick else CASES:
                yield f"{case.id} {size} {name_of(dtype)}", partial(_judged, visit, case, dtype, size)


def _judged(visit: Visit, case: Case, dtype: torch.dtype, size: str) -> Iterator[Row]:
    """One row per tensor that is compared."""
    given = {"case": case.id, "dtype": name_of(dtype), "size": size}
    with _interpreter(visit.device):
        found = errors_of(case.build(dtype, visit.device, **(case.small if size == "small" else case.full)))
    for each in found:
        yield given | asdict(each) | {"right": each.is_right}


def _interpreter(device: str) -> AbstractContextManager[None]:
    if device == "cuda":
        return nullcontext()
    from bench.proofs.bf16 import exact_bf16

    return exact_bf16()


def _quick() -> list[Case]:
    """One case per op, the cheapest."""
    cheapest: dict[str, tuple[int, Case]] = {}
    for case in CASES:
        call = case.build(torch.bfloat16, "meta", **case.small)
        cost = call.forward_bytes + (call.backward_bytes or 0)
        if case.op not in cheapest or cost < cheapest[case.op][0]:
            cheapest[case.op] = cost, case
    return [case for _, case in cheapest.values()]
