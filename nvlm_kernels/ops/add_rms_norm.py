"""Residual add and the norm behind it, in one pass.

    s = round(x + branch)        y = rms_norm(s, weight, eps)          x, branch, s, y: [*, C]    weight: [C]

With ds and dy the gradients of both outputs, dx = dbranch = ds + rms_norm's dx for dy at s; dweight is rms_norm's.
Bound: memory, 4 tensors each way (add, then norm: 5 forward). Numerics: the sum is rounded to x.dtype before it is
normed, as the published decoders store it; the rest is `rms_norm`, whose kernels these are.
"""

from torch import Tensor

from nvlm_kernels._backend import triton_op, use_triton
from nvlm_kernels.ops.rms_norm import check_norm, launch_bwd, launch_fwd, rms_norm_ref


def add_rms_norm_ref(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, rms_norm_ref(total, weight, eps)


@triton_op("nvlm::add_rms_norm", mutates_args=())
def _fwd(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return launch_fwd(x, branch, weight, eps)


@triton_op("nvlm::add_rms_norm_bwd", mutates_args=())
def _bwd(total: Tensor, weight: Tensor, dy: Tensor, dtotal: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return launch_bwd(total, weight, dy, dtotal, eps)


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
