"""Attention over image tokens and over the cache."""

import torch
from torch import Tensor

from bench.proofs.cases.case import Call, Case, nbytes
from nvlm_kernels.ops.attention.decode import decode_attention, decode_attention_ref
from nvlm_kernels.ops.attention.tile import tile_attention, tile_attention_ref


def _prompt(batch: int, tokens: int, tiles: int, per_tile: int) -> Tensor:
    """Intervals [B, T, 2] of a prompt: 3 rows before the image, 5 rows of tag a tile, text that sees all tiles."""
    rows = [(0, 0)] * 3 + [(i * per_tile, (i + 1) * per_tile) for i in range(tiles) for _ in range(5)]
    rows += [(0, tiles * per_tile)] * tokens
    return torch.tensor(rows[:tokens]).expand(batch, tokens, 2).contiguous()


def _qkv(dtype, device, batch, tokens, keys, heads, kv_heads, head_dim, grad) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (batch, tokens, heads, head_dim), *[(batch, keys, kv_heads, head_dim)] * 2
    return tuple(torch.randn(s, dtype=dtype, device=device, requires_grad=grad) for s in shapes)


def _prefill(dtype, device, batch, tokens, tiles, per_tile, heads, kv_heads, head_dim) -> Call:
    q, k, v = _qkv(dtype, device, batch, tokens, tiles * per_tile, heads, kv_heads, head_dim, True)
    intervals = _prompt(batch, tokens, tiles, per_tile)
    pairs = int((intervals[..., 1] - intervals[..., 0]).sum()) * heads
    return Call(
        tile_attention,
        tile_attention_ref,
        (q, k, v, intervals.to(device)),
        forward_bytes=nbytes(q, q, k, v, intervals),
        backward_bytes=4 * nbytes(q) + 2 * nbytes(k, v) + nbytes(intervals),  # q out dout dq, k v dk dv
        forward_flops=4 * pairs * head_dim,
        backward_flops=10 * pairs * head_dim,
    )


def _decode(dtype, device, batch, tokens, tiles, per_tile, heads, kv_heads, head_dim) -> Call:
    keys = tiles * per_tile
    q, k, v = _qkv(dtype, device, batch, tokens, keys, heads, kv_heads, head_dim, False)
    intervals = torch.tensor([0, keys], device=device).expand(batch, tokens, 2).contiguous()
    return Call(
        tile_attention,
        tile_attention_ref,
        (q, k, v, intervals),
        forward_bytes=nbytes(q, q, k, v, intervals),
        forward_flops=4 * batch * tokens * keys * heads * head_dim,
    )


def _cache(dtype, device, batch, tokens, slots, length, heads, kv_heads, head_dim) -> Call:
    q, k, v = _qkv(dtype, device, batch, tokens, slots, heads, kv_heads, head_dim, False)
    lengths = torch.full((batch,), length, device=device)
    return Call(
        decode_attention,
        decode_attention_ref,
        (q, k, v, lengths),
        forward_bytes=nbytes(q, q, lengths) + nbytes(k, v) * length // slots,
        forward_flops=4 * batch * tokens * length * heads * head_dim,
    )


_72B = dict(heads=64, kv_heads=8, head_dim=128)
_SMALL = dict(heads=16, kv_heads=2, head_dim=128)

CASES: tuple[Case, ...] = (
    Case(
        "tile_attention",
        "prefill",
        "matmul",
        _prefill,
        dict(batch=1, tokens=1024, tiles=7, per_tile=256, **_72B),
        dict(batch=1, tokens=32, tiles=3, per_tile=64, **_SMALL),
    ),
    Case(
        "tile_attention",
        "decode",
        "matmul",
        _decode,
        dict(batch=1, tokens=1, tiles=7, per_tile=256, **_72B),
        dict(batch=1, tokens=1, tiles=4, per_tile=64, **_SMALL),
    ),
    Case(
        "decode_attention",
        "step",
        "matmul",
        _cache,
        dict(batch=1, tokens=1, slots=4096, length=2048, **_72B),
        dict(batch=1, tokens=1, slots=256, length=128, **_SMALL),
    ),
)
