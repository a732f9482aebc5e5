"""`pytest bench --benchmark-only`: each op and its reference at small shapes, on this machine's CPU or GPU.

On a CPU an op is its reference, so the two columns there show the cost of the public function's checks.
"""

import pytest
import torch

from bench.proofs.cases import CASES
from bench.proofs.cases.case import backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("which", ["eager", "op"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_op(benchmark, case, which):
    torch.manual_seed(0)
    call = case.build(torch.bfloat16 if DEVICE == "cuda" else torch.float32, DEVICE, **case.small)
    fn = call.op if which == "op" else call.ref

    def run() -> None:
        output = fn(*call.inputs)
        if call.backward_bytes is not None:
            backward(output, call.inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.id
    benchmark.extra_info["bytes"] = call.forward_bytes + (call.backward_bytes or 0)
    benchmark(run)
