"""NVLM-D, -X and -H in one class: tiles to image tokens, image tokens to where the layout sends them, then the decoder.

B requests, T prompt tokens, S image keys, N tiles, P image tokens a tile, C hidden_size of the decoder.
Sources: NVLM paper (arXiv 2409.11402) sections 3 and 4; the published NVLM-D code for the projector.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nvlm_kernels import pixel_shuffle, pixel_shuffle_project
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.inputs.layout import ImageLayout, Layout
from nvlm_runtime.model.adapter import AdaptedLinear
from nvlm_runtime.model.decoder import CrossView, Decoder
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.past import CausalPast, Documents, PackedPast
from nvlm_runtime.model.vision import InternViT
from nvlm_runtime.parallel.group import SOLO, Group
from nvlm_runtime.parallel.shard import VisionSplit, shard_config


def projector(config: NVLMConfig) -> nn.Sequential:
    """NVLM-D, -H: LayerNorm, Linear, exact GELU, Linear. NVLM-X: LayerNorm, Linear (paper section 4.5). No biases."""
    width, text = 4 * config.vision.hidden_size, config.text
    norm = nn.LayerNorm(width, eps=config.projector_eps)
    if config.variant == "x":
        return nn.Sequential(norm, nn.Linear(width, text.hidden_size, bias=False))
    return nn.Sequential(
        norm,
        nn.Linear(width, text.intermediate_size, bias=False),
        nn.GELU(),
        nn.Linear(text.intermediate_size, text.hidden_size, bias=False),
    )


class _Undrawn(TorchFunctionMode):
    """Leaves out what draws a module's first numbers: on the meta device that loads torch's compiler, for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.__name__ in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


