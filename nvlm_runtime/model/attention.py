"""The decoder's self-attention: which implementation a call takes, and what it sees of the past.

B requests, T query tokens, S cached tokens, H heads, Hkv kv heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_kernels import MAX_DECODE_TOKENS, decode_attention, rotary, rotary_cache, tile_attention
from nvlm_kernels.native import NativeLibrary
from nvlm_runtime.model import native_attention
from nvlm_runtime.model.cache import KVCache
from nvlm_runtime.model.linear import computes_in_fp32

Attention = Literal["sdpa", "flash"] | NativeLibrary
Documents = Sequence[Sequence[tuple[int, int]]]  # spans of a row's tokens, from 0 on without a gap, a row


def flash_attention() -> Callable[..., Tensor]:
    """flash-attn's function of q [B, T, H, D] and k, v [B, S, Hkv, D]. Raises ValueError where it is not installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ValueError(f"attention='flash' needs the flash-attn package: {error}") from error
    return flash_attn_func


def check_attention(attention: str, device: torch.device | str) -> None:
    """Raises ValueError unless the implementation exists here and runs on the device."""
    if attention not in ("sdpa", "flash"):
        raise ValueError(f"attention must be 'sdpa' or 'flash', got {attention!r}")
    if attention == "flash":
        if torch.device(device).type != "cuda":
            raise ValueError(f"attention='flash' runs on a CUDA device, the model is on {device}")
        flash_attention()


class Past:
    """Self-attention of a call to its own tokens, or to a cache it writes into and reads its first `visible` slots.

    positions: [B, T], growing along a row. A call without a cache, and a whole prompt, are plainly causal: torch's
    attention, or flash-attn where `attention` says so. A few tokens behind a cache (decoding) go through
    `decode_attention`; more of them through torch's attention with a mask. Where `attention` is a library of
    `nvlm_kernels.native`, prompts on a CPU go through its attention.
    """

    def __init__(self, cache: KVCache | None, positions: Tensor, visible: int, attention: Attention):
        self.cache = cache
        self.attention = attention
        self.positions = positions
        self.visible = visible
        self.layer = 0
        num_tokens = positions.shape[1]
        self.is_causal = cache is None or visible == num_tokens
        self.lengths = self.mask = None  # slot s holds position s
        if not self.is_causal and num_tokens <= MAX_DECODE_TOKENS:
            self.lengths = (positions[:, -1] + 1).clamp(max=visible)  # rows at rest see all
        elif isinstance(attention, NativeLibrary):
            self.intervals = torch.stack([torch.zeros_like(positions), positions + 1], -1)  # [B, T, 2]

    def attend(self, qkv: Tensor, angles: tuple[Tensor, Tensor], num_heads: int, num_kv_heads: int) -> Tensor:
        """qkv: [B, T, (H + 2 Hkv) * D], not rotated. Returns [B, T, H, D]. A cache moves on to its next layer."""
        if self.cache is None:
            q, k = rotary(qkv, *angles, num_heads, num_kv_heads)
            v = qkv.unflatten(-1, (-1, q.shape[-1]))[:, :, -num_kv_heads:]
        else:
            k, v = self.cache.k[self.layer], self.cache.v[self.layer]
            q = rotary_cache(qkv, *angles, k, v, self.positions, num_heads)
            k, v = k[:, : self.visible], v[:, : self.visible]
            self.layer += 1
        if self.lengths is not None:
            return decode_attention(q, k, v, self.lengths)
        if self.is_causal and self.attention == "flash":
            return flash_attention()(q, k, v, causal=True)
        if isinstance(self.attention, NativeLibrary) and native_attention.takes(self.attention, q):
            return native_attention.attend(self.attention, q, k, v, self.intervals)
        if not self.is_causal and self.mask is None:
            slots = torch.arange(self.visible, device=q.device)
            self.mask = (slots <= self.positions[..., None])[:, None]  # bool [B, 1, T, S]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, D], [B, Hkv, S, D]
        if computes_in_fp32(q):
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.is_causal, enable_gqa=num_heads != num_kv_heads
        )
        return out.transpose(1, 2).to(qkv.dtype)


class PackedPast:
    """Self-attention of rows that hold several documents each, none of which sees another. No cache.

    documents: a row's spans [start, end) of its T tokens; what is in none of them (padding) gives 0. On a CPU document
    by document through torch's attention; on a GPU in one call, an interval a token.
    """

    def __init__(self, documents: Documents, length: int, device: torch.device):
        self.intervals = torch.zeros(len(documents), length, 2, dtype=torch.int64)
        for row, spans in enumerate(documents):
            for start, end in spans:
                self.intervals[row, start:end, 0] = start
                self.intervals[row, start:end, 1] = torch.arange(start, end) + 1
        self.intervals = self.intervals.to(device)
        self._pieces = []  # all rows end to end: (is a document, length)
        for spans in documents:
            self._pieces += [(True, end - start) for start, end in spans]
            self._pieces.append((False, length - (spans[-1][1] if spans else 0)))

    @property
    def positions(self) -> Tensor:
        """int64 [B, T], from 0 in every document."""
        return (self.intervals[..., 1] - self.intervals[..., 0] - 1).clamp(min=0)

    def attend(self, qkv: Tensor, angles: tuple[Tensor, Tensor], num_heads: int, num_kv_heads: int) -> Tensor:
        """qkv: [B, T, (H + 2 Hkv) * D], not rotated. Returns [B, T, H, D]."""
        q, k = rotary(qkv, *angles, num_heads, num_kv_heads)
        v = qkv.unflatten(-1, (-1, q.shape[-1]))[:, :, -num_kv_heads:]
        if q.is_cuda:
            return tile_attention(q, k, v, self.intervals)
        lengths = [length for _, length in self._pieces]
        parts = (t.flatten(0, 1).split(lengths) for t in (q, k, v))  # not slices, whose gradients are added one by one
        out = []
        for (is_document, _), *heads in zip(self._pieces, *parts, strict=True):
            if is_document:
                qd, kd, vd = (part.transpose(0, 1)[None] for part in heads)
                part = F.scaled_dot_product_attention(qd, kd, vd, is_causal=True, enable_gqa=num_heads != num_kv_heads)
                out.append(part[0].transpose(0, 1))
            else:
                out.append(torch.zeros_like(heads[0]))
        return torch.cat(out).view_as(q)


class FlatPast:
    """Self-attention of a chunk to a cache whose rows are laid end to end: one fixed shape for every row and length.

    cache: of B rows of S slots. slots: [1, T], where the chunk's keys and values go, from 0 to B * S, none twice.
    spans: [1, T, 2], the slots [start, end) each token sees, its own among them; an empty one gives 0.
    Nothing is looked at on the host. On a GPU a block of the cache outside the spans is never loaded.
    """

    def __init__(self, cache: KVCache, slots: Tensor, spans: Tensor):
        self.k, self.v = (side.flatten(1, 2)[:, None] for side in (cache.k, cache.v))  # [layers, 1, B * S, Hkv, D]
        self.slots, self.spans = slots, spans
        self.layer = 0

    def attend(self, qkv: Tensor, angles: tuple[Tensor, Tensor], num_heads: int, num_kv_heads: int) -> Tensor:
        """qkv: [1, T, (H + 2 Hkv) * D], not rotated. Returns [1, T, H, D]; the cache moves on to its next layer."""
        k, v = self.k[self.layer], self.v[self.layer]
        self.layer += 1
        q = rotary_cache(qkv, *angles, k, v, self.slots, num_heads)
        return tile_attention(q, k, v, self.spans)
