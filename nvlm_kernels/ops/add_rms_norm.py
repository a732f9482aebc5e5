"""Residual add and the norm behind it, in one pass.

    s = round(x + branch)        y = rms_norm(s, weight, eps)          x, branch, s, y: [*, C]    weight: [C]

With ds and dy the gradients of both outputs, dx = dbranch = ds + rms_norm's dx for dy at s; dweight is rms_norm's.
Bound: memory, 4 tensors each way (add, then norm: 5 forward). Numerics: the sum is rounded to x.dtype before it is
normed, as the published decoders store it; the rest is `rms_norm`, whose kernels these are.
"""

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from nvlm_kernels._backend import use_triton
from nvlm_kernels.ops.rms_norm import PARTIALS, bwd_kernel, check_norm, fwd_kernel, rms_norm_ref, tile


def add_rms_norm_ref(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, rms_norm_ref(total, weight, eps)


@triton_op("nvlm::add_rms_norm", mutates_args=())
def _fwd(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, y = torch.empty_like(x), torch.empty_like(x)
    if y.numel():
        width = x.shape[-1]
        rows = x.numel() // width
        block, columns, warps = tile(width)
        wrap_triton(fwd_kernel)[(triton.cdiv(rows, block),)](
            x, branch, weight, total, y, rows, width, eps, ADD=True, ROWS=block, BLOCK_C=columns, num_warps=warps
        )
    return total, y


@triton_op("nvlm::add_rms_norm_bwd", mutates_args=())
def _bwd(total: Tensor, weight: Tensor, dy: Tensor, dtotal: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(total)
    if not dx.numel():
        return dx, torch.zeros_like(weight)
    width = total.shape[-1]
    rows = total.numel() // width
    block, columns, warps = tile(width)
    programs = min(triton.cdiv(rows, block), PARTIALS)
    dweight = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    wrap_triton(bwd_kernel)[(programs,)](
        total, weight, dy, dtotal, dx, dweight, rows, width, eps, ADD=True, ROWS=block, BLOCK_C=columns, num_warps=warps
    )
    return dx, dweight.sum(0).to(weight.dtype)


def _save(ctx, inputs, output):
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[0], weight)


def _backward(ctx, dtotal, dy):
    dx, dweight = _bwd(*ctx.saved_tensors, dy.contiguous(), dtotal.contiguous(), ctx.eps)
    return dx, dx, dweight, None


_fwd.register_autograd(_backward, setup_context=_save)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch, and its RMS norm. x, branch: [*, C], same shape and dtype; weight: [C]; returns [*, C] twice.

    Raises ValueError when shapes, dtypes or devices differ, and for eps <= 0.
    """
    if x.shape != branch.shape or x.dtype != branch.dtype or x.device != branch.device:
        raise ValueError(
            f"add_rms_norm: branch must be like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(branch.shape)} {branch.dtype} on {branch.device}"
        )
    check_norm("add_rms_norm", x, x.shape[-1] if x.dim() else 0, eps, weight=weight)
    if not use_triton(x):
        return add_rms_norm_ref(x, branch, weight, eps)
    return _fwd(x.contiguous(), branch.contiguous(), weight.contiguous(), eps)
