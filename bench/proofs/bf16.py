"""bfloat16 in Triton's interpreter, as a GPU computes it.

    with exact_bf16():
        op(x.bfloat16())

The interpreter keeps a bfloat16 value as the 16 bits of its pattern. It truncates where a GPU rounds to nearest even,
and it multiplies and adds the patterns as if they were integers. Inside `exact_bf16` a cast rounds to nearest even, a
product widens its operands to fp32 first, and arithmetic on bfloat16 values is done in fp32 and rounded once.
Triton's maintainers decline the repair (triton#11585, #10945), so it stands here. Works on triton 3.6 to 3.9.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle, _get_np_dtype

CASTS = (
    "create_si_to_fp",
    "create_ui_to_fp",
    "create_fp_to_si",
    "create_fp_to_ui",
    "create_fp_ext",
    "create_fp_trunc",
    "create_int_cast",
)


def widen(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bfloat16 patterns.

    Args:
        bits: uint16, any shape.

    Returns:
        fp32 of the same shape, exact.
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bfloat16 patterns nearest to fp32 values; ties go to the even one, and NaN stays NaN.

    Args:
        values: any shape and numeric dtype; fp64 is rounded to fp32 first, as Triton does.

    Returns:
        uint16 of the same shape.
    """
    with np.errstate(over="ignore"):
        values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: TensorHandle) -> np.ndarray:
    return widen(handle.data) if _is_bf16(handle) else handle.data


def _cast(builder: InterpreterBuilder, source: TensorHandle, target: Any, *_: Any) -> TensorHandle:
    if target.scalar == tl.bfloat16:
        return TensorHandle(source.data if _is_bf16(source) else narrow(source.data), target.scalar)
    return TensorHandle(_values(source).astype(_get_np_dtype(target)), target.scalar)


def _fp_to_fp(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def convert(builder: InterpreterBuilder, source: TensorHandle, target: Any, mode: Any) -> TensorHandle:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return _cast(builder, source, target)
        return original(builder, source, target, mode)

    return convert


def _dot(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def product(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        wide = (TensorHandle(_values(t), tl.float32) if _is_bf16(t) else t for t in (a, b))
        return original(builder, *wide, *rest)

    return product


def _arithmetic(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """A function of the interpreter that gives its handles' numpy arrays to `op`, its last argument."""

    def compute(builder: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        *handles, op = arguments
        if op is np.where or not any(map(_is_bf16, handles)):
            return original(builder, *arguments)
        made = op(*map(_values, handles))
        return TensorHandle(made if made.dtype == bool else narrow(made), tl.bfloat16)

    return compute


def _refused(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the interpreter that would compute with the patterns of bfloat16 values."""

    def refuse(owner: Any, *arguments: Any) -> Any:
        inputs = [value for given in arguments for value in (given if isinstance(given, tuple) else (given,))]
        if any(value.dtype.scalar == tl.bfloat16 for value in inputs):
            raise NotImplementedError("bfloat16 values must be widened to fp32 before a reduction, a scan or an fma")
        return original(owner, *arguments)

    return refuse


REPAIRS: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    *((InterpreterBuilder, name, lambda original: _cast) for name in CASTS),
    (InterpreterBuilder, "create_fp_to_fp", _fp_to_fp),
    (InterpreterBuilder, "create_dot", _dot),
    (InterpreterBuilder, "create_fma", _refused),
    *((InterpreterBuilder, name, _arithmetic) for name in ("unary_op", "binary_op", "ternary_op")),
    *((owner, "apply_impl", _refused) for owner in (ReduceOps, ScanOps)),
)


@contextmanager
def exact_bf16() -> Iterator[None]:
    """While it is open, interpreted kernels compute in bfloat16 as a GPU does.

    Raises:
        NotImplementedError: By a kernel that reduces or scans bfloat16 values without widening them.
    """
    saved = [(owner, name, owner.__dict__[name]) for owner, name, _ in REPAIRS]
    try:
        for owner, name, repair in REPAIRS:
            setattr(owner, name, repair(owner.__dict__[name]))
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)
