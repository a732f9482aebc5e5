"""Attention of prompts and tiles on a CPU, through attention.cpp: every row sees one interval of the keys.

    out[b, t, h] = softmax(scale * q[b, t, h] k[b, start:end, h']^T) v[b, start:end, h']

B batch, T queries, S keys, H heads, Hkv kv heads, D head_dim. No backward. Bound: flops, of the two products; the
softmax runs between them in blocks that stay in the first cache. bf16: products of bf16 pairs summed in fp32, weights
rounded to bf16, one rounding at the end, as torch's CPU attention has it; or products in fp32 of the same inputs.
Algorithm: FlashAttention (arXiv 2205.14135).
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from nvlm_kernels.native.library import Native

MAX_HEAD_DIM = 128


class Heads(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("stride_batch", c_int64),
        ("stride_token", c_int64),
        ("stride_head", c_int64),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        ("q", Heads),
        ("k", Heads),
        ("v", Heads),
        ("out", Heads),
        ("intervals", c_void_p),
        ("packed", c_void_p),
        ("batch", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("scale", c_float),
        ("is_bf16", c_int32),
        ("products_bf16", c_int32),
    ]


def native_attention(
    library: Native, q: Tensor, k: Tensor, v: Tensor, intervals: Tensor | None = None, in_fp32: bool = False
) -> Tensor:
    """q: [B, T, H, D]; k, v: [B, S, Hkv, D]; fp32 or bf16 on the CPU, the last dimension dense, the others of any
    strides. intervals: int64 [B, T, 2] of keys [start, end) within [0, S], whose values are not looked at here; None
    where every row sees all. Values a row does not see are multiplied by 0: they have to be finite. in_fp32: bf16
    inputs are multiplied in fp32, for a CPU that is slower in bf16.

    Returns [B, T, H, D], contiguous; a row that sees nothing is 0. A row's bits depend neither on the other rows nor on
    the number of threads. Raises ValueError for other shapes, dtypes and devices, and where the library has no such
    attention (`library.attention`).
    """
    if library.attention == 0:
        raise ValueError("native_attention: this CPU has no AVX512")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(f"native_attention: expected q [B, T, H, D] and k, v [B, S, Hkv, D], got {shapes}")
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != head_dim or not kv_heads or heads % kv_heads:
        raise ValueError(f"native_attention: q {list(q.shape)} and k {list(k.shape)} do not belong together")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"native_attention: expected a head_dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if any(t.device.type != "cpu" or t.dtype != q.dtype or t.stride(-1) != 1 for t in (q, k, v)):
        raise ValueError("native_attention: expected q, k and v of one dtype on the CPU, their heads' values dense")
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"native_attention: expected float32 or bfloat16, got {q.dtype}")
    if intervals is not None:
        if intervals.shape != (batch, queries, 2) or intervals.dtype != torch.int64 or intervals.device.type != "cpu":
            raise ValueError(
                f"native_attention: expected intervals int64 [{batch}, {queries}, 2] on the CPU, got "
                f"{intervals.dtype} {list(intervals.shape)}"
            )
        intervals = intervals.contiguous()
    out = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype)
    if not out.numel():
        return out
    if not keys:
        return out.zero_()
    is_bf16 = q.dtype == torch.bfloat16
    call = Attention(
        *(Heads(t.data_ptr(), *t.stride()[:3]) for t in (q, k, v, out)),
        intervals=None if intervals is None else intervals.data_ptr(),
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        is_bf16=is_bf16,
        products_bf16=is_bf16 and not in_fp32 and library.attention == 2,
    )
    packed = torch.empty(library.dll.nvlm_attention_room(ctypes.byref(call)), dtype=torch.int8)
    call.packed = packed.data_ptr()
    library.dll.nvlm_attention(ctypes.byref(call), torch.get_num_threads())
    return out
