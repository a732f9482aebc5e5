"""Who sees which image tokens: one interval [start, end) of keys per text row, never a dense matrix.

    row of tile k's tag (every sub-token)     that tile's keys
    other row behind an image                 all keys of its document's images so far
    row before any image                      [x, x): nothing
    row inside an image that is no tag        the images before it

One NVLM-X prompt of two words, a two-tile image with its thumbnail and two words, P = 2 keys a tile:

    What .  . . . . . .
    is   .  . . . . . .
    tag1 .  # # . . . .
    tag2 .  . . # # . .
    tagT .  . . . . # #
    here .  # # # # # #
    ?    .  # # # # # #

B rows of a batch, T tokens, S keys. Packed rows hold several documents, and a document sees its own images only.
A chunk of a prompt has the same intervals as the same rows of the whole: `tile_mask(...)[:, first:end]`.
Vectorised and without a host sync, so it may run on the device: events are scattered to their tokens, and running
maxima and sums carry them on. Integers of a few kilobytes: bound by launches, so it is plain torch.
Source: NVLM paper (arXiv 2409.11402) section 4.3 for the tags; the other rows are this project's rule, because the
paper leaves them open.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _scatter(index: Tensor, value: Tensor, length: int) -> Tensor:
    """[B, n] values added up at [B, n] tokens of [B, length + 1]; the last place takes what begins after the end."""
    zeros = torch.zeros(len(index), length + 1, dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(1, index.clamp(max=length), value)


def tile_mask(tags: Tensor, images: Tensor, length: int, documents: Tensor | None = None) -> Tensor:
    """Intervals [B, length, 2], int64, from spans.

    tags: [B, n, 4] of (first token, end token, first key, end key), one a tile tag, not overlapping; images: [B, m, 2]
    of (token behind the image, end of its keys), in order; documents: [B, d, 2] of (first token, first key), in order,
    one document a row where None. Rows of a batch are padded with spans whose tokens are `length`. All int64.
    Raises ValueError for another shape or dtype.
    """
    for name, spans, width in (("tags", tags, 4), ("images", images, 2), ("documents", documents, 2)):
        if spans is None:
            continue
        if spans.dim() != 3 or spans.shape[0] != tags.shape[0] or spans.shape[2] != width or spans.dtype != torch.int64:
            expected = f"int64 [{tags.shape[0]}, n, {width}]"
            raise ValueError(f"tile_mask: {name} must be {expected}, got {spans.dtype} {tuple(spans.shape)}")
    first, end, first_key, end_key = tags.unbind(-1)
    # The keys' ends only grow along a row, so the latest image behind which a token stands has the largest.
    seen = tags.new_zeros(len(tags), length + 1)
    seen = seen.scatter_reduce(1, images[..., 0].clamp(max=length), images[..., 1], "amax").cummax(1).values
    since = torch.zeros_like(seen)
    if documents is not None:
        since = since.scatter_reduce(1, documents[..., 0].clamp(max=length), documents[..., 1], "amax").cummax(1).values
    seen = seen.maximum(since)  # a document without images: nothing, [x, x)

    def inside(value: Tensor) -> Tensor:
        """The value of the tag a token belongs to, 0 outside."""
        return (_scatter(first, value, length) - _scatter(end, value, length)).cumsum(1)

    tagged = inside(torch.ones_like(first)) > 0
    intervals = torch.stack(
        [torch.where(tagged, inside(first_key), since), torch.where(tagged, inside(end_key), seen)], dim=-1
    )
    return intervals[:, :length]


def tile_mask_from_ids(input_ids: Tensor, tag_ids: Tensor, last: int, tokens_per_tile: int) -> Tensor:
    """Intervals [B, T, 2] of token ids alone, where the n-th tag of a row owns keys [(n-1)P, nP).

    input_ids: [B, T]; tag_ids: [num_tags, L], every tag's ids, short ones filled up with -1, both int64; last: the row
    of tag_ids with which an image ends, the thumbnail's; P tokens_per_tile. Ids say no more than text does: words that
    spell a tag are taken for one, so a caller who has the spans uses `tile_mask`.
    Raises ValueError for another shape, dtype or row.
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
    ends = places + (hits * (tag_ids >= 0).sum(-1)).amax(-1)  # of the longest tag that begins here
    number = begins.cumsum(1)
    first_key, end_key = (number - 1) * tokens_per_tile, number * tokens_per_tile
    first, end = (torch.where(begins, place, length) for place in (places, ends))  # no tag: behind the last token
    tags = torch.stack([first, end, first_key, end_key], dim=-1)
    images = torch.stack([torch.where(hits[..., last], ends, length), end_key], dim=-1)
    return tile_mask(tags, images, length)


def to_dense(intervals: Tensor, num_keys: int) -> Tensor:
    """bool [..., num_keys] of intervals [..., 2]: for tests and pictures."""
    keys = torch.arange(num_keys, device=intervals.device)
    return (keys >= intervals[..., :1]) & (keys < intervals[..., 1:])


def draw_tile_mask(intervals: Tensor, num_keys: int, tokens_per_tile: int, labels: list[str] | None = None) -> str:
    """A picture of one row's intervals [T, 2]: a line a token, a column a tile, '#' seen, '+' partly, '.' not."""
    dense = to_dense(intervals, num_keys).float()
    columns = [tile.mean(-1) for tile in dense.split(tokens_per_tile, dim=-1)] if num_keys else []
    labels = [str(i) for i in range(len(dense))] if labels is None else labels
    width = max(map(len, labels), default=0)
    return "\n".join(
        f"{label:<{width}} " + " ".join("#" if c[row] == 1 else "+" if c[row] > 0 else "." for c in columns)
        for row, label in enumerate(labels)
    )
