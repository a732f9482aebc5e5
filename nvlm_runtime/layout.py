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
from nvlm_runtime.image import TilePlan
from nvlm_runtime.prompt import ImageBlock


@dataclass(frozen=True)
class Layout:
    """One prompt's image tokens. Tiles are numbered over all its images, in order, thumbnails last in their image.

    slots: decoder positions that hold image tokens, in the order of `slot_tiles`' tokens.
    cross: what the image keys are made of, in order: tag token ids (a tuple) or a tile's number.
    intervals: int64 [T, 2], what each row sees; `after` is what a token generated later sees.
    """

    slots: tuple[int, ...]
    slot_tiles: tuple[int, ...]
    cross: tuple[tuple[int, ...] | int, ...]
    cross_length: int
    intervals: Tensor

    @property
    def after(self) -> tuple[int, int]:
        return 0, self.cross_length


def make_layout(
    config: NVLMConfig,
    length: int,
    blocks: Sequence[ImageBlock],
    plans: Sequence[TilePlan],
    tags: Sequence[Sequence[Sequence[int]]],
) -> Layout:
    """length: prompt tokens; blocks, plans: one an image; tags: token ids of every tile's tag, an image."""
    routing = config.routing
    slots, slot_tiles, cross, tag_spans, image_ends = [], [], [], [], []
    first, end = 0, 0  # the image's first tile, and the image keys so far
    for block, plan, tile_tags in zip(blocks, plans, tags, strict=True):
        for index, span in enumerate(block.tiles):
            slots.extend(range(*span.slots))
            if span.slots[1] > span.slots[0]:
                slot_tiles.append(first + index)
            is_thumbnail = index == plan.num_tiles - 1
            if routing.cross == "none" or (routing.cross == "regular" and is_thumbnail):
                continue
            if routing.tags == "cross" and tile_tags[index]:
                cross.append(tuple(tile_tags[index]))
                end += len(tile_tags[index])
            cross.append(first + index)
            if routing.tags == "decoder":
                tag_spans.append((*span.tag, end, end + config.tokens_per_tile))
            end += config.tokens_per_tile
        image_ends.append((block.end, end))
        first += plan.num_tiles
    spans = (torch.tensor(s, dtype=torch.int64).view(1, -1, w) for s, w in ((tag_spans, 4), (image_ends, 2)))
    intervals = tile_mask(*spans, length)[0]
    return Layout(tuple(slots), tuple(slot_tiles), tuple(cross), end, intervals)
