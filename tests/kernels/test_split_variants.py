"""Decoding compiles nothing as its context grows: every length runs what the warm-up at the capacity has compiled."""

import pytest
import torch

from nvlm_kernels._backend import INTERPRET
from nvlm_kernels.ops.attention import split

CAPACITY = 4096


def _kind(value):
    """What Triton compiles an argument for: an integer that is 1, a multiple of 16, another."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return "one" if value == 1 else "sixteenth" if value % 16 == 0 else "any"


@pytest.fixture
def launched(monkeypatch):
    """The variants of the kernels that were launched."""
    variants = set()

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **constants):
                names = [param for param in self.kernel.params if not param.is_constexpr]
                kinds = tuple(
                    "any" if param.do_not_specialize else _kind(value) for param, value in zip(names, args, strict=True)
                )
                variants.add((self.kernel.fn.__name__, kinds, tuple(sorted(constants.items()))))

            return launch

    monkeypatch.setattr(split, "wrap_triton", Kernel)
    op = split._split
    monkeypatch.setattr(split, "_split", op._function if hasattr(op, "_function") else op._init_fn)
    return variants


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, kv_heads, size", [(64, 8, 128), (4, 2, 16), (9, 3, 64)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_growing_context_compiles_nothing(rows, heads, kv_heads, size, dtype, launched):
    q = torch.empty(rows, 1, heads, size, dtype=dtype, device="meta")
    k = torch.empty(rows, CAPACITY, kv_heads, size, dtype=dtype, device="meta")
    lengths = torch.empty(rows, dtype=torch.int64, device="meta")
    split.split_attention(q, k, k, lengths)
    warm = set(launched)
    for context in (*range(1, 1100), *range(1100, CAPACITY + 1, 61)):
        visible = k[:, :context]
        split.split_attention(q, visible, visible, lengths)
    assert len(warm) == 2 and launched == warm
