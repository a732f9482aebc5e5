"""Rotary position embedding of q and k, read in place from the fused projection.

    y = x * cos + turn(x) * sin        turn([a, b]) = [-b, a], a and b the halves of D

qkv: [B, T, (H + 2 Hkv) * D], heads of q, then k, then v    cos, sin: [B, T, D]    q: [B, T, H, D]    k: [B, T, Hkv, D]
Source: transformers' Qwen2 (rotate-half layout; cos and sin rounded to the activations' dtype before they come here).

`rotary` is for prompts and training; v is not read, the caller takes a view. With dy the gradient of q or k:

    dx = dy * cos - turn(dy * sin)        and exactly 0 for v, in one tensor of qkv's shape

`rotary_cache` is for decoding: one launch rotates, and writes k and v into their slots of the caches [B, S, Hkv, D],
which may be views of a larger cache. No gradient.

Bound: memory: q and k read and written once; v written by the backward and copied by rotary_cache. A program has
several rows of (token, head). Numerics: fp32 inside, one rounding at the store (eager rounds both products as well).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nvlm_kernels._backend import has_values, triton_op, use_triton

BLOCK = 4096  # elements of each half: with 64 heads of 128, a token's angles are read by two or three programs
WARPS = 8  # 8 elements a lane of AMD's 64, a 16-byte load in bf16


def rotary_ref(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    heads = qkv.unflatten(-1, (-1, cos.shape[-1]))  # [B, T, H + 2 Hkv, D]
    x = heads[:, :, : num_heads + num_kv_heads]
    first, second = x.chunk(2, dim=-1)
    y = x * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]
    return y[:, :, :num_heads], y[:, :, num_heads:]


def rotary_cache_ref(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, num_heads: int
) -> Tensor:
    num_kv_heads = k_cache.shape[2]
    q, k = rotary_ref(qkv, cos, sin, num_heads, num_kv_heads)
    v = qkv.unflatten(-1, (-1, cos.shape[-1]))[:, :, -num_kv_heads:]
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    if has_values(positions):
        inside = (positions >= 0) & (positions < k_cache.shape[1])
        if not inside.all():
            rows, positions, k, v = rows.expand_as(positions)[inside], positions[inside], k[inside], v[inside]
    k_cache[rows, positions] = k
    v_cache[rows, positions] = v
    return q


@triton.jit
def _turn(first, second, cos_ptr, sin_ptr, mask, HALF: tl.constexpr, BACK: tl.constexpr):
    """Both halves in fp32, turned by the angle, or back by its transpose."""
    cos1 = tl.load(cos_ptr, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        turned1, turned2 = first * cos1 + second * sin2, second * cos2 - first * sin1
    else:
        turned1, turned2 = first * cos1 - second * sin1, second * cos2 + first * sin2
    return turned1, turned2


@triton.jit
def _fwd_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    tokens,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = (row // (H + HKV))[:, None], (row % (H + HKV))[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (token < tokens) & (offs_d < HALF)
    x_ptr = qkv_ptr + (token * (H + 2 * HKV) + head) * (2 * HALF) + offs_d
    first = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = token * (2 * HALF) + offs_d
    first, second = _turn(first, second, cos_ptr + angle, sin_ptr + angle, mask, HALF, False)
    to_q = q_ptr + (token * H + head) * (2 * HALF) + offs_d
    tl.store(to_q, first, mask=mask & (head < H))
    tl.store(to_q + HALF, second, mask=mask & (head < H))
    to_k = k_ptr + (token * HKV + head - H) * (2 * HALF) + offs_d
    tl.store(to_k, first, mask=mask & (head >= H))
    tl.store(to_k + HALF, second, mask=mask & (head >= H))


@triton.jit
def _bwd_kernel(
    dq_ptr,
    dk_ptr,
    cos_ptr,
    sin_ptr,
    dqkv_ptr,
    tokens,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = (row // (H + 2 * HKV))[:, None], (row % (H + 2 * HKV))[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (token < tokens) & (offs_d < HALF)
    is_q, is_k = mask & (head < H), mask & (head >= H) & (head < H + HKV)
    from_q = dq_ptr + (token * H + head) * (2 * HALF) + offs_d
    from_k = dk_ptr + (token * HKV + head - H) * (2 * HALF) + offs_d
    first = tl.load(from_q, mask=is_q, other=0.0).to(tl.float32) + tl.load(from_k, mask=is_k, other=0.0).to(tl.float32)
    second = tl.load(from_q + HALF, mask=is_q, other=0.0).to(tl.float32)
    second += tl.load(from_k + HALF, mask=is_k, other=0.0).to(tl.float32)
    angle = token * (2 * HALF) + offs_d
    first, second = _turn(first, second, cos_ptr + angle, sin_ptr + angle, is_q | is_k, HALF, True)
    dx_ptr = dqkv_ptr + (token * (H + 2 * HKV) + head) * (2 * HALF) + offs_d
    tl.store(dx_ptr, first, mask=mask)  # v's rows were loaded as 0, and are 0 however turned
    tl.store(dx_ptr + HALF, second, mask=mask)


@triton.jit
def _cache_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tokens,
    T,
    S,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = (row // (H + 2 * HKV))[:, None], (row % (H + 2 * HKV))[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (token < tokens) & (offs_d < HALF)
    x_ptr = qkv_ptr + (token * (H + 2 * HKV) + head) * (2 * HALF) + offs_d
    first = tl.load(x_ptr, mask=mask, other=0.0)
    second = tl.load(x_ptr + HALF, mask=mask, other=0.0)
    is_q, is_v = head < H, head >= H + HKV
    angle = token * (2 * HALF) + offs_d
    turned1, turned2 = _turn(
        first.to(tl.float32), second.to(tl.float32), cos_ptr + angle, sin_ptr + angle, mask & ~is_v, HALF, False
    )
    to_q = q_ptr + (token * H + head) * (2 * HALF) + offs_d
    tl.store(to_q, turned1, mask=mask & is_q)
    tl.store(to_q + HALF, turned2, mask=mask & is_q)
    position = tl.load(positions_ptr + token, mask=token < tokens, other=-1)
    mask = mask & (position >= 0) & (position < S)
    to_k = k_cache_ptr + token // T * stride_kb + position * stride_ks + (head - H) * stride_kh + offs_d
    tl.store(to_k, turned1, mask=mask & ~is_q & ~is_v)
    tl.store(to_k + HALF, turned2, mask=mask & ~is_q & ~is_v)
    to_v = v_cache_ptr + token // T * stride_vb + position * stride_vs + (head - H - HKV) * stride_vh + offs_d
    tl.store(to_v, first, mask=mask & is_v)
    tl.store(to_v + HALF, second, mask=mask & is_v)


def _tile(half: int) -> dict[str, int]:
    columns = triton.next_power_of_2(half)
    return {"HALF": half, "ROWS": max(1, BLOCK // columns), "BLOCK_D": columns, "num_warps": WARPS}


@triton_op("nvlm::rotary", mutates_args=())
def _fwd(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    batch, length, size = cos.shape
    q = qkv.new_empty(batch, length, num_heads, size)
    k = qkv.new_empty(batch, length, num_kv_heads, size)
    if qkv.numel():
        tokens = batch * length
        tile = _tile(size // 2)
        wrap_triton(_fwd_kernel)[(triton.cdiv(tokens * (num_heads + num_kv_heads), tile["ROWS"]),)](
            qkv, cos, sin, q, k, tokens, H=num_heads, HKV=num_kv_heads, **tile
        )
    return q, k


@triton_op("nvlm::rotary_bwd", mutates_args=())
def _bwd(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, length, num_heads, size = dq.shape
    num_kv_heads = dk.shape[2]
    dqkv = dq.new_empty(batch, length, (num_heads + 2 * num_kv_heads) * size)
    if dqkv.numel():
        tokens = batch * length
        tile = _tile(size // 2)
        wrap_triton(_bwd_kernel)[(triton.cdiv(tokens * (num_heads + 2 * num_kv_heads), tile["ROWS"]),)](
            dq, dk, cos, sin, dqkv, tokens, H=num_heads, HKV=num_kv_heads, **tile
        )
    return dqkv


@triton_op("nvlm::rotary_cache", mutates_args=("k_cache", "v_cache"))
def _cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, num_heads: int
) -> Tensor:
    batch, length, size = cos.shape
    q = qkv.new_empty(batch, length, num_heads, size)
    if qkv.numel():
        num_slots, num_kv_heads = k_cache.shape[1:3]
        tokens = batch * length
        tile = _tile(size // 2)
        wrap_triton(_cache_kernel)[(triton.cdiv(tokens * (num_heads + 2 * num_kv_heads), tile["ROWS"]),)](
            qkv,
            cos,
            sin,
            positions,
            q,
            k_cache,
            v_cache,
            tokens,
            length,
            num_slots,
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            H=num_heads,
            HKV=num_kv_heads,
            **tile,
        )
    return q


def _save(ctx, inputs, output):
    _, cos, sin, _, _ = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    return _bwd(dq.contiguous(), dk.contiguous(), *ctx.saved_tensors), None, None, None, None


_fwd.register_autograd(_backward, setup_context=_save)


def _check(op: str, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> None:
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[-1] % 2:
        raise ValueError(f"{op}: cos and sin must be [B, T, D], D even, got {tuple(cos.shape)}, {tuple(sin.shape)}")
    if num_heads < 1 or num_kv_heads < 1:
        raise ValueError(f"{op}: heads must be at least 1, got {num_heads} of q and {num_kv_heads} of k")
    shape = (*cos.shape[:2], (num_heads + 2 * num_kv_heads) * cos.shape[-1])
    if qkv.shape != shape:
        raise ValueError(f"{op}: qkv must be {shape}, got {tuple(qkv.shape)}")
    if not qkv.dtype == cos.dtype == sin.dtype or not qkv.device == cos.device == sin.device:
        raise ValueError(
            f"{op}: qkv, cos and sin must share dtype and device, "
            f"got {qkv.dtype} {qkv.device}, {cos.dtype} {cos.device}, {sin.dtype} {sin.device}"
        )
    if not qkv.is_floating_point() or (qkv.dtype == torch.float64 and use_triton(qkv)):
        raise ValueError(f"{op}: qkv must be float32, float16 or bfloat16, got {qkv.dtype}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(f"{op}: cos and sin have no gradient, got one that requires it")


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D] and k [B, T, Hkv, D], rotated, of qkv [B, T, (H + 2 Hkv) * D]. cos, sin: [B, T, D], no gradient.

    Raises ValueError when shapes do not fit each other, D is odd, or dtypes or devices differ.
    """
    _check("rotary", qkv, cos, sin, num_heads, num_kv_heads)
    if not use_triton(qkv):
        return rotary_ref(qkv, cos, sin, num_heads, num_kv_heads)
    return _fwd(qkv.contiguous(), cos.contiguous(), sin.contiguous(), num_heads, num_kv_heads)


