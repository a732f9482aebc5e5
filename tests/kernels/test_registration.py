"""What torch is told of an op, as far as it can be checked without a GPU; `test_opcheck` of each op does the rest."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nvlm_kernels._backend import INTERPRET
from nvlm_kernels.ops import add_rms_norm, layer_scale_residual, qk_norm, rms_norm, rotary, row_statistics, swiglu

EPS = 1e-6


def _calls(device):
    """An op, and inputs of which those that are trained require a gradient."""

    def trained(*shape):
        return torch.randn(shape, device=device, requires_grad=True)

    x, branch, weight, qkv = trained(3, 8), trained(3, 8), trained(8), trained(3, 24)
    sums = torch.rand(3, 2, device=device, requires_grad=True)
    cos, sin = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 8, device=device)
    k, v = torch.zeros(2, 5, 2, 8, device=device), torch.zeros(2, 5, 2, 8, device=device)
    positions = torch.arange(3, device=device).repeat(2, 1)
    return {
        "rms_norm": (rms_norm._fwd, x, weight, EPS),
        "add_rms_norm": (add_rms_norm._fwd, x, branch, weight, EPS),
        "layer_scale_residual": (layer_scale_residual._fwd, x, branch, weight),
        "layer_scale_residual_statistics": (layer_scale_residual._fwd_statistics, x, branch, weight),
        "swiglu": (swiglu._fwd, x),
        "qk_norm": (qk_norm._fwd, qkv, weight, weight.detach().clone().requires_grad_(), EPS),
        "qk_sum_squares": (qk_norm._sums, qkv),
        "qk_norm_from_sums": (qk_norm._from_sums, qkv, sums, 16, weight, weight.detach().clone(), EPS),
        "rotary": (rotary._fwd, trained(2, 3, 8 * 8), cos, sin, 4, 2),
        "rotary_cache": (rotary._cache, trained(2, 3, 8 * 8).detach(), cos, sin, k, v, positions, 4),
    }


def _with_statistics(x, branch, scale):
    y = layer_scale_residual.layer_scale_residual_ref(x, branch, scale)
    return y, row_statistics.row_statistics_ref(y.detach())


OPS = list(_calls("cpu"))


@pytest.mark.skipif(not INTERPRET, reason="runs the kernels")
@pytest.mark.parametrize("name", OPS)
def test_schema_and_autograd(name):
    """What an op writes is what it says it writes; no output is an input's memory."""
    op, *inputs = _calls("cpu")[name]
    torch.library.opcheck(op, tuple(inputs), test_utils=("test_schema", "test_autograd_registration"))


@pytest.mark.skipif(INTERPRET, reason="the interpreter looks into tensors")
@pytest.mark.parametrize("name", OPS)
def test_fake_tensors(name):
    """torch.compile's view of an op, forward and backward: shapes, dtypes and device, with nothing launched."""
    reference = {
        "rms_norm": rms_norm.rms_norm_ref,
        "add_rms_norm": add_rms_norm.add_rms_norm_ref,
        "layer_scale_residual": layer_scale_residual.layer_scale_residual_ref,
        "layer_scale_residual_statistics": _with_statistics,
        "swiglu": swiglu.swiglu_ref,
        "qk_norm": qk_norm.qk_norm_ref,
        "qk_sum_squares": qk_norm.qk_sum_squares_ref,
        "qk_norm_from_sums": qk_norm.qk_norm_from_sums_ref,
        "rotary": rotary.rotary_ref,
        "rotary_cache": rotary.rotary_cache_ref,
    }[name]
    with FakeTensorMode():
        op, *inputs = _calls("cpu")[name]
        outs, wants = op(*inputs), reference(*inputs)
        outs, wants = ((t,) if isinstance(t, torch.Tensor) else t for t in (outs, wants))
        assert [(t.shape, t.dtype, t.device) for t in outs] == [(t.shape, t.dtype, t.device) for t in wants]
        trained = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
        if trained:
            assert [t.requires_grad for t in outs] == [t.requires_grad for t in wants]
            outs = [t for t in outs if t.requires_grad]
            grads = torch.autograd.grad(outs, trained, [torch.ones_like(t) for t in outs])
            assert [(t.shape, t.dtype) for t in grads] == [(t.shape, t.dtype) for t in trained]
