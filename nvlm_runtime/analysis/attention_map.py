"""Attention maps: how much attention each image token receives while a model chooses the tokens of its answer.

The weights are softmax weights, averaged over heads and layers. Two distributions are kept apart: one over the image
tokens that cross-attention reads (all tiles of NVLM-X, the regular tiles of NVLM-H), one over the image tokens in the
decoder's sequence (all tiles of NVLM-D, the thumbnail of NVLM-H). The keys of NVLM-H's tile tags and of the text are
left out. An attention map shows where a layer reads; it does not explain an answer.

N tiles, S image tokens along a tile's side, T answer tokens, C hidden_size, H heads, Hkv kv heads, D head_dim.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nvlm_kernels import pixel_shuffle, rotary
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.inputs.image import TilePlan
from nvlm_runtime.inputs.layout import ImageLayout
from nvlm_runtime.model.cross import GatedCrossAttention
from nvlm_runtime.model.decoder import Decoder, DecoderLayer, SelfAttention


@dataclass(frozen=True)
class ImageAttention:
    """The attention that one image receives.

    Attributes:
        plan: How the image is cut into tiles.
        weights: fp32 [T, N, S, S], each answer token's weights of the image tokens, row by row within a tile. The
            thumbnail is the last tile.
    """

    plan: TilePlan
    weights: Tensor


@dataclass(frozen=True)
class AttentionMap:
    """The attention that all images of a request receive.

    For every answer token, the weights of the tiles in the decoder sum to 1 over all images, and so do the weights of
    the tiles that cross-attention reads.

    Attributes:
        images: One entry per image.
        in_decoder: Per image [N], whether a tile's image tokens are in the decoder's sequence.
        decoder_share: fp32 [T], the part of the decoder's self-attention that image tokens receive. The text receives
            the rest.
        gates: Per gated layer, tanh of the attention's gate and of the feed-forward's gate (None without one).
    """

    images: tuple[ImageAttention, ...]
    in_decoder: tuple[tuple[bool, ...], ...]
    decoder_share: Tensor
    gates: dict[int, tuple[float, float | None]]


@torch.inference_mode()
def attention_map(model: NVLM, input_ids: Sequence[int], images: Sequence[Any], first: int) -> AttentionMap:
    """Measures the attention at the moments when the tokens from `first` on are chosen, with one full forward.

    Args:
        model: The model, in one process.
        input_ids: Token ids of the prompt and the answer.
        images: The prompt's images, at least one; whatever `NVLM.prepare` accepts.
        first: Index of the first answer token, from 1 to len(input_ids) - 1.

    Returns:
        The attention map of the tokens input_ids[first:].

    Raises:
        ValueError: No image is given, `first` is out of range, or the model is split over ranks.
    """
    if model.model.group.size > 1:
        raise ValueError("an attention map needs the whole model in one process, this one is split over ranks")
    if not images:
        raise ValueError("an attention map needs an image")
    if not 1 <= first < len(input_ids):
        raise ValueError(f"first must be from 1 to {len(input_ids) - 1}, the last token, got {first}")
    prepared = model.prepare(input_ids=input_ids, images=images)
    decoder = model.model.language_model
    with _recorded(decoder, slice(first - 1, len(input_ids) - 1)) as recorded:
        model.logits(input_ids, images)
    own = torch.stack(recorded["self"]).mean(0)
    crossed = torch.stack(recorded["cross"]).mean(0) if recorded["cross"] else None
    places = _places(model.config)
    layouts = prepared.layout.images
    in_decoder = tuple(tuple(tile in image.placeholder_tiles for tile in range(image.num_tiles)) for image in layouts)
    weights = torch.cat([_tile_weights(image, places, crossed, own) for image in layouts], dim=1)
    held = torch.tensor([tile for tiles in in_decoder for tile in tiles])
    decoder_share = weights[:, held].sum((1, 2))
    for part in (held, ~held):
        weights[:, part] /= weights[:, part].sum((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    side = round(len(places) ** 0.5)
    parts = weights.unflatten(-1, (side, side)).split([len(tiles) for tiles in in_decoder], dim=1)
    per_image = tuple(ImageAttention(plan, part) for plan, part in zip(prepared.plans, parts, strict=True))
    return AttentionMap(per_image, in_decoder, decoder_share, gates_of(decoder))


def gates_of(decoder: Decoder) -> dict[int, tuple[float, float | None]]:
    """Reads the gates of a decoder.

    Args:
        decoder: Any decoder; one without gated layers gives {}.

    Returns:
        Per gated layer, the factors of the attention's output and of the feed-forward's output (None without one).
    """
    found = {}
    for i in decoder.cross_layers:
        cross = cast(GatedCrossAttention, cast(DecoderLayer, decoder.layers[i]).cross_attn)
        ffn_gate = None if cross.ffn == "none" else torch.tanh(cross.ffn_gate.float()).item()
        found[i] = torch.tanh(cross.gate.float()).item(), ffn_gate
    return found


def _tile_weights(image: ImageLayout, places: Tensor, crossed: Tensor | None, own: Tensor) -> Tensor:
    """Collects one image's weights, fp32 [T, N, S * S], from the recorded ones of image keys and of text positions."""
    size = len(places)
    weights = torch.zeros(len(own), image.num_tiles, size)
    start = image.keys[0]
    for piece in image.key_sources:
        if isinstance(piece, int):
            assert crossed is not None
            weights[:, piece, places] = crossed[:, start : start + size]
        start += size if isinstance(piece, int) else len(piece)
    for number, tile in enumerate(image.placeholder_tiles):
        weights[:, tile, places] = own[:, list(image.placeholders[number * size : (number + 1) * size])]
    return weights


