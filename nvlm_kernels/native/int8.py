"""The passes around an int8 product on a CPU, through int8.cpp: rows to int8, products to what they stand for.

    scale[m] = max_k |x[m, k]| / 127          q[m, k] = round(x[m, k] / scale[m])
    y[m, l] = products[m, l] * scale_x[m] * scale_w[l] + bias[l]

M rows, K in features, L out features. No backward. Bound: bytes; one pass each, where torch takes six and four.
"""

import torch
from torch import Tensor

from nvlm_kernels.native.library import Native


def _check(name: str, **tensors: tuple[Tensor, tuple[int, ...], tuple[torch.dtype, ...]]) -> None:
    for what, (t, shape, dtypes) in tensors.items():
        if t.shape != shape or t.dtype not in dtypes or t.device.type != "cpu" or not t.is_contiguous():
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{name}: expected {what} {kinds} {list(shape)}, contiguous on the CPU, got {t.dtype} {list(t.shape)}"
            )


def quantize_rows(library: Native, x: Tensor) -> tuple[Tensor, Tensor]:
    """x: bf16 or fp32 [M, K], contiguous on the CPU. Returns int8 [M, K] in -127..127 and fp32 scales [M]. A row that
    holds inf or nan is 0 with a scale of nan. Raises ValueError for other shapes, dtypes and devices.
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
    library: Native, products: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Writes y into `out`, bf16 or fp32 [M, L]. products: int32 [M, L]. scale_x: fp32 [M]. scale_w, bias: fp32 [L]. All
    contiguous on the CPU. Raises ValueError for other shapes, dtypes and devices.
    """
    if products.dim() != 2:
        raise ValueError(f"scale_products: expected products [M, L], got {list(products.shape)}")
    rows, cols = products.shape
    only = (torch.float32,)
    given = {"products": (products, (rows, cols), (torch.int32,)), "out": (out, (rows, cols), (torch.bfloat16, *only))}
    given |= {"scale_x": (scale_x, (rows,), only), "scale_w": (scale_w, (cols,), only)}
    _check("scale_products", **given, **({} if bias is None else {"bias": (bias, (cols,), only)}))
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
