"""Planted faults are found, each in a kernel that the bare interpreter runs without a word."""

import pytest
import torch
import triton
import triton.language as tl

from bench.proofs.bf16 import exact_bf16
from bench.proofs.interpreter import MemoryTrace, OutOfBounds, Race
from nvlm_kernels._backend import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="runs the kernels")


@triton.jit
def _copy(x_ptr, y_ptr, n, SHIFT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + (at + SHIFT) * STEP, x, mask=at < n)


@triton.jit
def _sum(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + at, mask=at < n).to(tl.float32)))


@triton.jit
def _sum_into(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.load(y_ptr) + tl.sum(tl.load(x_ptr + at)))


def copy(n: int, size: int, shift: int = 0, step: int = 1, in_place: bool = False) -> None:
    x = torch.zeros(size)
    with MemoryTrace():
        _copy[(4,)](x, x if in_place else torch.zeros(size), n, SHIFT=shift, STEP=step, BLOCK=16)


def test_a_sound_kernel_passes():
    copy(60, 60)
    copy(60, 60, in_place=True)


def test_the_gap_of_a_stride():
    """Rows of 16 in a buffer of rows of 20: the next row begins 4 elements later."""
    x = torch.zeros(4, 20)[:, :16]
    with pytest.raises(OutOfBounds, match="4 lanes loaded outside every tensor"), MemoryTrace():
        _copy[(4,)](x, torch.zeros(64), 64, SHIFT=0, STEP=1, BLOCK=16)


@pytest.mark.parametrize("n, shift", [(61, 0), (60, 1)])
def test_an_address_outside_every_tensor(n, shift):
    with pytest.raises(OutOfBounds, match="outside every tensor"):
        copy(n, 60, shift)


def test_a_program_writes_what_another_reads():
    """Each program writes one element that the next one reads."""
    with pytest.raises(Race, match="is loaded by program 1 and written by another"):
        copy(60, 64, shift=1, in_place=True)


def test_a_program_writes_what_another_has_read():
    """Each program reads one element that the next one writes."""
    x = torch.zeros(64)
    with pytest.raises(Race, match="is stored by program 1 and read by another"), MemoryTrace():
        _copy[(3,)](x[1:], x, 48, SHIFT=0, STEP=1, BLOCK=16)


def test_two_programs_add_to_one_element():
    with pytest.raises(Race, match="written by another"), MemoryTrace():
        _sum_into[(2,)](torch.ones(32), torch.zeros(1), BLOCK=16)


def test_two_lanes_of_one_store_have_one_address():
    with pytest.raises(Race, match="lanes of one store"):
        copy(60, 60, step=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_lanes_without_other_are_not_a_number(dtype):
    x, y = torch.ones(8, dtype=dtype), torch.zeros(1)
    with MemoryTrace(), exact_bf16():
        _sum[(1,)](x, y, 5, BLOCK=8)
    assert y.isnan().all()
