"""NVLM-X's tiles in another order among the image keys, every tag still seeing its own.

The place of a key then says nothing of its tile, so a decoder learns to ask the tags.
"""

import random
from dataclasses import replace

from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.inputs.layout import Layout


def shuffle_tiles(config: NVLMConfig, layout: Layout, rng: random.Random) -> Layout:
    """The tiles of every image in an order that rng draws. NVLM-D's and -H's layouts are given back as they are."""
    if config.cross is None or config.routing.tags != "decoder":
        return layout
    size, images, intervals = config.tokens_per_tile, [], layout.intervals.clone()
    for image in layout.images:
        num, (first, end) = len(image.cross), image.keys
        order = rng.sample(range(num), num)
        images.append(replace(image, cross=tuple(image.cross[tile] for tile in order)))
        if num < 2:
            continue
        starts = layout.intervals[:, 0]
        tagged = (layout.intervals[:, 1] - starts == size) & (starts >= first) & (starts < end)
        place = intervals.new_tensor([first + order.index(tile) * size for tile in range(num)])
        intervals[tagged, 0] = place[(starts[tagged] - first) // size]
        intervals[tagged, 1] = intervals[tagged, 0] + size
    return Layout(tuple(images), intervals)
