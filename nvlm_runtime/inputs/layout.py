"""Where the image tokens of a prompt go: slots of the decoder's sequence, keys of cross-attention, and who sees what.

The three variants are one function here, led by `config.routing`. What a row sees is data, one interval
[start, end) of the image keys a row, by the rule of `nvlm_kernels.tile_mask`: in NVLM-X a tile's tag sees that tile
alone (paper section 4.3); NVLM-H has no tags in the decoder, and image slots see the images before theirs.
NVLM-H puts each regular tile's tag beside it into the keys (section 4.4); its thumbnail is in the decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvlm_kernels import tile_mask
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.inputs.image import TilePlan
from nvlm_runtime.inputs.prompt import ImageBlock


@dataclass(frozen=True)
class ImageLayout:
    """One image of a prompt. Its tiles are numbered from 0, the thumbnail last.

    span: [start, end) of its tags and slots among the decoder's positions.
    slots: decoder positions that hold image tokens, in the order of the tokens of `slot_tiles`.
    cross: what its image keys are made of, in order: tag token ids (a tuple) or a tile's number.
    keys: [start, end) of them among the keys of all images.
    place: of the first of them among those of its own prompt, which positions count: `keys[0]` but in a packed row.
    """

    num_tiles: int
    span: tuple[int, int]
    slots: tuple[int, ...]
    slot_tiles: tuple[int, ...]
    cross: tuple[tuple[int, ...] | int, ...]
    keys: tuple[int, int]
    place: int

    @property
    def places(self) -> Tensor:
        """int64 [S], of all its keys."""
        start, end = self.keys
        return torch.arange(self.place, self.place + end - start)


@dataclass(frozen=True)
class Layout:
    """One prompt's images, in order. intervals: int64 [T, 2], what each row sees of the image keys."""

    images: tuple[ImageLayout, ...]
    intervals: Tensor

    @property
    def cross_length(self) -> int:
        return self.images[-1].keys[1] if self.images else 0

    @property
    def after(self) -> tuple[int, int]:
        """What a token generated later sees."""
        return 0, self.cross_length


def cross_pieces(
    config: NVLMConfig, num_tiles: int, tags: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...] | int, ...]:
    """What the image keys of one image are made of, as in `ImageLayout.cross`."""
    routing, pieces = config.routing, []
    for tile in range(num_tiles):
        is_thumbnail = tile == num_tiles - 1
        if routing.cross == "none" or (routing.cross == "regular" and is_thumbnail):
            continue
        if routing.tags == "cross" and tags[tile]:
            pieces.append(tuple(tags[tile]))
        pieces.append(tile)
    return tuple(pieces)


def make_layout(
    config: NVLMConfig,
    length: int,
    blocks: Sequence[ImageBlock],
    plans: Sequence[TilePlan],
    tags: Sequence[Sequence[Sequence[int]]],
) -> Layout:
    """length: prompt tokens; blocks, plans: one an image; tags: token ids of every tile's tag, an image."""
    images, tag_spans, image_ends = [], [], []
    end = 0  # of the image keys so far
    for block, plan, tile_tags in zip(blocks, plans, tags, strict=True):
        start = end
        cross = cross_pieces(config, plan.num_tiles, tile_tags)
        for piece in cross:
            first, end = end, end + (config.tokens_per_tile if isinstance(piece, int) else len(piece))
            if config.routing.tags == "decoder" and isinstance(piece, int):
                tag_spans.append((*block.tiles[piece].tag, first, end))
        with_slots = [tile for tile, span in enumerate(block.tiles) if span.slots[1] > span.slots[0]]
        images.append(
            ImageLayout(
                num_tiles=plan.num_tiles,
                span=(block.start, block.end),
                slots=tuple(slot for tile in with_slots for slot in range(*block.tiles[tile].slots)),
                slot_tiles=tuple(with_slots),
                cross=cross,
                keys=(start, end),
                place=start,
            )
        )
        image_ends.append((block.end, end))
    spans = (torch.tensor(s, dtype=torch.int64).view(1, -1, w) for s, w in ((tag_spans, 4), (image_ends, 2)))
    return Layout(tuple(images), tile_mask(*spans, length)[0])
