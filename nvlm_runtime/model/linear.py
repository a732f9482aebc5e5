"""Products of bf16 activations with many rows on a CPU whose fp32 multiply-add is faster than its bf16 one.

M rows, K in features, L out features. Some AVX512 cores issue `vdpbf16ps` at a quarter of the rate of fp32's
multiply-add: there a bf16 GEMM is slower than casting both sides, multiplying in fp32 and rounding once, which is also
more exact. Others, and cores with AMX, are two to three times faster in bf16. Nothing a program can ask the processor
tells them apart, so `fp32_is_faster` measures it, once a process.

GFLOP/s on a core of the first kind, 2 threads, medians of 5, casts included, out features a block:

    M, K, L             bf16    512    1024    2048    4096
    1025, 1024, 4096     172    233     306     308     242
    1025, 4096, 1024     157    229     338     332     331
    512, 896, 9728       154    257     229     261     267
    128, 896, 9728       188    206     244     251     242
    64, 896, 9728        152    165     164     158     144
    33, 896, 9728        127     98     104     105     102
"""

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_runtime.model.view import Model, view_of

MIN_ROWS = 128
BLOCK_FEATURES = 2048  # made fp32 at a time: they stay in a core's cache
MARGIN = 1.2  # a core of one kind or the other is never this near to the boundary


@cache
def fp32_is_faster() -> bool:
    """Whether this machine multiplies fp32 matrices faster than bf16 ones: the best of five of each, in turn."""
    seconds: dict[torch.dtype, float] = {}
    with torch.no_grad():
        sides = {dtype: torch.ones(2, 512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
        for _ in range(5):
            for dtype, (x, w) in sides.items():
                began = time.perf_counter()
                F.linear(x, w)
                spent = time.perf_counter() - began
                seconds[dtype] = min(spent, seconds.get(dtype, spent))
    return seconds[torch.bfloat16] > MARGIN * seconds[torch.float32]


def computes_in_fp32(x: Tensor) -> bool:
    """Whether a product with x [*, M, K] is made in fp32 and rounded. M alone counts: how many tiles or requests there
    are changes no bit.
    """
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.shape[-2] >= MIN_ROWS
        and not torch.is_grad_enabled()
        and fp32_is_faster()
    )


def linear_in_fp32(x: Tensor, rows: Callable[[int, int], Tensor], num_features: int, bias: Tensor | None) -> Tensor:
    """x [*, K] times a weight whose rows [first, end) are `rows(first, end)`, fp32. Returns [*, L] in x's dtype."""
    y = x.new_empty(*x.shape[:-1], num_features)
    # a tile at a time: its bits are the same in any batch, and what exists in fp32 stays small
    for wide, out in zip(x.flatten(0, -3), y.flatten(0, -3), strict=True) if x.dim() > 2 else ((x, y),):
        wide = wide.float()
        for first in range(0, num_features, BLOCK_FEATURES):
            end = min(first + BLOCK_FEATURES, num_features)
            part = None if bias is None else bias[first:end].float()
            out[..., first:end] = F.linear(wide, rows(first, end), part)
    return y


class InferenceLinear(nn.Linear):
    """An nn.Linear that computes long bf16 inputs in fp32 where that is faster. Trains as nn.Linear does."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, K]. Returns [*, L] in x's dtype."""
        if not computes_in_fp32(x):
            return super().forward(x)
        return linear_in_fp32(x, lambda first, end: self.weight[first:end].float(), self.out_features, self.bias)


def with_inference_linears(model: Model) -> Model:
    """A view of a model (`view_of`) in which every nn.Linear is an `InferenceLinear` of the same weights."""
    return view_of(model, {nn.Linear: InferenceLinear})


def with_plain_linears(model: Model) -> Model:
    """A view of a model (`view_of`) in which every `InferenceLinear` is an nn.Linear of the same weights."""
    return view_of(model, {InferenceLinear: nn.Linear})
