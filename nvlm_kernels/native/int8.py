"""The passes around an int8 matrix product on a CPU (int8.cpp): quantise the rows, scale the products.

    scale[m] = max_k |x[m, k]| / 127          q[m, k] = round(x[m, k] / scale[m])
    y[m, l] = products[m, l] * scale_x[m] * scale_w[l] + bias[l]

M rows, K input features, L output features. No gradients.
Bound: memory; one pass each, where torch makes six and four.
"""

import torch
from torch import Tensor

from nvlm_kernels.native.library import NativeLibrary

Expected = tuple[Tensor, tuple[int, ...], tuple[torch.dtype, ...]]  # a tensor, its shape, its dtypes


def _check(name: str, **tensors: Expected) -> None:
    for what, (t, shape, dtypes) in tensors.items():
        if t.shape != shape or t.dtype not in dtypes or t.device.type != "cpu" or not t.is_contiguous():
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{name}: expected {what} {kinds} {list(shape)}, contiguous on the CPU, got {t.dtype} {list(t.shape)}"
            )


def quantize_rows(library: NativeLibrary, x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each row to int8 with its own scale.

    Args:
        library: As `load_library` returns it.
        x: bf16 or fp32 [M, K], contiguous, on the CPU.

    Returns:
        int8 [M, K] within -127..127, and scales fp32 [M]. A row with an inf or a NaN is 0 with a scale of NaN.

    Raises:
        ValueError: A shape, dtype or device is wrong.
    """
    if x.dim() != 2:
        raise ValueError(f"quantize_rows: expected x [M, K], got {list(x.shape)}")
    _check("quantize_rows", x=(x, x.shape, (torch.bfloat16, torch.float32)))
    rows, cols = x.shape
    out, scale = torch.empty(rows, cols, dtype=torch.int8), torch.empty(rows)
    is_bf16 = x.dtype == torch.bfloat16
    library.dll.nvlm_quantize_rows(
        x.data_ptr(), is_bf16, rows, cols, out.data_ptr(), scale.data_ptr(), torch.get_num_threads()
    )
    return out, scale


def scale_products(
    library: NativeLibrary, products: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Writes products * scale_x * scale_w + bias into `out`. All tensors are contiguous and on the CPU.

    Args:
        library: As `load_library` returns it.
        products: int32 [M, L].
        scale_x: Scales of the activations' rows, fp32 [M].
        scale_w: Scales of the weights' rows, fp32 [L].
        bias: fp32 [L] or None.
        out: bf16 or fp32 [M, L], overwritten.

    Raises:
        ValueError: A shape, dtype or device is wrong.
    """
    if products.dim() != 2:
        raise ValueError(f"scale_products: expected products [M, L], got {list(products.shape)}")
    rows, cols = products.shape
    fp32 = (torch.float32,)
    expected: dict[str, Expected] = {
        "products": (products, (rows, cols), (torch.int32,)),
        "out": (out, (rows, cols), (torch.bfloat16, torch.float32)),
        "scale_x": (scale_x, (rows,), fp32),
        "scale_w": (scale_w, (cols,), fp32),
    }
    if bias is not None:
        expected["bias"] = bias, (cols,), fp32
    _check("scale_products", **expected)
    library.dll.nvlm_scale_products(
        products.data_ptr(),
        scale_x.data_ptr(),
        scale_w.data_ptr(),
        None if bias is None else bias.data_ptr(),
        rows,
        cols,
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
