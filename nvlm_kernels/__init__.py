"""Functions on tensors: the operations of the NVLM models. This is the public list."""

from nvlm_kernels.ops.add_rms_norm import add_rms_norm
from nvlm_kernels.ops.attention.decode import decode_attention
from nvlm_kernels.ops.attention.mask import draw_tile_mask, tile_mask, tile_mask_from_ids, to_dense
from nvlm_kernels.ops.attention.split import MAX_TOKENS as MAX_DECODE_TOKENS
from nvlm_kernels.ops.attention.tile import tile_attention
from nvlm_kernels.ops.gated_project import fold_gate, gated_project
from nvlm_kernels.ops.layer_scale_residual import layer_scale_residual, layer_scale_residual_statistics
from nvlm_kernels.ops.pixel_shuffle import pixel_shuffle
from nvlm_kernels.ops.pixel_shuffle_project import pixel_shuffle_project
from nvlm_kernels.ops.qk_norm import qk_norm, qk_norm_from_sums, qk_sum_squares
from nvlm_kernels.ops.rms_norm import rms_norm
from nvlm_kernels.ops.rotary import rotary, rotary_cache
from nvlm_kernels.ops.row_statistics import row_statistics
from nvlm_kernels.ops.swiglu import swiglu
from nvlm_kernels.ops.tanh_gated_add import tanh_gated_add

__all__ = [
    "MAX_DECODE_TOKENS",
    "add_rms_norm",
    "decode_attention",
    "draw_tile_mask",
    "fold_gate",
    "gated_project",
    "layer_scale_residual",
    "layer_scale_residual_statistics",
    "pixel_shuffle",
    "pixel_shuffle_project",
    "qk_norm",
    "qk_norm_from_sums",
    "qk_sum_squares",
    "rms_norm",
    "rotary",
    "rotary_cache",
    "row_statistics",
    "swiglu",
    "tanh_gated_add",
    "tile_attention",
    "tile_mask",
    "tile_mask_from_ids",
    "to_dense",
]
