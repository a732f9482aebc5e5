"""Flops of a training step, as the field counts them to say what share of a machine's peak a run reaches.

A product counts once on the way forward, once more for its input's gradient and once for its weight's where that
learns; a frozen vision encoder counts once. Attention is counted over what a token sees. Left out: padding, activations
that are made again, everything elementwise.
Source: PaLM (arXiv 2204.02311) appendix B, "model FLOPs utilization".
"""

from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.parts import PROJECTOR, VISION, part_of
from nvlm_runtime.training.documents import IGNORE
from nvlm_runtime.training.packing import PackedBatch

NO_PRODUCT = ("embed_tokens.", "class_embedding", "position_embedding")  # looked up or added


def step_flops(model: NVLMModel, batch: PackedBatch) -> int:
    """Counts the operations of one micro-batch, forward and backward.

    Args:
        model: of a group a rank's own share.
        batch: the micro-batch.

    Returns:
        Floating-point operations, a multiplication with an addition as two.
    """
    return linear_flops(model, batch) + attention_flops(model, batch)


def _tiles(batch: PackedBatch) -> int:
    return sum(len(tiles) for tiles in batch.pixel_values)


def _encoded(model: NVLMModel, batch: PackedBatch) -> int:
    """Tiles that this rank encodes."""
    return -(-_tiles(batch) // model.vision_model.tile_group.size)


def vision_learns(model: NVLMModel) -> bool:
    """Returns whether any weight of the vision encoder requires a gradient.

    Args:
        model: the model.
    """
    return any(parameter.requires_grad for parameter in model.vision_model.parameters())


def linear_flops(model: NVLMModel, batch: PackedBatch) -> int:
    """Counts the operations of products with weights, forward and backward.

    Args:
        model: of a group a rank's own share.
        batch: the micro-batch.

    Returns:
        Floating-point operations.
    """
    vision, tiles = model.config.vision, _encoded(model, batch)
    keys = sum(layout.cross_length for layout in batch.layouts)
    rows = {  # how many vectors are multiplied with a weight of these names
        "patch_embedding": tiles * vision.num_patches,
        VISION: tiles * (vision.num_patches + 1),
        PROJECTOR: _tiles(batch) * model.config.tokens_per_tile,
        "cross_attn.k_proj": keys,
        "cross_attn.v_proj": keys,
        "lm_head": int((batch.labels != IGNORE).sum()),
        "": batch.num_tokens,
    }
    learns, found = vision_learns(model), 0
    parameters = dict(model.named_parameters())
    if model.config.text.tie_word_embeddings:
        parameters["lm_head.weight"] = parameters["language_model.embed_tokens.weight"]
    for name, parameter in parameters.items():
        if parameter.dim() < 2 or any(part in name for part in NO_PRODUCT):
            continue
        num = next(num for part, num in rows.items() if part in name)
        passes = 2 + parameter.requires_grad
        if part_of(name) == "vision":
            passes = 1 if not learns else passes - ("patch_embedding" in name)  # pixels need no gradient
        found += 2 * num * parameter.numel() * passes
    return found


def attention_flops(model: NVLMModel, batch: PackedBatch) -> int:
    """Counts the operations of attention: queries with keys and weights with values, forward and backward.

    Args:
        model: of a group a rank's own share.
        batch: the micro-batch.

    Returns:
        Floating-point operations of the vision encoder, of the decoder's self-attention, and of cross-attention.
    """
    vision, text, cross = model.shard.vision, model.shard.text, model.config.cross
    vision_width = vision.num_attention_heads * vision.head_dim
    vision_encoder = (
        _encoded(model, batch) * 4 * (vision.num_patches + 1) ** 2 * vision_width * vision.num_hidden_layers
    )
    width = text.num_attention_heads * text.head_dim
    seen = sum((end - start) * (end - start + 1) // 2 for row in batch.documents for start, end in row)
    decoder = 4 * seen * width * text.num_hidden_layers
    if cross is not None:
        image_keys = sum(int((layout.intervals[:, 1] - layout.intervals[:, 0]).sum()) for layout in batch.layouts)
        decoder += 4 * image_keys * width * len(cross.layers)
    return vision_encoder * (3 if vision_learns(model) else 1) + 3 * decoder
