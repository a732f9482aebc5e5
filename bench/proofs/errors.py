"""How wrong an op is: its error against fp64, which may be at most twice that of its reference.

Outputs, gradients, and inputs that the op writes to (caches) are held against the reference in fp64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.proofs.cases.case import Call, tensors_in

FACTOR = 2  # how much larger than the reference's an error may be


@dataclass(frozen=True)
class Error:
    """The largest error of one tensor.

    Attributes:
        what: "output 0", "gradient of input 1" or "input 3 afterwards".
        error: largest distance from fp64; infinite where fp64 is finite and the op is not.
        eager: the same of the reference in the op's dtype.
        allowed: twice `eager`, and the rounding of the largest value.
    """

    what: str
    error: float
    eager: float
    allowed: float

    @property
    def is_right(self) -> bool:
        """Whether the error is allowed."""
        return self.error <= self.allowed


def errors_of(call: Call) -> list[Error]:
    """As `errors`, of a case."""
    trained = [i for i, t in enumerate(call.inputs) if isinstance(t, Tensor) and t.requires_grad]
    return errors(call.op, call.ref, call.inputs, trained if call.backward_bytes is not None else ())


def errors(
    op: Callable[..., Any], ref: Callable[..., Any], inputs: Sequence[Any], trained: Sequence[int] = ()
) -> list[Error]:
    """Runs an op twice, its reference, and its reference in fp64, each on copies of the inputs.

    Args:
        op: what is judged.
        ref: what it should compute, in any dtype.
        inputs: of both, in order.
        trained: which of the inputs get a gradient, for random gradients of the outputs.

    Returns:
        One per output, per gradient, and per input that anybody wrote to.

    Raises:
        AssertionError: A result's dtype or shape is not the reference's, or the second run gave other bits.
    """
    with torch.no_grad():
        outputs = tensors_in(ref(*_copies(inputs, None, ())))
    douts = [torch.randn_like(y) if y.is_floating_point() else y for y in outputs]
    exact = _run(ref, _copies(inputs, torch.float64, trained), douts, trained)
    eager = _run(ref, _copies(inputs, None, trained), douts, trained)
    ours, again = (_run(op, _copies(inputs, None, trained), douts, trained) for _ in range(2))
    found = []
    for what, got in ours.items():
        want = eager[what]
        assert got.dtype == want.dtype and got.shape == want.shape, (
            f"{what}: {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}"
        )
        assert _same_bits(got, again[what]), f"{what}: other bits when run again"
        given = inputs[int(what.split()[1])] if what.endswith("afterwards") else None
        if given is None or not (torch.equal(given, got) and torch.equal(given, want)):
            terms = sum(d.numel() for d in douts) / max(got.numel(), 1) if what.startswith("gradient") else 1.0
            found.append(_error(what, got, want, exact[what], terms))
    return found


def _copies(inputs: Sequence[Any], dtype: torch.dtype | None, trained: Sequence[int]) -> list[Any]:
    """Floating tensors in `dtype` if there is one."""
    copies = list(inputs)
    for i, value in enumerate(inputs):
        if isinstance(value, Tensor):
            copy = value.detach().clone()
            copies[i] = copy.to(dtype) if dtype is not None and copy.is_floating_point() else copy
            copies[i].requires_grad_(i in trained)
    return copies


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _run(fn: Callable[..., Any], inputs: list[Any], douts: list[Tensor], trained: Sequence[int]) -> dict[str, Tensor]:
    with torch.set_grad_enabled(bool(trained)):
        outputs = tensors_in(fn(*inputs))
        found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        if trained:
            pairs = [(y, d.to(y.dtype)) for y, d in zip(outputs, douts, strict=True) if y.requires_grad]
            grads = torch.autograd.grad([y for y, _ in pairs], [inputs[i] for i in trained], [d for _, d in pairs])
            found |= {f"gradient of input {i}": grad for i, grad in zip(trained, grads, strict=True)}
    found |= {f"input {i} afterwards": t.detach() for i, t in enumerate(inputs) if isinstance(t, Tensor)}
    return found


def _error(what: str, got: Tensor, eager: Tensor, exact: Tensor, terms: float) -> Error:
    """terms: how many are summed into each element, in fp32 at least; rounding grows as the root of their number."""
    if got.numel() == 0:
        return Error(what, 0.0, 0.0, 0.0)
    if not got.is_floating_point():
        wrong = float((got != exact).any())
        return Error(what, wrong, 0.0, 0.0)
    of_sum = min(torch.finfo(torch.float32).eps, torch.finfo(got.dtype).eps) * terms**0.5
    noise = (torch.finfo(got.dtype).eps + of_sum) * exact.abs().max().item()
    error, of_eager = (_distance(tensor, exact) for tensor in (got, eager))
    return Error(what, error, of_eager, FACTOR * of_eager + noise if math.isfinite(of_eager) else math.inf)


def _distance(got: Tensor, exact: Tensor) -> float:
    if not bool(torch.isfinite(got[torch.isfinite(exact)]).all()):
        return math.inf
    return (got.double() - exact.double()).abs().nan_to_num(nan=0.0).max().item()
