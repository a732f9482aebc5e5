"""Ops bound by memory: norms, residuals, rotary, swiglu."""

import torch

from bench.cases.case import Call, Case, nbytes
from nvlm_kernels.ops.tanh_gated_add import tanh_gated_add, tanh_gated_add_ref


def _tanh_gated_add(dtype, device, rows, width) -> Call:
    x, branch = (torch.randn(rows, width, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    gate = torch.full((1,), 0.5, dtype=dtype, device=device, requires_grad=True)
    return Call(
        tanh_gated_add,
        tanh_gated_add_ref,
        (x, branch, gate),
        forward_bytes=3 * nbytes(x),
        backward_bytes=3 * nbytes(x),
    )


CASES = (
    Case("tanh_gated_add", "prefill", "stream", _tanh_gated_add, dict(rows=1024, width=8192), dict(rows=8, width=8192)),
)
