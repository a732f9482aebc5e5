"""Linears whose weights are kept in 8 or 4 bits, for decoding, which reads every weight once a token.

L out features, K in features.

    int8    w[l, k] = scale[l] * q[l, k]               q in -127..127, an fp32 scale a row
    int4    w[l, k] = scale[l, k // 32] * q[l, k]      q in -8..7, a bf16 scale for 32 weights

The native step (nvlm_kernels/native) reads these buffers as they stand, and rounds activations to 1/65534 of the
largest of 512. `forward` is the reference and what a prompt goes through: activations as they are, the weights of some
rows at a time made dense, an ordinary product. Bound: bytes, 8 and 4.5 bits a weight. int4's scale is the largest
weight over -8, as in GGML's q4_0, so that the largest is exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_kernels.native import BLOCK, GROUP
from nvlm_runtime.model.linear import computes_in_fp32, linear_in_fp32

ROWS = 4096  # made dense at a time


class Int8Linear(nn.Module):
    """Buffers: weight int8 [L, K], scale fp32 [L], bias [L] or None; of a linear's shapes, to be filled."""

    in_features: int
    out_features: int
    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=torch.int8, requires_grad=False))
        self.register_buffer("scale", torch.empty_like(linear.weight[:, 0], dtype=torch.float32, requires_grad=False))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """Raises ValueError for weights not finite."""
        made, weight = cls(linear), _finite("int8", linear)
        made.scale = weight.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        made.weight = (weight / made.scale[:, None]).round_().to(torch.int8)
        return made

    def dense(self, dtype: torch.dtype, first: int = 0, end: int | None = None) -> Tensor:
        """Rows [first, end) of the weights, [*, K]."""
        return (self.weight[first:end].float() * self.scale[first:end, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, K]. Returns [*, L] in x's dtype."""
        return _linear(self, x)


class Int4Linear(nn.Module):
    """Buffers: nibbles int32 [L, blocks, 16], where nibble j of lane l of a block of 128 weights is weight
    32 (l // 4) + 4 j + l % 4, plus 8, so that a lane's weights share a scale; scale bf16 [L, 4 blocks]; bias [L] or
    None. A last block that K does not fill holds zeros. Of a linear's shapes, to be filled.
    """

    in_features: int
    out_features: int
    nibbles: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows, blocks, device = self.out_features, -(-self.in_features // BLOCK), linear.weight.device
        self.register_buffer("nibbles", torch.empty(rows, blocks, 16, dtype=torch.int32, device=device))
        self.register_buffer("scale", torch.empty(rows, 4 * blocks, dtype=torch.bfloat16, device=device))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int4Linear":
        """Raises ValueError for weights not finite."""
        made, weight = cls(linear), _finite("int4", linear)
        blocks = made.nibbles.shape[1]
        groups = F.pad(weight, (0, blocks * BLOCK - made.in_features)).unflatten(-1, (-1, GROUP))  # [L, 4 blocks, 32]
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        scale = (largest / -8).to(torch.bfloat16)
        divisor = torch.where(scale == 0, 1, scale.float())[..., None]
        codes = ((groups / divisor).round_().clamp_(-8, 7) + 8).to(torch.int64)
        lanes = codes.view(made.out_features, blocks, 4, 8, 4).transpose(-1, -2).flatten(2, 3)  # [L, blocks, 16, 8]
        packed = (lanes << torch.arange(0, 32, 4)).sum(-1)  # as unsigned 32 bits
        made.nibbles = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        made.scale = scale
        return made

    def dense(self, dtype: torch.dtype, first: int = 0, end: int | None = None) -> Tensor:
        """Rows [first, end) of the weights, [*, K]."""
        packed, scale = self.nibbles[first:end], self.scale[first:end].float()
        lanes = packed[..., None] >> torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32) & 15
        codes = lanes.unflatten(2, (4, 4)).transpose(-1, -2)  # [L, blocks, 4 groups, 8, 4]
        groups = (codes.reshape(*scale.shape, GROUP) - 8).float() * scale[..., None]
        return groups.flatten(1)[:, : self.in_features].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, K]. Returns [*, L] in x's dtype."""
        return _linear(self, x)


WEIGHT_ONLY = {"int8": Int8Linear, "int4": Int4Linear}


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [L, K] of a linear, quantised or not."""
    return linear.dense(dtype) if isinstance(linear, Int8Linear | Int4Linear) else linear.weight


def _finite(kind: str, linear: nn.Linear) -> Tensor:
    weight = linear.weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError(f"{kind}: expected finite weights, got inf or nan")
    return weight


def _linear(layer: Int8Linear | Int4Linear, x: Tensor) -> Tensor:
    if computes_in_fp32(x):
        return linear_in_fp32(x, lambda i, end: layer.dense(torch.float32, i, end), layer.out_features, layer.bias)
    parts = [F.linear(x, layer.dense(x.dtype, i, i + ROWS)) for i in range(0, layer.out_features, ROWS)]
    y = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    return y if layer.bias is None else y + layer.bias.to(y.dtype)
