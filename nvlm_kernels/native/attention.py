"""Attention of prompts and image tiles on a CPU (attention.cpp). Each query row sees one interval of the keys.

    out[b, t, h] = softmax(scale * q[b, t, h] k[b, start:end, h']^T) v[b, start:end, h']

B batch, T queries, S keys, H heads, Hkv kv heads, D head_dim, h' the kv head of head h. No gradients.
Bound: flops of the two products; the softmax runs between them, in blocks that stay in the first-level cache.
Numerics, bf16: products of bf16 pairs are summed in fp32, the softmax weights are rounded to bf16, and the output is
rounded once, as in torch's CPU attention; or all products are in fp32.
Source: FlashAttention (arXiv 2205.14135).
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from nvlm_kernels.native.library import NativeLibrary

MAX_HEAD_DIM = 128


class _NativeHeads(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("stride_batch", c_int64),
        ("stride_token", c_int64),
        ("stride_head", c_int64),
    ]


class _NativeAttention(ctypes.Structure):
    _fields_ = [
        ("q", _NativeHeads),
        ("k", _NativeHeads),
        ("v", _NativeHeads),
        ("out", _NativeHeads),
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
    library: NativeLibrary, q: Tensor, k: Tensor, v: Tensor, intervals: Tensor | None = None, in_fp32: bool = False
) -> Tensor:
    """Computes attention where every query row sees one interval of the keys.

    The bits of a row depend neither on the other rows nor on the number of threads.

    Args:
        library: As `load_library` returns it.
        q: Queries [B, T, H, D], fp32 or bf16, on the CPU; the last axis is dense.
        k: Keys [B, S, Hkv, D] like q; H is a multiple of Hkv.
        v: Values [B, S, Hkv, D] like k. Values that a row does not see are multiplied by 0, so they must be finite.
        intervals: int64 [B, T, 2], the keys [start, end) of each row, within [0, S]; the values are not checked.
            Default: every row sees all keys.
        in_fp32: Multiplies bf16 inputs in fp32, for a CPU that is slower in bf16.

    Returns:
        [B, T, H, D], contiguous, in q's dtype. A row that sees no key is 0.

    Raises:
        ValueError: A shape, dtype or device is wrong, or this CPU has no such attention
            (`library.attention_level` is 0).
    """
    if library.attention_level == 0:
        raise ValueError("native_attention: this CPU has no AVX512; use torch's attention")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(f"native_attention: expected q [B, T, H, D] and k, v [B, S, Hkv, D], got {shapes}")
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != head_dim or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"native_attention: k {list(k.shape)} must have the batch and head_dim of q {list(q.shape)}, and its "
            "number of heads must divide that of q"
        )
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"native_attention: expected a head_dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if any(t.device.type != "cpu" or t.dtype != q.dtype or t.stride(-1) != 1 for t in (q, k, v)):
        raise ValueError("native_attention: q, k and v must have one dtype, be on the CPU and have a dense last axis")
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
    call = _NativeAttention(
        *(_NativeHeads(t.data_ptr(), *t.stride()[:3]) for t in (q, k, v, out)),
        intervals=None if intervals is None else intervals.data_ptr(),
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        is_bf16=is_bf16,
        products_bf16=is_bf16 and not in_fp32 and library.attention_level == 2,
    )
    packed = torch.empty(library.dll.nvlm_attention_room(ctypes.byref(call)), dtype=torch.int8)
    call.packed = packed.data_ptr()
    library.dll.nvlm_attention(ctypes.byref(call), torch.get_num_threads())
    return out