class NVLMModel(nn.Module):
    """group: the ranks it is split over, of which this is one. shard: what this rank's modules are built from.

    The two-layer projector is split by its inner columns, with one all-reduce; NVLM-X's single layer, 0.2 GB at 72B, is
    held by every rank. vision_split: as `parallel` says. Raises ValueError where the group cannot share the model out.
    """

    def __init__(self, config: NVLMConfig, group: Group = SOLO, vision_split: VisionSplit = "tiles"):
        super().__init__()
        self.config, self.group = config, group
        self.shard = shard_config(config, group, vision_split)
        self.vision_model = InternViT(self.shard.vision, group)
        self.mlp1 = projector(self.shard)
        self.language_model = Decoder(self.shard.text, config.cross, group)

    @property
    def version(self) -> int:
        """Grows when a weight is changed in place, as an optimizer does: what was computed before is then stale."""
        tensors = (*self.parameters(), *self.buffers())
        return sum(0 if tensor.is_inference() else tensor._version for tensor in tensors)

    def encode(self, pixel_values: Tensor) -> Features:
        """Tiles [N, 3, S, S] to features, one a patch, before shuffle and projector."""
        return self.vision_model.features(pixel_values)

    def project(self, features: Features) -> Tensor:
        """Features to image tokens [N, P, C]: pixel shuffle and the projector."""
        norm, first, *rest = self.mlp1
        if isinstance(first, AdaptedLinear):
            return self.mlp1(pixel_shuffle(features.patches, self.config.ps_version))
        given = (features.patches, norm.weight, norm.bias)
        if rest:  # the norm is inside what is shared out
            given = tuple(map(self.group.spread, given))
        x = pixel_shuffle_project(
            *given,
            first.weight,
            version=self.config.ps_version,
            eps=norm.eps,
            gelu=bool(rest),
            statistics=features.statistics,
            recompute=self.language_model.recompute,
        )
        return self.group.reduce(rest[-1](x)) if rest else x

    def embed(self, input_ids: Tensor, layouts: Sequence[Layout], image_tokens: Sequence[Sequence[Tensor]]) -> Tensor:
        """input_ids [B, T], padded on the right; image_tokens: [N, P, C] an image, a row. Returns [B, T, C]."""
        rows: list[int] = []
        positions: list[int] = []
        tokens: list[Tensor] = []
        for row, (layout, images) in enumerate(zip(layouts, image_tokens, strict=True)):
            for image, tiles in zip(layout.images, images, strict=True):
                if image.placeholders or not image.key_sources:  # one that nobody sees has a gradient all the same
                    rows += [row] * len(image.placeholders)
                    positions += image.placeholders
                    tokens.append(tiles[list(image.placeholder_tiles)].flatten(0, 1))
        if not tokens:  # NVLM-X's text has no gradient from here then, where the embedding does not learn
            return self.language_model.embed_tokens(input_ids)
        where = (torch.tensor(side, dtype=torch.int64, device=input_ids.device) for side in (rows, positions))
        return self.language_model.embed(input_ids, *where, torch.cat(tokens))

    def key_embeds(self, image: ImageLayout, tiles: Tensor) -> Tensor:
        """The inputs [S, C] of an image's keys and values: tiles [N, P, C] and, in NVLM-H, their tags' embeddings."""
        pieces = [tiles.new_zeros(0, self.config.text.hidden_size)]
        for piece in image.key_sources:
            if isinstance(piece, int):
                pieces.append(tiles[piece])
            else:
                pieces.append(self.language_model.embed_tokens(torch.tensor(piece, device=tiles.device)))
        return torch.cat(pieces)

    def cross_view(
        self, length: int, layouts: Sequence[Layout], image_tokens: Sequence[Sequence[Tensor]]
    ) -> CrossView | None:
        """Image keys, values and intervals [B, T, 2] of a batch, or None where no row has an image to see."""
        if not any(layout.cross_length for layout in layouts):
            return None
        width = self.config.text.hidden_size
        weight = self.language_model.embed_tokens.weight
        rows = [
            torch.cat([weight.new_zeros(0, width), *map(self.key_embeds, layout.images, images)])
            for layout, images in zip(layouts, image_tokens, strict=True)
        ]
        places = [
            torch.cat([torch.zeros(0, dtype=torch.int64), *(image.key_positions for image in layout.images)])
            for layout in layouts
        ]
        # [B, S, C] and [B, S]; nothing sees the padding
        embeds, places = (nn.utils.rnn.pad_sequence(side, batch_first=True) for side in (rows, places))
        intervals = embeds.new_zeros(len(rows), length, 2, dtype=torch.int64)
        for row, layout in enumerate(layouts):
            intervals[row, : len(layout.intervals)] = layout.intervals.to(embeds.device)
        return CrossView(self.language_model.cross_kv(embeds, places.to(embeds.device)), intervals)

    def forward(
        self,
        input_ids: Tensor,
        layouts: Sequence[Layout],
        features: Sequence[Features],
        documents: Documents | None = None,
    ) -> Tensor:
        """Whole sequences without a cache: input_ids [B, T], a layout and the features of its N tiles a row.

        documents: spans of the documents packed into each row, which do not see each other; None where a row is one.
        Returns [B, T, C].
        """
        image_tokens = [
            self.project(seen).split([image.num_tiles for image in layout.images])
            for layout, seen in zip(layouts, features, strict=True)
        ]
        x = self.embed(input_ids, layouts, image_tokens)
        view = self.cross_view(input_ids.shape[1], layouts, image_tokens)
        if documents is None:
            positions = torch.arange(input_ids.shape[1], device=x.device).expand(len(x), -1)
            return self.language_model(x, positions, CausalPast(positions, self.language_model.attention), view)
        past = PackedPast(documents, input_ids.shape[1], x.device)
        return self.language_model(x, past.positions, past, view)


def outline(config: NVLMConfig, group: Group = SOLO, vision_split: VisionSplit = "tiles") -> NVLMModel:
    """A model on the meta device: names, shapes and nothing else. Raises ValueError as NVLMModel does."""
    with torch.device("meta"), _Undrawn():
        return NVLMModel(config, group, vision_split)


def allocate(model: NVLMModel, dtype: torch.dtype, device: torch.device | str) -> None:
    """Memory for an outline, in place, whatever was in it before. dtype: of parameters; buffers keep their own."""
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(tensor.shape, dtype=dtype, device=device)))
        for name, tensor in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
