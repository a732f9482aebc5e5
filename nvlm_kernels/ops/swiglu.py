"""The gated activation of a feed-forward layer.

    y = silu(gate) * up        silu(g) = g * sigmoid(g)            gate_up: [*, 2I], gate first    y: [*, I]

With dy the gradient of y and s = sigmoid(gate):

    dgate = dy * up * s * (1 + gate * (1 - s))        dup = dy * gate * s

gate and up are read in place from the fused projection, and their gradients are one [*, 2I] tensor for it. Bound:
memory, 3 * rows * I elements forward, 5 backward. Numerics: fp32 inside, one rounding at the store.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nvlm_kernels._backend import triton_op, use_triton

BLOCK = 2048  # 8 elements a lane, a 16-byte load in bf16, with 4 warps of 64 lanes (AMD) and of 32 alike


def swiglu_ref(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _fwd_kernel(gate_up_ptr, y_ptr, rows, width, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    num_columns = tl.cdiv(width, BLOCK_I)
    pid = tl.program_id(0)
    row = (pid // num_columns).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = pid % num_columns * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (row < rows)[:, None] & (cols < width)[None, :]
    gate_ptr = gate_up_ptr + row[:, None] * (2 * width) + cols[None, :]
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row[:, None] * width + cols[None, :], gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _bwd_kernel(gate_up_ptr, dy_ptr, dgate_up_ptr, rows, width, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    num_columns = tl.cdiv(width, BLOCK_I)
    pid = tl.program_id(0)
    row = (pid // num_columns).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = pid % num_columns * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (row < rows)[:, None] & (cols < width)[None, :]
    offs = row[:, None] * (2 * width) + cols[None, :]
    gate = tl.load(gate_up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offs + width, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row[:, None] * width + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(dgate_up_ptr + offs, dy * up * s * (1 + gate * (1 - s)), mask=mask)
    tl.store(dgate_up_ptr + offs + width, dy * gate * s, mask=mask)


def _tile(width: int) -> tuple[int, int]:
    columns = min(triton.next_power_of_2(width), BLOCK)
    return BLOCK // columns, columns


@triton_op("nvlm::swiglu", mutates_args=())
def _fwd(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    if y.numel():
        rows = y.numel() // width
        block, columns = _tile(width)
        grid = (triton.cdiv(rows, block) * triton.cdiv(width, columns),)
        wrap_triton(_fwd_kernel)[grid](gate_up, y, rows, width, BLOCK_R=block, BLOCK_I=columns)
    return y


@triton_op("nvlm::swiglu_bwd", mutates_args=())
def _bwd(gate_up: Tensor, dy: Tensor) -> Tensor:
    dgate_up = torch.empty_like(gate_up)
    if dy.numel():
        width = dy.shape[-1]
        rows = dy.numel() // width
        block, columns = _tile(width)
        grid = (triton.cdiv(rows, block) * triton.cdiv(width, columns),)
        wrap_triton(_bwd_kernel)[grid](gate_up, dy, dgate_up, rows, width, BLOCK_R=block, BLOCK_I=columns)
    return dgate_up


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _bwd(*ctx.saved_tensors, dy.contiguous())


_fwd.register_autograd(_backward, setup_context=_save)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [*, 2I], gate before up; returns [*, I].

    Raises ValueError for an odd width or a dtype that is not floating.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 or not gate_up.is_floating_point():
        raise ValueError(f"swiglu: gate_up must be floating [*, 2I], got {gate_up.dtype} {tuple(gate_up.shape)}")
    if not use_triton(gate_up):
        return swiglu_ref(gate_up)
    if gate_up.dtype == torch.float64:
        raise ValueError("swiglu: gate_up must be float32, float16 or bfloat16 for its kernel, got torch.float64")
    return _fwd(gate_up.contiguous())