def rotary_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, num_heads: int
) -> Tensor:
    """Rotated q [B, T, H, D]; rotated k and plain v are written into the caches [B, S, Hkv, D] at positions [B, T].

    The caches may be strided views whose last axis is dense. positions: int64, in [0, S), none twice in a row of the
    batch. They cannot be looked at without waiting for the device, so they are not checked: nothing is written for a
    position outside.
    Raises ValueError when shapes do not fit each other, D is odd, or dtypes or devices differ.
    """
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"rotary_cache: k_cache and v_cache must be [B, S, Hkv, D], "
            f"got {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    _check("rotary_cache", qkv, cos, sin, num_heads, k_cache.shape[2])
    if k_cache.shape[0] != cos.shape[0] or k_cache.shape[3] != cos.shape[2]:
        raise ValueError(
            f"rotary_cache: k_cache must be [{cos.shape[0]}, S, Hkv, {cos.shape[2]}], got {tuple(k_cache.shape)}"
        )
    if not k_cache.dtype == v_cache.dtype == qkv.dtype or not k_cache.device == v_cache.device == qkv.device:
        raise ValueError(
            f"rotary_cache: the caches must be {qkv.dtype} on {qkv.device}, "
            f"got {k_cache.dtype} {k_cache.device}, {v_cache.dtype} {v_cache.device}"
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(
            f"rotary_cache: the caches' last axis must be dense, got strides {k_cache.stride()}, {v_cache.stride()}"
        )
    if positions.shape != cos.shape[:2] or positions.dtype != torch.int64 or positions.device != qkv.device:
        raise ValueError(
            f"rotary_cache: positions must be torch.int64 {tuple(cos.shape[:2])} on {qkv.device}, "
            f"got {positions.dtype} {tuple(positions.shape)} on {positions.device}"
        )
    if not use_triton(qkv):
        return rotary_cache_ref(qkv, cos, sin, k_cache, v_cache, positions, num_heads)
    return _cache(
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), k_cache, v_cache, positions.contiguous(), num_heads
    )
