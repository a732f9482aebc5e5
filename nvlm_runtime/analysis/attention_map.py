"""What a model looked at while it chose its tokens: each image token's share of the attention, where it lies.

Softmax weights, means over heads and layers. What cross-attention reads (all tiles of NVLM-X, the regular ones of
NVLM-H) is one distribution over its image tokens, what the decoder holds (all tiles of NVLM-D, NVLM-H's thumbnail)
another; the keys of NVLM-H's tags and the text's own are left out. Attention shows where a layer read, not why.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nvlm_kernels import pixel_shuffle, rotary
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.inputs.image import TilePlan
from nvlm_runtime.model.cross import GatedCrossAttention
from nvlm_runtime.model.decoder import SelfAttention


@dataclass(frozen=True)
class ImageLook:
    """weights: fp32 [T, N, S, S], T tokens' shares of the image tokens of N tiles, the thumbnail last, row-major."""

    plan: TilePlan
    weights: Tensor


@dataclass(frozen=True)
class Look:
    """Over all images the weights of tiles in the decoder sum to 1 for every token, and so do those of tiles behind
    cross-attention. in_decoder: [N] an image, which tiles are in the decoder. decoder_share: fp32 [T], of the decoder's
    self-attention, what fell on image tokens; the rest fell on text. gates: tanh of each gated layer's, the
    feed-forward's beside it or None.
    """

    images: tuple[ImageLook, ...]
    in_decoder: tuple[tuple[bool, ...], ...]
    decoder_share: Tensor
    gates: dict[int, tuple[float, float | None]]


@torch.inference_mode()
def look(model: NVLM, input_ids: Sequence[int], images: Sequence[Any], first: int) -> Look:
    """What was looked at when each of the tokens from `first` on was chosen, by one full forward over exact ids.

    Raises ValueError without an image, for a `first` that leaves no token or has none before it, and over ranks.
    """
    if model.model.group.size > 1:
        raise ValueError("look runs in one process, the model is split over ranks")
    if not images:
        raise ValueError("look needs an image to look at")
    if not 1 <= first < len(input_ids):
        raise ValueError(f"first must be from 1 to {len(input_ids) - 1}, the last token, got {first}")
    prepared = model.prepare(input_ids=input_ids, images=images)
    decoder, rows = model.model.language_model, slice(first - 1, len(input_ids) - 1)
    with _watched(decoder, rows) as seen:
        model.logits(input_ids, images)
    crossed, own = (torch.stack(found).mean(0) if found else None for found in (seen["cross"], seen["self"]))
    config, num_tokens = model.config, len(input_ids) - first
    place = _places(config)
    parts, in_decoder = [], []
    for image in prepared.layout.images:
        weights = torch.zeros(num_tokens, image.num_tiles, len(place))
        at = image.keys[0]
        for piece in image.key_sources:
            length = len(place) if isinstance(piece, int) else len(piece)
            if isinstance(piece, int):
                weights[:, piece, place] = crossed[:, at : at + length]
            at += length
        for number, tile in enumerate(image.placeholder_tiles):
            slots = image.placeholders[number * len(place) : (number + 1) * len(place)]
            weights[:, tile, place] = own[:, list(slots)]
        parts.append(weights)
        in_decoder.append(tuple(tile in image.placeholder_tiles for tile in range(image.num_tiles)))
    weights, held = torch.cat(parts, dim=1), torch.tensor([tile for tiles in in_decoder for tile in tiles])
    decoder_share = weights[:, held].sum((1, 2))
    for group in (held, ~held):
        weights[:, group] /= weights[:, group].sum((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    side = round(len(place) ** 0.5)
    split = weights.unflatten(-1, (side, side)).split([len(tiles) for tiles in in_decoder], dim=1)
    looks = tuple(ImageLook(plan, part) for plan, part in zip(prepared.plans, split, strict=True))
    return Look(looks, tuple(in_decoder), decoder_share, gates_of(decoder))


def gates_of(decoder: nn.Module) -> dict[int, tuple[float, float | None]]:
    """By layer: what the attention's output and the feed-forward's are multiplied by."""
    found = {}
    for i in decoder.cross_layers:
        cross = decoder.layers[i].cross_attn
        ffn_gate = None if cross.ffn == "none" else torch.tanh(cross.ffn_gate.float()).item()
        found[i] = torch.tanh(cross.gate.float()).item(), ffn_gate
    return found


@contextmanager
def _watched(decoder: nn.Module, rows: slice) -> Iterator[dict[str, list[Tensor]]]:
    """While it is open, every layer's weights of `rows`, means over heads: [R, S] of image keys, [R, T] of text."""
    seen: dict[str, list[Tensor]] = {"cross": [], "self": []}

    def cross(module: GatedCrossAttention, inputs: tuple[Any, ...]) -> None:
        x, branch, k, _, intervals = inputs
        q = module.q_proj(module.norm.join(x, branch)[1][:, rows]).unflatten(-1, (-1, module.head_dim))
        keys, (start, end) = torch.arange(k.shape[1], device=k.device), intervals[0, rows].unbind(-1)
        seen["cross"].append(_weights(q, k, (keys >= start[:, None]) & (keys < end[:, None])))

    def own(module: SelfAttention, inputs: tuple[Any, ...]) -> None:
        x, angles, _ = inputs
        q, k = rotary(module._qkv(x), *angles, module.num_heads, module.num_kv_heads)
        places = torch.arange(x.shape[1], device=x.device)
        seen["self"].append(_weights(q[:, rows], k, places <= places[rows, None]))

    with ExitStack() as stack:
        for layer in decoder.layers:
            for module, hook in ((layer.cross_attn, cross), (layer.self_attn, own)):
                if module is not None:
                    stack.callback(module.register_forward_pre_hook(hook).remove)
        yield seen


def _weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q: [1, R, H, D]; k: [1, S, Hkv, D]; mask: bool [R, S]. Returns fp32 [R, S] on the CPU; a row may see none."""
    q, k = (
        q[0].float().transpose(0, 1),
        k[0].float().repeat_interleave(q.shape[2] // k.shape[2], dim=1).permute(1, 2, 0),
    )
    scores = (q @ k * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0).mean(0).cpu()


def _places(config: NVLMConfig) -> Tensor:
    """int64 [P]: where in its tile, row by row, each of a tile's image tokens lies; "v1" has them in columns."""
    side = round(config.vision.num_patches**0.5)
    patches = torch.arange(side * side).view(1, -1, 1)
    first = pixel_shuffle(patches, config.ps_version)[0, :, 0]
    return first // side // 2 * (side // 2) + first % side // 2
