"""The steps of a visit, and what each is given."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Part = tuple[str, Callable[[], Iterable[Row]]]  # its name, and what yields its rows


@dataclass(frozen=True)
class Visit:
    """What every step is given.

    Attributes:
        device: "cuda", or "cpu", where kernels run in Triton's interpreter and times say nothing.
        quick: small shapes, few cases, few repetitions.
        out: the folder of the results.
    """

    device: str
    quick: bool
    out: Path


@dataclass(frozen=True)
class Step:
    """One step, which runs in a process of its own.

    Attributes:
        name: of the step, in the results too.
        module: has `parts(visit)`, the parts of the step in order. A part that fails does not stop the next.
        seconds: how long it may take.
        interpreted: whether a CPU runs its kernels in Triton's interpreter; else a CPU takes the references.
        processes: how many share its parts on a GPU: more than one where Triton's compiler takes longest.
        optional: whether it runs only where it is asked for by name.
    """

    name: str
    module: str
    seconds: float
    interpreted: bool = False
    processes: int = 1
    optional: bool = False


# in order of value: what the time does not reach is what can be missed most easily
STEPS = (
    Step("ceilings", "bench.gpu.ceilings", 60),
    Step("correctness", "bench.gpu.correctness", 180, interpreted=True, processes=6),
    Step("answers", "bench.gpu.answers", 120),
    Step("times", "bench.gpu.times", 150),
    Step("layers", "bench.gpu.layers", 120),
    Step("trace", "bench.gpu.trace", 60),
    Step("sanitize", "bench.gpu.sanitize", 240, optional=True),
    Step("ncu", "bench.gpu.ncu", 240, optional=True),
)
