"""A tile's attention to itself, and the precision a CPU computes it in.

N tiles, P tokens a tile, H heads, D head_dim.

A CPU that has it takes the native attention (`native_attention`). Without it, on a CUDA device, in fp32, under autograd
and for short tiles: torch's attention in the inputs' dtype. For bf16 tiles of 256 tokens or more on a CPU without AMX:
torch's attention in fp32, rounded once at the end. The bf16 product there is `vdpbf16ps`; the core measured issues a
quarter as many of it as of fp32's multiply-add (1.63 against 6.69 G a second: 104 against 214 GFLOP/s). With 2
threads of that AVX512 core, medians of 9, ms, casts and copies included:

    N, H, P, D          bf16    fp32
    1, 16, 1025, 64     33.9    25.0
    7, 16, 1025, 64      269     224
    1, 25, 1025, 128    94.6    69.0
    1, 16, 577, 64      15.3    10.5
    1, 16, 257, 64      2.31    2.23
    1, 5, 65, 32        0.07    0.09

Slower at the first shape: bmm, softmax, bmm in fp32, 1 to 8 heads at a time (28.7 to 40.0 where this took 24.1), or in
bf16 (31 to 42 where torch's bf16 took 30, at four times its error). A core with AMX has another product for bf16, which
was not measured here: it keeps bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_kernels.native import NativeLibrary
from nvlm_runtime.model import native_attention

MIN_TOKENS = 256  # measured: 257 tokens gain, 65 lose


def computes_in_fp32(q: Tensor) -> bool:
    """Whether `attend` computes q's attention by torch's in fp32. q: [N, H, P, D]."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.shape[2] >= MIN_TOKENS
        and not (torch.is_grad_enabled() and q.requires_grad)
        and not torch.cpu._is_amx_tile_supported()
    )


def attend(q: Tensor, k: Tensor, v: Tensor, library: NativeLibrary | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v. q, k, v: [N, H, P, D] of any strides. Returns [N, P, H * D] in their dtype."""
    if native_attention.takes(library, q):
        return native_attention.attend(library, *(t.transpose(1, 2) for t in (q, k, v)), None).flatten(2)
    if not computes_in_fp32(q):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    # torch's kernel walks a head's rows: packing them is one pass with the cast
    q, k, v = (t.to(torch.float32, memory_format=torch.contiguous_format) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [N, P, H, D]
    return out.to(torch.bfloat16, memory_format=torch.contiguous_format).flatten(2)
