"""Bytes that plain torch moves: every aten op reads its inputs and writes its outputs once.

`EagerBytes` counts what runs under it, on any device, meta included; views move nothing. `compiled_bytes` asks
Inductor's own scheduler for the bytes of the graph it would emit, after its fusions, without compiling it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._inductor.compile_fx import compile_fx, fake_tensor_prop, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.proofs.cases.case import Call, backward, tensors_in

FREE = {"detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


@dataclass(frozen=True)
class Step:
    """One aten op: its bytes and multiply-add flops."""

    name: str
    bytes: int
    flops: int


@dataclass
class EagerBytes(TorchDispatchMode):
    """A context; `steps` lists what ran in it. Ops of ours are looked into, their kernels are not seen."""

    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "nvlm":
            with self:  # the op's own function: going through the dispatcher again would come back here
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not (func.is_view or name in FREE or name == "_unsafe_view"):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count else 0
            self.steps.append(Step(name, sum({_key(t): _touched(t) for t in tensors}.values()), flops))
        return result

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)


def _key(t: Tensor) -> tuple[Any, ...]:
    """The same for two tensors that are the same memory."""
    return id(t) if t.is_meta else t.data_ptr(), t.shape, t.stride()


def _touched(t: Tensor) -> int:
    """Bytes of the elements that differ: an expanded axis is read once."""
    numel = 1
    for size, stride in zip(t.shape, t.stride()):
        numel *= size if stride else min(size, 1)
    return numel * t.element_size()


class _OneAttention(torch.autograd.Function):
    """Shapes of attention, its work noted as one fused kernel's: each array once, every score, masked or not."""

    @staticmethod
    def forward(ctx, q, k, v, mask, steps):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        flops = 4 * q.numel() * k.shape[-2]
        steps.append(Step("attention", sum(map(_touched, (q, k, v, out, *([] if mask is None else [mask])))), flops))
        ctx.save_for_backward(q, k, v)
        ctx.steps, ctx.flops = steps, flops
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors
        moved = 2 * sum(map(_touched, (q, k, v))) + 2 * _touched(dout)  # q k v dq dk dv, out dout
        ctx.steps.append(Step("attention", moved, ctx.flops * 5 // 2))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


class FusedAttention(TorchFunctionMode):
    """Torch's attention as the one kernel a GPU takes it to; on meta tensors it would be a product and a softmax."""

    def __init__(self, steps: list[Step]):
        super().__init__()
        self.steps = steps

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _OneAttention.apply(*args[:3], kwargs.get("attn_mask"), self.steps)


def eager_steps(call: Call) -> tuple[list[Step], list[Step]]:
    """What the reference does, forward and backward, torch's attention taken as one kernel."""
    attention: list[Step] = []
    with FusedAttention(attention), EagerBytes() as forward:
        output = call.ref(*call.inputs)
    forward.steps += attention
    if call.backward_bytes is None:
        return forward.steps, []
    attention.clear()
    grads = [torch.ones_like(t) for t in tensors_in(output) if t.requires_grad]
    with EagerBytes() as back:
        backward(output, call.inputs, grads)
    return forward.steps, back.steps + attention


def compiled_bytes(fn: Callable[..., Any], inputs: tuple[Any, ...], with_backward: bool) -> int:
    """Bytes of the graphs Inductor makes of fn, forward and, where asked, backward."""
    counted = 0

    def count(gm, example_inputs, **_):
        nonlocal counted
        mode = fake_tensor_prop(gm, example_inputs)
        record_original_output_strides(gm)
        graph = GraphLowering(gm, shape_env=mode.shape_env)
        with DebugContext(), V.set_fake_mode(mode), V.set_graph_handler(graph):
            graph.run(*example_inputs)
            graph._update_scheduler()  # fusion happens here
            counted += graph.count_bytes()[0]
        return make_boxed_func(gm.forward)

    torch._dynamo.reset()
    compiled = torch.compile(
        fn, backend=lambda gm, example: compile_fx(gm, example, inner_compile=count), dynamic=False
    )
    output = compiled(*inputs)
    if with_backward:
        backward(output, inputs)
    return counted
