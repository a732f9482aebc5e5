"""A tile's attention to itself, and the precision a CPU computes it in.

N tiles, P tokens a tile, H heads, D head_dim.

On a CUDA device, in fp32, under autograd and for short tiles: torch's attention in the inputs' dtype. For bf16 tiles
of 256 tokens or more on a CPU without AMX: torch's attention in fp32, rounded once at the end. torch's bf16 attention
there makes P * P probabilities in bf16 and multiplies with `vdpbf16ps`; of that instruction such a core issues one
every other cycle, a quarter of the rate of fp32's multiply-add (104 against 214 GFLOP/s a core). Measured with
2 threads on AVX512 (best of 9, ms, casts and copies included):

    N, H, P, D          bf16    fp32
    1, 16, 1025, 64     26.7    18.3
    1, 25, 1025, 128     161     112
    1, 16, 577, 64      19.4    14.8
    1, 16, 257, 64      1.87    1.52
    1, 5, 65, 32        0.05    0.06

Routes that lost to it there: bmm, softmax, bmm in bf16 (30, four times the error) or fp32 (21), whole, a head or 32
to 257 rows at a time. A core with AMX multiplies bf16 eight times as fast and keeps bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_TOKENS = 256  # below it the casts cost what fp32 wins


def computes_in_fp32(q: Tensor) -> bool:
    """Whether `attend` computes q's attention in fp32. q: [N, H, P, D]."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.shape[2] >= MIN_TOKENS
        and not (torch.is_grad_enabled() and q.requires_grad)
        and not torch.cpu._is_amx_tile_supported()
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v. q, k, v: [N, H, P, D] of any strides. Returns [N, P, H * D] in their dtype."""
    if not computes_in_fp32(q):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    # torch's kernel walks a head's rows: packing them is one pass with the cast
    q, k, v = (t.to(torch.float32, memory_format=torch.contiguous_format) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [N, P, H, D]
    return out.to(torch.bfloat16, memory_format=torch.contiguous_format).flatten(2)
