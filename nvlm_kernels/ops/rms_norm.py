"""Root-mean-square norm over the last axis.

    y = weight * round(x / sqrt(mean(x^2) + eps))            x, y: [*, C]    weight: [C]

The statistic and the division are fp32; the quotient is rounded to x.dtype before the weight
multiplies it, as the published Qwen2 and InternViT code does (both normalise, cast, then scale).
Bound: memory, 2 * numel * itemsize bytes.
"""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    stat = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (stat * torch.rsqrt(stat.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm. x: [*, C]; weight: [C]; returns [*, C] in x's dtype."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must have shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    return rms_norm_ref(x, weight, eps)
