"""NVLM-D, -X and -H in one class: tiles to image tokens, image tokens to where the layout sends them, then the decoder.

B requests, T prompt tokens, S image keys, N tiles, P image tokens a tile, C hidden_size of the decoder.
Sources: NVLM paper (arXiv 2409.11402) sections 3 and 4; the published NVLM-D code for the projector.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nvlm_kernels import pixel_shuffle_project
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.decoder import CrossView, Decoder
from nvlm_runtime.layout import Layout
from nvlm_runtime.vision import InternViT


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


class NVLMModel(nn.Module):
    def __init__(self, config: NVLMConfig):
        super().__init__()
        self.config = config
        self.vision_model = InternViT(config.vision)
        self.mlp1 = projector(config)
        self.language_model = Decoder(config.text, config.cross)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Tiles [N, 3, S, S] to features [N, 4P, vision hidden_size], one a patch, before shuffle and projector."""
        return self.vision_model(pixel_values)

    def project(self, features: Tensor) -> Tensor:
        """Features to image tokens [N, P, C]: pixel shuffle and the projector."""
        norm, first, *rest = self.mlp1
        x = pixel_shuffle_project(
            features,
            norm.weight,
            norm.bias,
            first.weight,
            version=self.config.ps_version,
            eps=norm.eps,
            gelu=bool(rest),
        )
        return rest[-1](x) if rest else x

    def embed(self, input_ids: Tensor, layouts: Sequence[Layout], image_tokens: Sequence[Tensor]) -> Tensor:
        """input_ids [B, T], padded on the right; image_tokens: [N, P, C] a row. Returns [B, T, C]."""
        x = self.language_model.embed_tokens(input_ids)
        rows = [row for row, layout in enumerate(layouts) for _ in layout.slots]
        if not rows:
            return x
        positions = [slot for layout in layouts for slot in layout.slots]
        tokens = [
            tiles[list(layout.slot_tiles)].flatten(0, 1)
            for layout, tiles in zip(layouts, image_tokens, strict=True)
            if layout.slots
        ]
        where = (torch.tensor(rows, device=x.device), torch.tensor(positions, device=x.device))
        return x.index_put(where, torch.cat(tokens).to(x.dtype))

    def cross_view(self, length: int, layouts: Sequence[Layout], image_tokens: Sequence[Tensor]) -> CrossView | None:
        """Image keys, values and intervals [B, T, 2] of a batch, or None where no row has an image to see."""
        if not any(layout.cross_length for layout in layouts):
            return None
        rows = []
        for layout, tiles in zip(layouts, image_tokens, strict=True):
            pieces = [tiles.new_zeros(0, self.config.text.hidden_size)]
            for piece in layout.cross:
                if isinstance(piece, int):
                    pieces.append(tiles[piece])
                else:
                    ids = torch.tensor(piece, device=tiles.device)
                    pieces.append(self.language_model.embed_tokens(ids))
            rows.append(torch.cat(pieces))
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, S, C]; nothing sees the padding
        intervals = embeds.new_zeros(len(rows), length, 2, dtype=torch.int64)
        for row, layout in enumerate(layouts):
            intervals[row, : len(layout.intervals)] = layout.intervals.to(embeds.device)
        return CrossView(self.language_model.cross_kv(embeds), intervals)

    def forward(self, input_ids: Tensor, layouts: Sequence[Layout], features: Sequence[Tensor]) -> Tensor:
        """Whole sequences without a cache: input_ids [B, T], a layout and tile features a row. Returns [B, T, C]."""
        image_tokens = [self.project(tiles) for tiles in features]
        x = self.embed(input_ids, layouts, image_tokens)
        view = self.cross_view(input_ids.shape[1], layouts, image_tokens)
        positions = torch.arange(input_ids.shape[1], device=x.device).expand(len(x), -1)
        return self.language_model.prefill(x, positions, None, view)
