"""Self-attention of the newest T tokens of each request to its KV cache: one decode step, or some drafted tokens.

    out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s]      over 0 <= s < length - T + 1 + t

q, out: [B, T, H, D], 1 <= T <= 8    k_cache, v_cache: [B, S, Hkv, D], S positions, H a multiple of Hkv
lengths: [B], number of filled positions, the T new tokens included, on the device
Positions from `length` on are not read and may hold anything. The caches may be views of a larger one: nothing is
copied. A token that sees no position gives 0. No gradients: for decoding only.
Bound: memory, the bytes of the filled positions. Kernels and numerics: `split_attention`, one grid for every length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_kernels._backend import has_values, use_triton
from nvlm_kernels.ops.attention.split import MAX_TOKENS, check_attention, check_kernel, split_attention


def decode_attention_ref(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    num_tokens, num_positions = q.shape[1], k_cache.shape[1]
    ends = lengths[:, None] - num_tokens + 1 + torch.arange(num_tokens, device=q.device)  # [B, T]
    visible = torch.arange(num_positions, device=q.device) < ends[..., None]  # [B, T, S]
    sees = visible.any(-1, keepdim=True)
    q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=(visible | ~sees)[:, None], enable_gqa=q.shape[1] != k.shape[1]
    )
    return torch.where(sees[..., None], out.transpose(1, 2), 0)


def _one_length(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int) -> Tensor:
    """The reference if every request that sees any sees the first `length` positions: slices them, needs no mask."""
    q, k, v = (t.transpose(1, 2) for t in (q, k_cache[:, :length], v_cache[:, :length]))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """Attention of the newest T tokens to the filled positions of a static KV cache.

    Args:
        q: Queries [B, T, H, D], T at most 8. The kernels take D in multiples of 16 up to 128, in fp32, fp16 or bf16.
        k_cache: Keys [B, S, Hkv, D] in q's dtype, any strides. The T tokens' own keys are already in it.
        v_cache: Values like k_cache.
        lengths: int32 or int64 [B], number of filled positions, the T tokens included.

    Returns:
        [B, T, H, D] in q's dtype. No gradient.

    Raises:
        ValueError: A shape, dtype or device is wrong, or, on a CPU, a length leaves [0, S]. A GPU does not check
            lengths, because that would wait for the device: it clamps them to [0, S].

    Source:
        Flash-Decoding (PyTorch blog, October 2023).
    """
    check_attention("decode_attention", q, k_cache, v_cache, "k_cache", "v_cache")
    if q.shape[1] > MAX_TOKENS:
        raise ValueError(f"decode_attention: q must have at most {MAX_TOKENS} tokens, got {q.shape[1]}")
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"decode_attention: lengths must be int32 or int64 of shape {(q.shape[0],)}, "
            f"got {lengths.dtype} {tuple(lengths.shape)}"
        )
    if lengths.device != q.device:
        raise ValueError(f"decode_attention: lengths are on {lengths.device}, q on {q.device}")
    if not use_triton(q):
        if not has_values(lengths):
            return decode_attention_ref(q, k_cache, v_cache, lengths)
        known = set(lengths.tolist())
        if known and (min(known) < 0 or max(known) > k_cache.shape[1]):
            raise ValueError(
                f"decode_attention: lengths must be within the {k_cache.shape[1]} positions, got {lengths.tolist()}"
            )
        if q.shape[1] == 1 and len(known - {0}) == 1:
            out = _one_length(q, k_cache, v_cache, *(known - {0}))
            return torch.where(lengths[:, None, None, None] > 0, out, 0) if 0 in known else out
        return decode_attention_ref(q, k_cache, v_cache, lengths)
    check_kernel("decode_attention", q)
    if q.numel() == 0 or k_cache.shape[1] == 0:
        return torch.zeros_like(q)
    return split_attention(q, k_cache, v_cache, lengths)
