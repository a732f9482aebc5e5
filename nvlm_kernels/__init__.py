"""Functions on tensors: the operations of the NVLM models. This is the public list."""

from nvlm_kernels.ops.pixel_shuffle import pixel_shuffle
from nvlm_kernels.ops.rms_norm import rms_norm
from nvlm_kernels.ops.tanh_gated_add import tanh_gated_add
from nvlm_kernels.ops.tile_attention import tile_attention

__all__ = ["pixel_shuffle", "rms_norm", "tanh_gated_add", "tile_attention"]
