"""C++ for CPUs: a decode step, attention, and the passes around int8 products.

The compiler of the machine builds the library when it is first needed.
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
    NativeCache,
    NativeLayer,
    NativeLibrary,
    NativeMatrix,
    NativeModel,
    NativeStep,
    default_folder,
    is_available,
    load_library,
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
    "NativeCache",
    "NativeLayer",
    "NativeLibrary",
    "NativeMatrix",
    "NativeModel",
    "NativeStep",
    "default_folder",
    "is_available",
    "load_library",
    "native_attention",
    "quantize_rows",
    "scale_products",
]
