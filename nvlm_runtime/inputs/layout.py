"""Where the image tokens of a sequence go. Every layout, of a request or of training, is made in this file.

An image token is placed in the decoder's sequence, among the keys of cross-attention, or both. The three variants share
one function that reads `config.routing`. What a token sees of the image keys is one interval [start, end), by the rule
of `nvlm_kernels.tile_mask`. In NVLM-X a tile's tag sees the keys of that tile alone. In NVLM-H the tag of each regular
tile stands before the tile's tokens among the keys, and the thumbnail goes into the decoder's sequence.

P is `config.tokens_per_tile`, T the tokens of a sequence, S the image keys.
Source: NVLM paper (arXiv 2409.11402) sections 4.3 and 4.4.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nvlm_kernels import tile_mask
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.inputs.image import TilePlan, grids
from nvlm_runtime.inputs.prompt import Prompt, grid_tags, tag_ids
from nvlm_runtime.inputs.tokenizer import Tokenizer

KeySource = tuple[int, ...] | int  # tag token ids, or a tile's number


@dataclass(frozen=True)
class ImageLayout:
    """One image of a sequence. Its tiles are numbered from 0, the thumbnail last.

    Attributes:
        num_tiles: number of tiles, the thumbnail included.
        span: [start, end) of its tags and placeholders in the decoder's sequence.
        placeholders: positions of its image placeholders in the decoder's sequence, tile after tile.
        placeholder_tiles: tiles that have placeholders, in the order of `placeholders`.
        key_sources: what its image keys are computed from, in order: tag token ids (a tuple, one key per token) or a
            tile's number (P keys).
        keys: [start, end) of its keys among the keys of all images of the sequence.
        first_key_position: position of its first key, for position embeddings. It counts from the first image of the
            prompt, so in a packed sequence it differs from `keys[0]`.
    """

    num_tiles: int
    span: tuple[int, int]
    placeholders: tuple[int, ...]
    placeholder_tiles: tuple[int, ...]
    key_sources: tuple[KeySource, ...]
    keys: tuple[int, int]
    first_key_position: int

    @property
    def key_positions(self) -> Tensor:
        """Positions of its keys, int64 [S]."""
        start, end = self.keys
        return torch.arange(self.first_key_position, self.first_key_position + end - start)


@dataclass(frozen=True)
class Layout:
    """All images of one sequence, in order.

    Attributes:
        images: one layout per image.
        intervals: int64 [T, 2], the interval of image keys that each token sees.
    """

    images: tuple[ImageLayout, ...]
    intervals: Tensor

    @property
    def cross_length(self) -> int:
        """Number of image keys of all images."""
        return self.images[-1].keys[1] if self.images else 0

    @property
    def after(self) -> tuple[int, int]:
        """The interval of image keys that a generated token sees."""
        return 0, self.cross_length

    def truncate(self, length: int) -> "Layout":
        """Keeps the first tokens of a sequence.

        Args:
            length: number of tokens to keep. They must hold every image.

        Returns:
            A layout with intervals [length, 2] and the same images.
        """
        return replace(self, intervals=self.intervals[:length])


def key_sources(config: NVLMConfig, tags: Sequence[Sequence[int]]) -> tuple[KeySource, ...]:
    """Lists what the keys of one image are computed from, as in `ImageLayout.key_sources`.

    Args:
        config: the model's configuration.
        tags: token ids of each tile's tag, thumbnail last. Ignored unless the tags are keys (NVLM-H).
    """
    sources: list[KeySource] = []
    for tile in _key_tiles(config, len(tags)):
        if config.routing.tags == "cross" and tags[tile]:
            sources.append(tuple(tags[tile]))
        sources.append(tile)
    return tuple(sources)


def num_image_keys(config: NVLMConfig, tag_lengths: Sequence[int]) -> int:
    """Returns the number of image keys of one image; 0 in NVLM-D.

    Args:
        config: the model's configuration.
        tag_lengths: tokens of each tile's tag, thumbnail last. Only their number matters unless the tags are keys
            (NVLM-H).
    """
    tiles = _key_tiles(config, len(tag_lengths))
    num_tag_keys = sum(tag_lengths[tile] for tile in tiles) if config.routing.tags == "cross" else 0
    return len(tiles) * config.tokens_per_tile + num_tag_keys


def max_image_keys(tokenizer: Tokenizer, config: NVLMConfig) -> int:
    """Computes the largest `num_image_keys` of all grids that the model cuts images by.

    Args:
        tokenizer: the model's tokenizer, for the lengths of the tags.
        config: the model's configuration.

    Returns:
        Number of image keys; 0 in NVLM-D.
    """
    tags = [
        grid_tags(*grid, config.tile_tags, config.thumbnail_tag) for grid in grids(config.min_tiles, config.max_tiles)
    ]
    return max(num_image_keys(config, [len(tokenizer.encode(tag)) for tag in each]) for each in tags)


def image_layout(tokenizer: Tokenizer, config: NVLMConfig, plan: TilePlan) -> ImageLayout:
    """Lays out one image outside any sequence: it has keys, counted from 0, and no placeholders.

    Args:
        tokenizer: the model's tokenizer, for the tags.
        config: the model's configuration.
        plan: how the image is cut.

    Returns:
        The layout, with an empty span.
    """
    sources = key_sources(config, _key_tags(tokenizer, config, plan))
    return ImageLayout(plan.num_tiles, (0, 0), (), (), sources, (0, _num_keys(config, sources)), 0)


def unseen_image(config: NVLMConfig) -> ImageLayout:
    """Lays out an image of one tile that no token sees: no interval reaches its keys and it has no placeholders.

    Its tile's tokens are keys wherever the variant has image keys, those of NVLM-H included.

    Args:
        config: the model's configuration.

    Returns:
        The layout, with an empty span.
    """
    sources: tuple[KeySource, ...] = () if config.routing.cross == "none" else (0,)
    return ImageLayout(1, (0, 0), (), (), sources, (0, _num_keys(config, sources)), 0)


def layout_prompt(tokenizer: Tokenizer, config: NVLMConfig, prompt: Prompt, plans: Sequence[TilePlan]) -> Layout:
    """Lays out the images of a prompt.

    Args:
        tokenizer: the model's tokenizer.
        config: the model's configuration.
        prompt: token ids and one block per image, from `build_prompt` or `read_prompt`.
        plans: one plan per image, in order.
    """
    images, tag_spans, image_ends = [], [], []
    first_key = 0
    for block, plan in zip(prompt.blocks, plans, strict=True):
        sources = key_sources(config, _key_tags(tokenizer, config, plan))
        end_key = first_key
        for source in sources:
            start, end_key = end_key, end_key + _num_keys(config, [source])
            if config.routing.tags == "decoder" and isinstance(source, int):
                tag_spans.append((*block.tiles[source].tag, start, end_key))
        tiles = [tile for tile, span in enumerate(block.tiles) if span.placeholders[1] > span.placeholders[0]]
        images.append(
            ImageLayout(
                num_tiles=plan.num_tiles,
                span=(block.start, block.end),
                placeholders=tuple(position for tile in tiles for position in range(*block.tiles[tile].placeholders)),
                placeholder_tiles=tuple(tiles),
                key_sources=sources,
                keys=(first_key, end_key),
                first_key_position=first_key,
            )
        )
        image_ends.append((block.end, end_key))
        first_key = end_key
    spans = (torch.tensor(s, dtype=torch.int64).view(1, -1, w) for s, w in ((tag_spans, 4), (image_ends, 2)))
    return Layout(tuple(images), tile_mask(*spans, len(prompt.input_ids))[0])


def pack_layouts(layouts: Sequence[Layout]) -> Layout:
    """Lays sequences end to end, none of which sees the images of another.

    Placeholders, spans, keys and intervals move by the tokens and keys before them. Positions of keys stay: a
    sequence's own images are counted from 0.

    Args:
        layouts: one layout per sequence, at least one.

    Returns:
        The layout of the packed sequence.
    """
    images, intervals, start, first_key = [], [], 0, 0
    for layout in layouts:
        for image in layout.images:
            images.append(
                replace(
                    image,
                    span=(image.span[0] + start, image.span[1] + start),
                    placeholders=tuple(position + start for position in image.placeholders),
                    keys=(image.keys[0] + first_key, image.keys[1] + first_key),
                )
            )
        intervals.append(layout.intervals + first_key)
        start, first_key = start + len(layout.intervals), first_key + layout.cross_length
    return Layout(tuple(images), torch.cat(intervals))


def shuffle_tiles(config: NVLMConfig, layout: Layout, rng: random.Random) -> Layout:
    """Puts the tiles of every image of NVLM-X in a random order among the image keys; each tag still sees its tile.

    The position of a key then says nothing about its tile, so a decoder learns to use the tags.

    Args:
        config: the model's configuration.
        layout: of one sequence, its tiles in order.
        rng: source of the order.

    Returns:
        A new layout; `layout` itself in NVLM-D and NVLM-H.
    """
    if config.cross is None or config.routing.tags != "decoder":
        return layout
    size, images, intervals = config.tokens_per_tile, [], layout.intervals.clone()
    for image in layout.images:
        num_tiles, (first, end) = len(image.key_sources), image.keys
        order = rng.sample(range(num_tiles), num_tiles)
        images.append(replace(image, key_sources=tuple(image.key_sources[tile] for tile in order)))
        if num_tiles < 2:
            continue
        starts = layout.intervals[:, 0]
        is_tag = (layout.intervals[:, 1] - starts == size) & (starts >= first) & (starts < end)
        new_starts = intervals.new_tensor([first + order.index(tile) * size for tile in range(num_tiles)])
        intervals[is_tag, 0] = new_starts[(starts[is_tag] - first) // size]
        intervals[is_tag, 1] = intervals[is_tag, 0] + size
    return Layout(tuple(images), intervals)


def _key_tiles(config: NVLMConfig, num_tiles: int) -> range:
    """Tiles whose tokens are image keys. The one tile of a small image counts as its thumbnail."""
    return {"none": range(0), "regular": range(num_tiles - 1), "all": range(num_tiles)}[config.routing.cross]


def _key_tags(tokenizer: Tokenizer, config: NVLMConfig, plan: TilePlan) -> Sequence[Sequence[int]]:
    """Token ids of every tile's tag; empty where tags are no keys."""
    return tag_ids(tokenizer, plan, config) if config.routing.tags == "cross" else [()] * plan.num_tiles


def _num_keys(config: NVLMConfig, sources: Sequence[KeySource]) -> int:
    return sum(config.tokens_per_tile if isinstance(source, int) else len(source) for source in sources)
