"""What the decoder's self-attention sees: the tokens of the call itself and, with a cache, the positions before them.

One class for each kind of call. `make_past` chooses between the first three:

    CausalPast    a whole prompt, with or without a cache to write into
    ChunkPast     a chunk of a prompt after a cache
    DecodePast    a few tokens after a cache
    PackedPast    training: rows that hold several documents each
    FlatPast      a chunk after a cache, with the one fixed shape that a CUDA graph needs

B requests, T query tokens, S cached positions, H query heads, Hkv kv heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_kernels import MAX_DECODE_TOKENS, decode_attention, rotary, rotary_cache, tile_attention
from nvlm_kernels.native import NativeLibrary
from nvlm_runtime.model import native_attention
from nvlm_runtime.model.cache import KVCache
from nvlm_runtime.model.linear import computes_in_fp32

AttentionBackend = Literal["sdpa", "flash"] | NativeLibrary
Documents = Sequence[Sequence[tuple[int, int]]]  # for each row: spans [start, end) of its tokens, from 0 without a gap
Angles = tuple[Tensor, Tensor]  # cos and sin, each [B, T, D]


class Past(Protocol):
    """What one call of the decoder sees. A decoder calls `attend` once for each layer, in order."""

    def attend(self, qkv: Tensor, angles: Angles, num_heads: int, num_kv_heads: int) -> Tensor:
        """Self-attention of one layer.

        Args:
            qkv: [B, T, (H + 2 Hkv) * D], not rotated yet.
            angles: cos and sin of the tokens' positions.
            num_heads: H.
            num_kv_heads: Hkv.

        Returns:
            [B, T, H, D]. A cache moves on to its next layer.
        """
        ...


def flash_attention() -> Callable[..., Tensor]:
    """Imports flash-attn's function of q [B, T, H, D] and k, v [B, S, Hkv, D].

    Raises:
        ValueError: The flash-attn package is not installed.
    """
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ValueError(f"attention='flash' needs the flash-attn package: {error}") from error
    return flash_attn_func


def check_attention(attention: str, device: torch.device | str) -> None:
    """Checks that an attention implementation exists and runs on a device.

    Raises:
        ValueError: The name is unknown, or "flash" cannot run there.
    """
    if attention not in ("sdpa", "flash"):
        raise ValueError(f"attention must be 'sdpa' or 'flash', got {attention!r}")
    if attention == "flash":
        if torch.device(device).type != "cuda":
            raise ValueError(f"attention='flash' runs on a CUDA device, the model is on {device}")
        flash_attention()


def make_past(
    positions: Tensor,
    attention: AttentionBackend,
    cache: KVCache | None = None,
    num_visible: int = 0,
    active: Tensor | None = None,
) -> Past:
    """Chooses what a prompt, a chunk of one or a decode step sees.

    Args:
        positions: int64 [B, T], increasing along a row.
        attention: what computes whole prompts and chunks. A decode step has its own kernel.
        cache: the keys and values that the call writes into and reads; None for a call without a cache.
        num_visible: how many positions of the cache the call reads, more than any of `positions`.
            T of them are a whole prompt.
        active: bool [B], which rows of a decode step read the cache at all; None for all.

    Returns:
        CausalPast, DecodePast or ChunkPast.
    """
    num_tokens = positions.shape[1]
    if cache is None or num_visible == num_tokens:
        return CausalPast(positions, attention, cache)
    if num_tokens <= MAX_DECODE_TOKENS:
        return DecodePast(positions, cache, num_visible, active)
    return ChunkPast(positions, attention, cache, num_visible)


class CausalPast:
    """A whole prompt from position 0: every token sees itself and the tokens before it.

    Args:
        positions: int64 [B, T].
        attention: torch's own, flash-attn's or the native library's, where that one takes the input.
        cache: where the keys and values are written, or None.
    """

    def __init__(self, positions: Tensor, attention: AttentionBackend, cache: KVCache | None = None):
        self._attention = attention
        self._writer = None if cache is None else _CacheWriter(cache.k, cache.v, positions, positions.shape[1])
        self._intervals = _causal_intervals(positions) if isinstance(attention, NativeLibrary) else None

    def attend(self, qkv: Tensor, angles: Angles, num_heads: int, num_kv_heads: int) -> Tensor:
        """As `Past.attend`."""
        if self._writer is None:
            q, k, v = _rotate(qkv, angles, num_heads, num_kv_heads)
        else:
            q, k, v = self._writer.write(qkv, angles, num_heads)
        if self._attention == "flash":
            return flash_attention()(q, k, v, causal=True)
        if isinstance(self._attention, NativeLibrary) and native_attention.takes(self._attention, q):
            return native_attention.attend(self._attention, q, k, v, self._intervals)
        return _torch_attention(q, k, v, None)


class ChunkPast:
    """More than a few tokens after a cache: a chunk in the middle or at the end of a prompt.

    Args:
        positions: int64 [B, T].
        attention: the native library, where it takes the input; otherwise torch's attention with a mask.
        cache: the keys and values that are written and read; position p of a request is its index p.
        num_visible: how many of the cache's positions are read.
    """

    def __init__(self, positions: Tensor, attention: AttentionBackend, cache: KVCache, num_visible: int):
        self._attention, self._positions, self._num_visible = attention, positions, num_visible
        self._writer = _CacheWriter(cache.k, cache.v, positions, num_visible)
        self._intervals = _causal_intervals(positions) if isinstance(attention, NativeLibrary) else None
        self._mask: Tensor | None = None

    def attend(self, qkv: Tensor, angles: Angles, num_heads: int, num_kv_heads: int) -> Tensor:
        """As `Past.attend`."""
        q, k, v = self._writer.write(qkv, angles, num_heads)
        if isinstance(self._attention, NativeLibrary) and native_attention.takes(self._attention, q):
            return native_attention.attend(self._attention, q, k, v, self._intervals)
        if self._mask is None:
            keys = torch.arange(self._num_visible, device=q.device)
            self._mask = (keys <= self._positions[..., None])[:, None]  # bool [B, 1, T, S]
        return _torch_attention(q, k, v, self._mask)


class DecodePast:
    """At most MAX_DECODE_TOKENS tokens after a cache: a decode step, or one that verifies a draft.

    Args:
        positions: int64 [B, T], consecutive along a row.
        cache: the keys and values that are written and read.
        num_visible: how many of the cache's positions are read at most.
        active: bool [B]. A row that is not active reads nothing and gets 0. None for all rows.
    """

    def __init__(self, positions: Tensor, cache: KVCache, num_visible: int, active: Tensor | None = None):
        self._writer = _CacheWriter(cache.k, cache.v, positions, num_visible)
        lengths = (positions[:, -1] + 1).clamp(max=num_visible)
        self._lengths = lengths if active is None else lengths * active

    def attend(self, qkv: Tensor, angles: Angles, num_heads: int, num_kv_heads: int) -> Tensor:
        """As `Past.attend`."""
        q, k, v = self._writer.write(qkv, angles, num_heads)
        return decode_attention(q, k, v, self._lengths)


class PackedPast:
    """Rows that hold several documents each, none of which sees another. There is no cache.

    A CPU computes document by document through torch's attention; a GPU computes all in one call, with an interval for
    each token.

    Args:
        documents: for each row the spans [start, end) of its documents. A token outside all of them (padding) gets 0.
        length: T, the tokens of every row.
        device: where the calls run.

    Attributes:
        intervals: int64 [B, T, 2], the tokens [start, end) that each token sees.
    """

    def __init__(self, documents: Documents, length: int, device: torch.device):
        self.intervals = torch.zeros(len(documents), length, 2, dtype=torch.int64)
        for row, spans in enumerate(documents):
            for start, end in spans:
                self.intervals[row, start:end, 0] = start
                self.intervals[row, start:end, 1] = torch.arange(start, end) + 1
        self.intervals = self.intervals.to(device)
        self._pieces: list[tuple[bool, int]] = []  # all rows end to end: (is a document, length)
        for spans in documents:
            self._pieces += [(True, end - start) for start, end in spans]
            self._pieces.append((False, length - (spans[-1][1] if spans else 0)))

    @property
    def positions(self) -> Tensor:
        """int64 [B, T], counted from 0 in every document."""
        return (self.intervals[..., 1] - self.intervals[..., 0] - 1).clamp(min=0)

    def attend(self, qkv: Tensor, angles: Angles, num_heads: int, num_kv_heads: int) -> Tensor:
        """As `Past.attend`."""
        q, k, v = _rotate(qkv, angles, num_heads, num_kv_heads)
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
    """A chunk after a cache whose rows lie end to end: one fixed shape for every row and length.

    The host looks at no value. A GPU never loads a block of the cache outside the spans.

    Args:
        cache: B rows of S positions each.
        places: int64 [1, T], where the chunk's keys and values are written, from 0 to B * S, none of them twice. Beyond
            B * S nothing is written.
        spans: int64 [1, T, 2], the places [start, end) that each token sees, its own included. An empty span gives 0.
    """

    def __init__(self, cache: KVCache, places: Tensor, spans: Tensor):
        k, v = (side.flatten(1, 2)[:, None] for side in (cache.k, cache.v))  # [layers, 1, B * S, Hkv, D]
        self._writer = _CacheWriter(k, v, places, k.shape[2])
        self._spans = spans

    def attend(self, qkv: Tensor, angles: Angles, num_heads: int, num_kv_heads: int) -> Tensor:
        """As `Past.attend`, with B = 1."""
        q, k, v = self._writer.write(qkv, angles, num_heads)
        return tile_attention(q, k, v, self._spans)


class _CacheWriter:
    """Writes the keys and values of one layer after another into a cache k, v [layers, B, S, Hkv, D]."""

    def __init__(self, k: Tensor, v: Tensor, positions: Tensor, num_visible: int):
        self._k, self._v, self._positions, self._num_visible = k, v, positions, num_visible
        self._layer = 0

    def write(self, qkv: Tensor, angles: Angles, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the rotated q [B, T, H, D] and the layer's visible k, v [B, num_visible, Hkv, D]."""
        k, v = self._k[self._layer], self._v[self._layer]
        self._layer += 1
        q = rotary_cache(qkv, *angles, k, v, self._positions, num_heads)
        return q, k[:, : self._num_visible], v[:, : self._num_visible]


def _rotate(qkv: Tensor, angles: Angles, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q [B, T, H, D] and k [B, T, Hkv, D], and v [B, T, Hkv, D]."""
    q, k = rotary(qkv, *angles, num_heads, num_kv_heads)
    return q, k, qkv.unflatten(-1, (-1, q.shape[-1]))[:, :, -num_kv_heads:]


def _causal_intervals(positions: Tensor) -> Tensor:
    """int64 [B, T, 2]: every token sees the positions from 0 to its own."""
    return torch.stack([torch.zeros_like(positions), positions + 1], -1)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention of q [B, T, H, D] to k, v [B, S, Hkv, D], causal where there is no mask [B, 1, T, S]."""
    dtype, shared = q.dtype, q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, D], [B, Hkv, S, D]
    if computes_in_fp32(q):
        q, k, v = q.float(), k.float(), v.float()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)
    return out.transpose(1, 2).to(dtype)
