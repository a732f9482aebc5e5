"""When a CPU's attention is the native one: prompts' and tiles', not under autograd.

Milliseconds a layer, torch's attention beside ours, 2 threads, medians of 9, on a core with AVX512 that multiplies bf16
twice as fast as fp32:

    B, T, S, H, Hkv, D                torch bf16   fp32   ours bf16   fp32
    1, 1025, 1025, 16, 16, 64               30.9   27.3        13.4   24.5
    1, 1025, 1025, 25, 25, 128              85.0   77.5        37.5   71.7
    1, 512, 512, 14, 2, 64, causal           6.7    6.3         1.9    3.4
    1, 512, 1892, 14, 2, 64, a chunk        25.9   24.8         9.0   16.7
    1, 257, 257, 16, 16, 64                 2.49   2.15        1.04   1.80
    1, 65, 65, 5, 5, 32                     0.06   0.06        0.04   0.05

A core with AMX has another product for bf16, which torch's attention uses and this one does not: there bf16 stays
torch's.
"""

import torch
from torch import Tensor
from torch.profiler import record_function

from nvlm_kernels.native import MAX_HEAD_DIM, NativeLibrary, native_attention
from nvlm_runtime.model.linear import fp32_is_faster


def takes(library: NativeLibrary | None, q: Tensor) -> bool:
    """Whether `attend` computes q's attention [B, T, H, D]."""
    return (
        library is not None
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.shape[-1] <= MAX_HEAD_DIM
        and not (torch.is_grad_enabled() and q.requires_grad)
        and not (q.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported())
        and library.attention_level > 0
    )


def attend(library: NativeLibrary, q: Tensor, k: Tensor, v: Tensor, intervals: Tensor | None) -> Tensor:
    """As `native_attention`, in the precision that this CPU multiplies faster. A profiler sees it by name."""
    in_fp32 = q.dtype == torch.bfloat16 and fp32_is_faster()
    with record_function("native::attention"):
        return native_attention(library, q, k, v, intervals, in_fp32)
