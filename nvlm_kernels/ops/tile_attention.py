"""Attention from text rows to image tokens, where each row sees one interval of them.

    out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s]      over start[t] <= s < end[t]
    out[t] = 0                                                where start[t] >= end[t]

q, out: [B, T, H, D]    k, v: [B, S, Hkv, D], H a multiple of Hkv    intervals: [B, T, 2] integers.
A row with an empty interval gives exactly 0, and sends exactly 0 into every gradient: the softmax runs
over a row that has something to see, and such a row is replaced after it. Source: NVLM paper (arXiv
2409.11402) section 4.3, a tile tag reads its own tile; the interval form follows attention-gym's Flamingo mask.
Bound: the bytes of the visible k and v in decode, flops in prefill.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def tile_attention_ref(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
    if k.shape[1] == 0:
        return torch.zeros_like(q) + q * 0  # no image at all: zeros that still belong to q's graph
    start, end = intervals[..., :1], intervals[..., 1:]
    slots = torch.arange(k.shape[1], device=q.device)
    sees = end > start  # [B, T, 1]
    visible = ((slots >= start) & (slots < end)) | ~sees  # an empty row looks at all, and is zeroed below
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=q.shape[1] != k.shape[1])
    return torch.where(sees[..., None], out.transpose(1, 2), 0)


def tile_attention(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
    """Attention of text rows to the image tokens their interval [start, end) names.

    q: [B, T, H, D]; k, v: [B, S, Hkv, D]; intervals: [B, T, 2], int. Returns [B, T, H, D].
    S may be 0 (no image): every row is then empty. Raises ValueError on any other shape.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"tile_attention: q, k, v must be [B, T, H, D] and [B, S, Hkv, D] twice, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"tile_attention: {q.shape[2]} query heads are no multiple of {k.shape[2]} kv heads")
    if intervals.shape != (*q.shape[:2], 2) or intervals.is_floating_point():
        raise ValueError(
            f"tile_attention: intervals must be integers of shape {(*q.shape[:2], 2)}, "
            f"got {intervals.dtype} {tuple(intervals.shape)}"
        )
    return tile_attention_ref(q, k, v, intervals)
