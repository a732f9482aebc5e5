"""What a CPU runs in C++: the decoding step, attention, the passes around int8 products. Built by the machine's own
compiler when it is first asked for.
"""

from nvlm_kernels.native.attention import MAX_HEAD_DIM, native_attention
from nvlm_kernels.native.int8 import quantize_rows, scale_products
from nvlm_kernels.native.library import (
    BLOCK,
    GROUP,
    KIND_BF16,
    KIND_F32,
    KIND_INT4,
    KIND_INT8,
    BuildError,
    Cache,
    Layer,
    Matrix,
    Model,
    Native,
    Step,
    default_folder,
    is_default,
    library,
)

__all__ = [
    "BLOCK",
    "GROUP",
    "KIND_BF16",
    "KIND_F32",
    "KIND_INT4",
    "KIND_INT8",
    "MAX_HEAD_DIM",
    "BuildError",
    "Cache",
    "Layer",
    "Matrix",
    "Model",
    "Native",
    "Step",
    "default_folder",
    "is_default",
    "library",
    "native_attention",
    "quantize_rows",
    "scale_products",
]