@contextmanager
def _recorded(decoder: Decoder, rows: slice) -> Iterator[dict[str, list[Tensor]]]:
    """Records every layer's weights of the tokens in `rows`, averaged over heads: [R, S] of image keys, [R, T] of text.

    The hooks recompute q and k from each attention's inputs; the forward itself is unchanged.
    """
    recorded: dict[str, list[Tensor]] = {"cross": [], "self": []}

    def cross(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, GatedCrossAttention)
        x, branch, k, _, intervals = inputs
        q = module.q_proj(module.norm.join(x, branch)[1][:, rows]).unflatten(-1, (-1, module.head_dim))
        keys, (start, end) = torch.arange(k.shape[1], device=k.device), intervals[0, rows].unbind(-1)
        recorded["cross"].append(_weights(q, k, (keys >= start[:, None]) & (keys < end[:, None])))

    def own(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, SelfAttention)
        x, (cos, sin), _ = inputs
        q, k = rotary(module._qkv(x), cos, sin, module.num_heads, module.num_kv_heads)
        positions = torch.arange(x.shape[1], device=x.device)
        recorded["self"].append(_weights(q[:, rows], k, positions <= positions[rows, None]))

    with ExitStack() as stack:
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            if layer.cross_attn is not None:
                stack.callback(layer.cross_attn.register_forward_pre_hook(cross).remove)
            stack.callback(layer.self_attn.register_forward_pre_hook(own).remove)
        yield recorded


def _weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q: [1, R, H, D]; k: [1, S, Hkv, D]; mask: bool [R, S], a row may be all False. Returns fp32 [R, S] on the CPU."""
    q, k = (
        q[0].float().transpose(0, 1),
        k[0].float().repeat_interleave(q.shape[2] // k.shape[2], dim=1).permute(1, 2, 0),
    )
    scores = (q @ k * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0).mean(0).cpu()


def _places(config: NVLMConfig) -> Tensor:
    """int64 [S * S]: the place in its tile, row by row, of each image token. Pixel shuffle "v1" orders by columns."""
    side = round(config.vision.num_patches**0.5)
    patches = torch.arange(side * side).view(1, -1, 1)
    first = pixel_shuffle(patches, config.ps_version)[0, :, 0]
    return first // side // 2 * (side // 2) + first % side // 2
