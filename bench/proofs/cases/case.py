"""One op at one shape, and the least it must cost."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """An op and its reference on inputs; floating inputs that require a gradient get one.

    forward_bytes, backward_bytes: each array a pass must read once and each it must write once; backward is None where
    nothing is trained through. weight_bytes: what of forward_bytes is weights; the rest is activations. flops:
    multiply-adds counted twice, of the same passes. repeated_flops: what the op's backward makes again beside them.
    """

    op: Callable[..., Any]
    ref: Callable[..., Any]
    inputs: tuple[Any, ...]
    forward_bytes: int
    backward_bytes: int | None = None
    weight_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    repeated_flops: int = 0


@dataclass(frozen=True)
class Case:
    """build(dtype, device, **dims) makes the Call. full: dims of the 72B model; small: for the interpreter and for
    codegen, with the dims that reach the code (head_dim, widths that pick a strategy) kept where they can be; traced:
    for counting bytes, large enough for partial sums to be small beside them, `small` where None.

    kind: what the case is bound by, and so what its machine code must have: "stream" 16-byte loads, "matmul" tensor
    cores.
    """

    op: str
    name: str
    kind: Literal["stream", "matmul"]
    build: Callable[..., Call]
    full: dict[str, int]
    small: dict[str, int]
    traced: dict[str, int] | None = None

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The tensors of an op's output: one, or a tuple."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple(t for t in value if isinstance(t, Tensor))


def backward(output: Any, inputs: Iterable[Any], grads: Iterable[Tensor] | None = None) -> tuple[Tensor, ...]:
    """Gradients of all inputs that require one, for gradients of the outputs, ones where None."""
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    return torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs] if grads is None else grads)
