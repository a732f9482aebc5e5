"""What of a model is quantised, and how: weights alone for decoding, weights and activations for the vision tower.

`weight_only` has the linears of the first kind. Those of the second, for a CPU:

M rows, K in features, L out features. With w the bf16 or fp32 weight [L, K]:

    scale_w[l] = max_k |w[l, k]| / 127       wq = round(w / scale_w)       once, when the layer is made
    scale_x[m] = max_k |x[m, k]| / 127       xq = round(x / scale_x)       every call: no calibration, no state
    y[m, l] = scale_x[m] * scale_w[l] * sum_k xq[m, k] wq[l, k] + bias[l]

The sum is exact in int32; everything else is fp32, rounded once to x's dtype. Bound: flops (`torch._int_mm`).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from nvlm_runtime.model import NVLMModel
from nvlm_runtime.vision import InternViT
from nvlm_runtime.weight_only import WEIGHT_ONLY

Method = Literal["int8_dynamic"]
METHODS = ("int8_dynamic",)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K], floating, to int8 [M, K] in -127..127 and fp32 scales [M, 1]: x is about their product."""
    x = x.float()
    scale = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)) / 127
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros
    return (x / scale).round_().to(torch.int8), scale


class Int8DynamicLinear(nn.Module):
    """An nn.Linear with int8 weights, a scale an out feature, and int8 activations, a scale a row. CPU, inference.

    Buffers: weight int8 [L, K], scale fp32 [L], bias fp32 [L] or None; casting the module would round the last two.
    Raises ValueError where the linear's weight is not finite or not on the CPU.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        if weight.device.type != "cpu":
            raise ValueError(f"int8_dynamic: expected a weight on the CPU, got one on {weight.device}")
        if not weight.isfinite().all():
            raise ValueError("int8_dynamic: expected finite weights, got inf or nan")
        quantized, scale = quantize_rows(weight)
        self.register_buffer("weight", quantized)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, K], bf16 or fp32. Returns [*, L] in x's dtype. Raises ValueError for others, and under autograd."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("int8_dynamic: the layer has no gradient, call it under torch.no_grad()")
        num_features, size = self.weight.shape
        if x.shape[-1] != size or x.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"int8_dynamic: expected bf16 or fp32 [*, {size}], got {x.dtype} {tuple(x.shape)}")
        xq, scale_x = quantize_rows(x.reshape(-1, size))
        y = torch._int_mm(xq, self.weight.t()).float().mul_(scale_x)  # [M, L]
        y = y.mul_(self.scale) if self.bias is None else torch.addcmul(self.bias, y, self.scale, out=y)
        return y.to(x.dtype).view(*x.shape[:-1], num_features)


def quantize_vision(model: NVLMModel | InternViT, method: Method) -> None:
    """Replaces the four linears of every block of the model's vision tower, in place; the rest keeps its dtype.

    Raises ValueError for another method, for a tower that is quantised already, and where a weight cannot be.
    """
    if method not in METHODS:
        raise ValueError(f"quantize_vision: method must be one of {', '.join(METHODS)}, got {method!r}")
    tower = model.vision_model if isinstance(model, NVLMModel) else model
    parents = [part for block in tower.encoder.layers for part in (block.attn, block.mlp)]
    found = [(part, name) for part in parents for name, child in part.named_children() if isinstance(child, nn.Linear)]
    if len(found) != 2 * len(parents):
        raise ValueError("quantize_vision: expected a tower of floating linears, this one is quantised already")
    made = [Int8DynamicLinear(getattr(part, name)) for part, name in found]  # all or none
    for (part, name), layer in zip(found, made, strict=True):
        setattr(part, name, layer)


# a part's linears: their names end in one of these
PARTS = {
    "decoder": ("qkv_proj", "self_attn.o_proj", "gate_up_proj", "mlp.down_proj"),
    "cross": tuple(
        f"cross_attn.{name}" for name in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
    ),
    "head": ("lm_head",),
}


def quantize(model: NVLMModel, scheme: Mapping[str, str]) -> None:
    """Replaces linears of the model in place, part by part.

    scheme: "vision" to "int8_dynamic"; "decoder", "cross" and "head" to "int8" or "int4", weights alone. What is not
    named keeps its dtype; so do norms, biases, embeddings (a tied head is parted from its own), the projector and the
    image keys' projections, which are used once an image. Raises ValueError for another part or method, for a part the
    model does not have or that is quantised already, and for weights that are not finite; nothing is changed then.
    """
    for part, method in scheme.items():
        methods = METHODS if part == "vision" else tuple(WEIGHT_ONLY)
        if part != "vision" and part not in PARTS:
            raise ValueError(f"quantize: part must be one of vision, {', '.join(PARTS)}, got {part!r}")
        if method not in methods:
            raise ValueError(f"quantize: {part} can be {', '.join(methods)}, got {method!r}")
    made = []
    for part, method in scheme.items():
        if part == "vision":
            continue
        parents = dict(model.language_model.named_modules())
        found = [name for name, child in parents.items() if name.endswith(PARTS[part]) and isinstance(child, nn.Linear)]
        if not found:
            raise ValueError(f"quantize: the model has no floating linears in {part}")
        for name in found:
            parent, _, attribute = name.rpartition(".")
            made.append((parents[parent], attribute, WEIGHT_ONLY[method](parents[name])))
    if "vision" in scheme:
        quantize_vision(model, scheme["vision"])
    for parent, attribute, layer in made:
        setattr(parent, attribute, layer)
