"""What every bench and proof of the kernels runs: one list of cases, the 72B model's shapes and small ones.

A `Case` names an op at a shape; `build` makes its inputs and says what the shape must cost at least. Codegen compiles
it, traffic counts its bytes in the interpreter, ops times it on a GPU, predict says what the roof allows.
"""

from bench.proofs.cases.attention import CASES as ATTENTION
from bench.proofs.cases.case import Call, Case
from bench.proofs.cases.projection import CASES as PROJECTION
from bench.proofs.cases.streaming import CASES as STREAMING

CASES: tuple[Case, ...] = (*STREAMING, *PROJECTION, *ATTENTION)

__all__ = ["CASES", "Call", "Case"]
