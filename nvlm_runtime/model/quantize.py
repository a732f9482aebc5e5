"""What of a model is quantised, and how: weights alone for decoding, weights and activations for the vision encoder.

`weight_only` has the linears of the first kind. Those of the second, for a CPU:

M rows, K in features, L out features. With w the bf16 or fp32 weight [L, K]:

    scale_w[l] = max_k |w[l, k]| / 127       wq = round(w / scale_w)       once, when the layer is made
    scale_x[m] = max_k |x[m, k]| / 127       xq = round(x / scale_x)       every call: no calibration, no state
    y[m, l] = scale_x[m] * scale_w[l] * sum_k xq[m, k] wq[l, k] + bias[l]

The sum is exact in int32; everything else is fp32, rounded once to x's dtype. Bound: flops (`torch._int_mm`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nvlm_kernels import native
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.vision import InternViT
from nvlm_runtime.model.weight_only import WEIGHT_ONLY

# Rows multiplied at a time. What exists in int32 and fp32 stays small; of a whole tile it is 42 MB, made anew in each
# of 96 products. A tile of the 300M vision encoder took 1.95 s whole and 1.6 s in blocks, two runs on one machine.
BLOCK_ROWS = 384


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K], floating, to int8 [M, K] in -127..127 and fp32 scales [M, 1]: x is about their product."""
    x = x.float()
    scale = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)) / 127
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros
    return (x / scale).round_().to(torch.int8), scale


class Int8DynamicLinear(nn.Module):
    """An nn.Linear with int8 weights, a scale an out feature, and int8 activations, a scale a row. CPU, inference.

    Buffers: weight int8 [L, K], scale fp32 [L], bias fp32 [L] or None; casting the module would round the last two. Of
    a linear's shapes, to be filled.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=torch.int8, requires_grad=False))
        self.register_buffer("scale", torch.empty_like(linear.weight[:, 0], dtype=torch.float32, requires_grad=False))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())
        self.native: native.NativeLibrary | None = None  # the library that makes the passes around the product

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8DynamicLinear":
        """Raises ValueError where the linear's weight is not finite or not on the CPU."""
        weight = linear.weight.detach()
        if weight.device.type != "cpu":
            raise ValueError(f"int8_dynamic: expected a weight on the CPU, got one on {weight.device}")
        if not weight.isfinite().all():
            raise ValueError("int8_dynamic: expected finite weights, got inf or nan")
        made, (quantized, scale) = cls(linear), quantize_rows(weight)
        made.weight, made.scale = quantized, scale[:, 0]
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, K], bf16 or fp32. Returns [*, L] in x's dtype. Raises ValueError for others, and under autograd."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("int8_dynamic: the layer has no gradient, call it under torch.no_grad()")
        num_features, size = self.weight.shape
        shape = *x.shape[:-1], num_features
        if x.shape[-1] != size or x.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"int8_dynamic: expected bf16 or fp32 [*, {size}], got {x.dtype} {tuple(x.shape)}")
        x = x.reshape(-1, size)
        y = x.new_empty(len(x), num_features)
        parts = -(-len(x) // BLOCK_ROWS)
        for some, out in zip(x.chunk(parts), y.chunk(parts), strict=True) if parts else ():
            self._product(some, out)
        return y.view(shape)

    def _product(self, x: Tensor, out: Tensor) -> None:
        """out [M, L] from x [M, K]."""
        if self.native is not None:
            xq, scale_x = native.quantize_rows(self.native, x.contiguous())
            products = torch._int_mm(xq, self.weight.t())
            return native.scale_products(self.native, products, scale_x, self.scale, self.bias, out)
        xq, scale_x = quantize_rows(x)
        y = torch._int_mm(xq, self.weight.t()).float().mul_(scale_x)
        out.copy_(y.mul_(self.scale) if self.bias is None else torch.addcmul(self.bias, y, self.scale, out=y))


# a part's linears: their names in the model begin and end so
PARTS = {
    "vision": ("vision_model.encoder.layers.", ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "decoder": ("language_model.", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    "cross": (
        "language_model.",
        tuple(f"cross_attn.{name}" for name in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")),
    ),
    "head": ("language_model.", ("lm_head",)),
}
METHODS = {part: {"int8_dynamic": Int8DynamicLinear} if part == "vision" else WEIGHT_ONLY for part in PARTS}
QUANTIZED = (Int8DynamicLinear, *WEIGHT_ONLY.values())


def _linears(model: nn.Module, part: str, kinds: type | tuple[type, ...]) -> list[str]:
    """Names of a part's linears that are of these kinds, in a model or a vision encoder alone."""
    begin, ends = PARTS[part]
    begin = begin if isinstance(model, NVLMModel) else ""
    found = [name for name, child in model.named_modules() if isinstance(child, kinds)]
    return [name for name in found if name.startswith(begin) and name.endswith(ends)]


def check_scheme(scheme: Mapping[str, str]) -> None:
    """Raises ValueError for another part or method."""
    for part, method in scheme.items():
        if part not in PARTS:
            raise ValueError(f"quantize: part must be one of {', '.join(PARTS)}, got {part!r}")
        if method not in METHODS[part]:
            raise ValueError(f"quantize: {part} can be {', '.join(METHODS[part])}, got {method!r}")


def quantize(model: NVLMModel | InternViT, scheme: Mapping[str, str], filled: bool = True) -> None:
    """Replaces linears of the model, or of a vision encoder alone, in place, part by part.

    scheme: "vision" to "int8_dynamic"; "decoder", "cross" and "head" to "int8" or "int4", weights alone. What is not
    named keeps its dtype; so do norms, biases, embeddings (a tied head is parted from its own), the projector and the
    image keys' projections, which are used once an image. filled: False leaves weights to be read from a checkpoint.
    Raises ValueError for another part or method, for a part the model does not have or that is quantised already, and
    for weights that are not finite; nothing is changed then.
    """
    check_scheme(scheme)
    made = []
    for part, method in scheme.items():
        kind = METHODS[part][method]
        names = _linears(model, part, nn.Linear)
        if not names:
            raise ValueError(f"quantize: the model has no floating linears in {part}")
        for name in names:
            parent, _, attribute = name.rpartition(".")
            linear = model.get_submodule(name)
            made.append((model.get_submodule(parent), attribute, kind.of(linear) if filled else kind(linear)))
    for parent, attribute, layer in made:
        setattr(parent, attribute, layer)


def scheme_of(model: NVLMModel) -> dict[str, str]:
    """What of the model is quantised, as `quantize` took it."""
    found = {}
    for part, methods in METHODS.items():
        names = _linears(model, part, QUANTIZED)
        kinds = {kind: method for method, kind in methods.items()}
        found |= {part: kinds[type(model.get_submodule(names[0]))]} if names else {}
    return found


def quantized_buffers(model: NVLMModel) -> dict[str, Tensor]:
    """Buffers of quantised linears, by name."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QUANTIZED)]
    return {f"{name}.{key}": buffer for name, layer in layers for key, buffer in layer.named_buffers()}
