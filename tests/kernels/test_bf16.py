"""bfloat16 in the interpreter: its casts are torch's, its products are right, and every op passes in it."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from bench.proofs.bf16 import exact_bf16, narrow, widen
from bench.proofs.cases import CASES
from bench.proofs.errors import errors_of
from nvlm_kernels._backend import INTERPRET

interpreted = pytest.mark.skipif(not INTERPRET, reason="runs the kernels")


def as_torch(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def test_widening_is_torch_s_for_every_pattern():
    bits = np.arange(1 << 16, dtype=np.uint16)
    want = as_torch(bits).float().numpy()
    assert np.array_equal(widen(bits).view(np.uint32), want.view(np.uint32))


def test_narrowing_is_torch_s():
    """Every bfloat16 value, the ties and their neighbours between all of them, subnormals, infinities, NaN."""
    low = np.arange(1 << 16, dtype=np.uint32) << 16
    patterns = np.concatenate([low + tail for tail in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = patterns.astype(np.uint32).view(np.float32)
    got, want = as_torch(narrow(values)), torch.from_numpy(values).bfloat16()
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    numbers = ~want.isnan()
    assert torch.equal(got[numbers].view(torch.int16), want[numbers].view(torch.int16))


@triton.jit
def _casts(x_ptr, narrow_ptr, wide_ptr, sum_ptr, less_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    half = x.to(tl.bfloat16)
    tl.store(narrow_ptr + at, x, mask=at < n)
    tl.store(wide_ptr + at, half.to(tl.float32), mask=at < n)
    tl.store(sum_ptr + at, half + half * half, mask=at < n)
    tl.store(less_ptr + at, half < 0, mask=at < n)


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + rows * SIZE + columns), tl.load(b_ptr + rows * SIZE + columns)
    tl.store(out_ptr + rows * SIZE + columns, tl.dot(a, b))


@interpreted
def test_a_kernel_casts_and_computes_as_torch_does():
    x = torch.randn(1000)
    half, total = torch.empty(1000, dtype=torch.bfloat16), torch.empty(1000, dtype=torch.bfloat16)
    wide, less = torch.empty(1000), torch.empty(1000, dtype=torch.int8)
    with exact_bf16():
        _casts[(1,)](x, half, wide, total, less, 1000, BLOCK=1024)
    want = x.bfloat16()
    assert torch.equal(half, want) and torch.equal(wide, want.float())
    assert torch.equal(total, want + want * want) and torch.equal(less.bool(), want < 0)


@interpreted
def test_a_product_is_fp64_s():
    a, b, out = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16(), torch.empty(32, 32)
    with exact_bf16():
        _product[(1,)](a, b, out, SIZE=32)
    assert (out - a.double() @ b.double()).abs().max() < 1e-5


@interpreted
def test_nothing_of_the_repair_stays():
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps

    before = [dict(vars(owner)) for owner in (InterpreterBuilder, ReduceOps)]
    with pytest.raises(ZeroDivisionError), exact_bf16():
        assert dict(vars(InterpreterBuilder)) != before[0]
        1 / 0  # noqa: B018
    assert [dict(vars(owner)) for owner in (InterpreterBuilder, ReduceOps)] == before


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_op_and_gradient(case):
    """Against fp64, at most twice eager's error."""
    with exact_bf16():
        found = errors_of(case.build(torch.bfloat16, "cpu", **case.small))
    assert found and not [error for error in found if not error.is_right]
