"""Microseconds of every op, forward and backward: ours, eager and compiled, as a share of the roofline.

bf16, the 72B model's shapes, by graph replay on data that is not in the L2 cache. The roofline takes the published
rates of the chip; bytes and flops are the least that the case needs, whatever an implementation moves.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.step import Part, Row, Visit
from bench.gpu.timing import ROUNDS, Timing, backward_call, num_copies, time_calls
from bench.ops import ROOFS
from bench.proofs.cases import CASES, Call, Case

QUICK = ("rms_norm-micro", "swiglu-micro")


def parts(visit: Visit) -> Iterator[Part]:
    """Ours and eager of every case first, then what torch.compile makes of the references, which takes long."""
    cases = [case for case in CASES if not visit.quick or case.id in QUICK]
    for case in cases:
        yield case.id, partial(_measured, visit, case, ("ours", "eager"))
    for case in cases[: 0 if visit.quick else None]:
        yield f"{case.id} compiled", partial(_measured, visit, case, ("compiled",))


def roofline_us(num_bytes: int, flops: int) -> float | None:
    """The least time on this GPU in microseconds; None where its rates are not known."""
    if not torch.cuda.is_available() or (rates := ROOFS.get(torch.cuda.get_device_name())) is None:
        return None
    return 1e6 * max(num_bytes / rates[0], flops / rates[1])


def _measured(visit: Visit, case: Case, columns: tuple[str, ...]) -> Iterator[Row]:
    dims = case.small if visit.quick else case.full

    def build() -> Call:
        return case.build(torch.bfloat16, visit.device, **dims)

    first = build()
    work = {
        "forward": (first.forward_bytes, first.forward_flops),
        "backward": (first.backward_bytes, first.backward_flops),
    }
    copies = 1 if visit.device == "cpu" else num_copies(first.forward_bytes)
    calls = [first, *(build() for _ in range(copies - 1))]
    for column in columns:
        fn: Callable[..., Any] = first.op if column == "ours" else first.ref
        if column == "compiled":
            fn = torch.compile(fn, dynamic=False)
        for name, timing in _passes(fn, calls, 3 if visit.quick else ROUNDS):
            num_bytes, flops = work[name]
            assert num_bytes is not None
            least = roofline_us(num_bytes, flops)
            yield {
                "case": case.id,
                "pass": name,
                "column": column,
                "us": timing,
                "bytes": num_bytes,
                "flops": flops,
                "roofline_us": least,
                "share_of_roofline": least and least / timing["p50"],
                "copies": copies,
            }


def _passes(fn: Callable[..., Any], calls: list[Call], rounds: int) -> Iterator[tuple[str, Timing]]:
    with torch.no_grad():
        yield "forward", time_calls([partial(fn, *call.inputs) for call in calls], rounds)
    if calls[0].backward_bytes is None:
        return
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None
    with torch.cuda.stream(stream):  # where a forward ran, its backward runs too
        backwards = [backward_call(fn(*call.inputs), call.inputs) for call in calls[:8]]
    yield "backward", time_calls(backwards, rounds, stream)
