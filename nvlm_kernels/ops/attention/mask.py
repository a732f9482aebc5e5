"""Which image tokens each text token sees: one interval [start, end) of keys per token, never a dense matrix.

    token of the tag of tile k (every sub-token)    the keys of that tile
    other token after an image                      all keys of its document's images so far
    token before any image                          nothing: [x, x)
    token inside an image but not in a tag          the images before it

An NVLM-X prompt of two words, an image of two tiles and a thumbnail, and two words, with P = 2 keys per tile:

    What .  . . . . . .
    is   .  . . . . . .
    tag1 .  # # . . . .
    tag2 .  . . # # . .
    tagT .  . . . . # #
    here .  # # # # # #
    ?    .  # # # # # #

B rows of a batch, T tokens, S keys. A packed row holds several documents, and a document sees its own images only. A
chunk of a prompt has the intervals of the same tokens in the whole prompt: `tile_mask(...)[:, first:end]`.
Bound: launches; it is a few kilobytes of integers, so plain torch does it. It is vectorised and needs no host sync, so
it can run on the device: events are scattered to their tokens, and running maxima and sums carry them forward.
Source: NVLM paper (arXiv 2409.11402) section 4.3 for the tags. The paper leaves the other tokens open; their rule is
this project's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _scatter(index: Tensor, value: Tensor, length: int) -> Tensor:
    """Adds values [B, n] at tokens [B, n] of a new [B, length + 1]; the last entry takes what begins past the end."""
    zeros = torch.zeros(len(index), length + 1, dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(1, index.clamp(max=length), value)


def tile_mask(tags: Tensor, images: Tensor, length: int, documents: Tensor | None = None) -> Tensor:
    """Computes the intervals of tokens from the spans of tags, images and documents.

    Args:
        tags: int64 [B, n, 4], one per tile tag: (first token, end token, first key, end key). Tags do not overlap.
        images: int64 [B, m, 2], one per image, in order: (first token after the image, end of its keys).
        length: T, number of tokens per row.
        documents: int64 [B, d, 2], one per document, in order: (first token, first key). Default: one document per row.
            Spans that pad a row have `length` as their tokens.

    Returns:
        Intervals int64 [B, length, 2].

    Raises:
        ValueError: A shape or dtype is wrong.

    Source:
        NVLM paper (arXiv 2409.11402) section 4.3.
    """
    for name, spans, width in (("tags", tags, 4), ("images", images, 2), ("documents", documents, 2)):
        if spans is None:
            continue
        if spans.dim() != 3 or spans.shape[0] != tags.shape[0] or spans.shape[2] != width or spans.dtype != torch.int64:
            expected = f"int64 [{tags.shape[0]}, n, {width}]"
            raise ValueError(f"tile_mask: {name} must be {expected}, got {spans.dtype} {tuple(spans.shape)}")
    first, end, first_key, end_key = tags.unbind(-1)
    # The ends of the keys only grow along a row: of the images before a token, the last one has the largest end.
    seen = tags.new_zeros(len(tags), length + 1)
    seen = seen.scatter_reduce(1, images[..., 0].clamp(max=length), images[..., 1], "amax").cummax(1).values
    since = torch.zeros_like(seen)
    if documents is not None:
        since = since.scatter_reduce(1, documents[..., 0].clamp(max=length), documents[..., 1], "amax").cummax(1).values
    seen = seen.maximum(since)  # a document without images sees nothing: [x, x)

    def inside(value: Tensor) -> Tensor:
        """The value of the tag that a token belongs to, 0 outside tags."""
        return (_scatter(first, value, length) - _scatter(end, value, length)).cumsum(1)

    tagged = inside(torch.ones_like(first)) > 0
    intervals = torch.stack(
        [torch.where(tagged, inside(first_key), since), torch.where(tagged, inside(end_key), seen)], dim=-1
    )
    return intervals[:, :length]


def tile_mask_from_ids(input_ids: Tensor, tag_ids: Tensor, last: int, tokens_per_tile: int) -> Tensor:
    """Computes the intervals from token ids alone; the n-th tag of a row owns the keys [(n-1)P, nP).

    Ids carry no more than text does: words that spell a tag are taken for a tag. A caller who knows the spans uses
    `tile_mask`.

    Args:
        input_ids: int64 [B, T].
        tag_ids: int64 [num_tags, L], the token ids of every tag, padded with -1.
        last: Row of tag_ids that ends an image, the thumbnail's.
        tokens_per_tile: P, image tokens per tile.

    Returns:
        Intervals int64 [B, T, 2].

    Raises:
        ValueError: A shape, a dtype, `last` or `tokens_per_tile` is wrong.
    """
    for name, ids in (("input_ids", input_ids), ("tag_ids", tag_ids)):
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise ValueError(f"tile_mask_from_ids: {name} must be int64 of rank 2, got {ids.dtype} {tuple(ids.shape)}")
    if not 0 <= last < len(tag_ids):
        raise ValueError(f"tile_mask_from_ids: last must be one of {len(tag_ids)} tags, got {last}")
    if tokens_per_tile < 1:
        raise ValueError(f"tile_mask_from_ids: tokens_per_tile must be at least 1, got {tokens_per_tile}")
    length, width = input_ids.shape[1], tag_ids.shape[1]
    places = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    windows = F.pad(input_ids, (0, width), value=-2).unfold(1, width, 1)[:, :length]  # [B, T, L]
    hits = ((windows[:, :, None] == tag_ids) | (tag_ids < 0)).all(-1)  # [B, T, num_tags]
    begins = hits.any(-1)
    ends = places + (hits * (tag_ids >= 0).sum(-1)).amax(-1)  # the end of the longest tag that begins here
    number = begins.cumsum(1)
    first_key, end_key = (number - 1) * tokens_per_tile, number * tokens_per_tile
    first, end = (torch.where(begins, place, length) for place in (places, ends))  # no tag: past the last token
    tags = torch.stack([first, end, first_key, end_key], dim=-1)
    images = torch.stack([torch.where(hits[..., last], ends, length), end_key], dim=-1)
    return tile_mask(tags, images, length)


def to_dense(intervals: Tensor, num_keys: int) -> Tensor:
    """Converts intervals to a dense mask, for tests and drawings.

    Args:
        intervals: Integers [..., 2].
        num_keys: S, number of keys.

    Returns:
        bool [..., S], True where a token sees a key.
    """
    keys = torch.arange(num_keys, device=intervals.device)
    return (keys >= intervals[..., :1]) & (keys < intervals[..., 1:])


def draw_tile_mask(intervals: Tensor, num_keys: int, tokens_per_tile: int, labels: list[str] | None = None) -> str:
    """Draws intervals as text: one line per token and one column per tile.

    Args:
        intervals: Integers [T, 2] of one row.
        num_keys: S, number of keys.
        tokens_per_tile: P, keys per tile.
        labels: One label per token. Default: the token's index.

    Returns:
        Lines of '#' (the token sees the whole tile), '+' (a part of it) and '.' (none of it).
    """
    dense = to_dense(intervals, num_keys).float()
    columns = [tile.mean(-1) for tile in dense.split(tokens_per_tile, dim=-1)] if num_keys else []
    labels = [str(i) for i in range(len(dense))] if labels is None else labels
    width = max(map(len, labels), default=0)
    return "\n".join(
        f"{label:<{width}} " + " ".join("#" if c[row] == 1 else "+" if c[row] > 0 else "." for c in columns)
        for row, label in enumerate(labels)
    )
