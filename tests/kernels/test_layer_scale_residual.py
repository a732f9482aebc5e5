import pytest
import torch

from nvlm_kernels._backend import use_triton
from nvlm_kernels.ops.layer_scale_residual import (
    BLOCK_C,
    BLOCK_R,
    _fwd,
    _fwd_statistics,
    layer_scale_residual,
    layer_scale_residual_ref,
    layer_scale_residual_statistics,
)
from nvlm_kernels.ops.row_statistics import row_statistics, row_statistics_ref
from tests.util import Undefined, check_op, planted

SHAPES = pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (2, 65, 160),
        (BLOCK_R, BLOCK_C),
        (BLOCK_R + 1, BLOCK_C + 1),
        (BLOCK_R - 1, BLOCK_C - 1),
        (3, 3200),
        (100,),
        (2, 0, 8),
    ],
    ids=str,
)


@SHAPES
def test_matches_reference(shape, dtype, device):
    x, branch = torch.randn(2, *shape, dtype=dtype, device=device)
    check_op(
        layer_scale_residual, layer_scale_residual_ref, x, branch, torch.randn(shape[-1], dtype=dtype, device=device)
    )


@SHAPES
def test_with_statistics(shape, dtype, device):
    """y and its gradients have the bits they have without; the statistics are those of y as it is stored."""
    inputs = [t.requires_grad_() for t in torch.randn(2, *shape, dtype=dtype, device=device).unbind()]
    inputs.append(torch.randn(shape[-1], dtype=dtype, device=device, requires_grad=True))
    plain = layer_scale_residual(*inputs)
    y, statistics = layer_scale_residual_statistics(*inputs)
    assert torch.equal(y, plain)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(plain, inputs, dy)):
        assert torch.equal(a, b)
    if not use_triton(y):
        assert statistics is None
        return
    assert not statistics.requires_grad and statistics.shape == (*shape[:-1], 2)
    exact = row_statistics_ref(y.detach().double())
    torch.testing.assert_close(statistics.double(), exact, rtol=5e-6, atol=1e-6)


def test_statistics_of_rows_far_from_zero(dtype, device):
    x, branch = torch.randn(2, 2, BLOCK_R + 1, 3 * BLOCK_C + 1, dtype=dtype, device=device)
    x[0] += 1000
    x[1, :, BLOCK_C:] -= 1000
    y, statistics = layer_scale_residual_statistics(x, branch, torch.zeros_like(x[0, 0]))
    if statistics is not None:
        exact = row_statistics_ref(y.double())
        assert (statistics - exact)[..., 0].abs().max() < 1.3e-4
        assert ((statistics - exact) / exact)[..., 1].abs().max() < 1e-5


def test_programs_of_several_blocks(dtype, device, monkeypatch):
    """Backward: 5 blocks of rows in 2 splits, the last block not full."""
    monkeypatch.setattr("nvlm_kernels.ops.layer_scale_residual.PARTIALS", 2)
    x, branch = torch.randn(2, 4 * BLOCK_R + 1, 160, dtype=dtype, device=device)
    check_op(layer_scale_residual, layer_scale_residual_ref, x, branch, torch.randn(160, dtype=dtype, device=device))


def test_guarded_and_unaligned(dtype, device):
    x, branch = (planted(torch.randn(3, 13, 150, dtype=dtype, device=device)) for _ in range(2))
    scale = planted(torch.randn(150, dtype=dtype, device=device))
    y = layer_scale_residual(x, branch, scale)
    torch.testing.assert_close(y, layer_scale_residual_ref(x, branch, scale), rtol=2e-3, atol=2e-3)
    again, statistics = layer_scale_residual_statistics(x, branch, scale)
    assert torch.equal(again, y)
    if statistics is not None:
        torch.testing.assert_close(statistics, row_statistics(y), rtol=1e-5, atol=1e-5)


def test_strided_input(dtype, device):
    x, branch = torch.randn(2, 5, 64, 3, dtype=dtype, device=device).transpose(-1, -2)
    check_op(
        layer_scale_residual, layer_scale_residual_ref, x, branch, torch.randn(128, dtype=dtype, device=device)[::2]
    )


def test_bytes(memory, dtype):
    if memory is None:
        pytest.skip("counted in the interpreter")
    x, branch = (torch.randn(70, 160, dtype=dtype, requires_grad=True) for _ in range(2))
    scale = torch.randn(160, dtype=dtype, requires_grad=True)
    y = layer_scale_residual(x, branch, scale)
    moved = memory.total()
    assert moved.unique_loaded == 2 * x.nbytes + scale.nbytes
    assert moved.loaded == 2 * x.nbytes + 3 * scale.nbytes  # once for each block of 32 rows
    assert moved.stored == x.nbytes
    memory.access.clear()
    layer_scale_residual_statistics(x, branch, scale)
    moved = memory.total()
    assert moved.unique_loaded == 2 * x.nbytes + scale.nbytes
    assert moved.loaded == 2 * x.nbytes + 5 * scale.nbytes  # once for each block of 16 rows
    assert moved.stored == x.nbytes + 70 * 2 * 4
    y.sum().backward()
    for name in ("dy_ptr", "branch_ptr"):
        assert memory.access["_bwd_kernel", name].loaded == x.nbytes
    assert memory.access["_bwd_kernel", "dbranch_ptr"].stored == x.nbytes
    assert memory.access["_bwd_kernel", "dscale_ptr"].stored == 3 * 160 * 4


def test_rows_of_nothing_have_no_statistics(device):
    empty = torch.zeros(3, 0, device=device)
    assert layer_scale_residual(empty, empty, empty[0]).shape == (3, 0)
    with pytest.raises(ValueError, match="layer_scale_residual_statistics: C must be 1 or more, got 0"):
        layer_scale_residual_statistics(empty, empty, empty[0])


@pytest.mark.parametrize("op", [layer_scale_residual, lambda *given: layer_scale_residual_statistics(*given)[0]])
def test_no_gradient_comes_back(op, device):
    inputs = [torch.randn(2, 8, device=device, requires_grad=True) for _ in range(2)]
    scale = torch.randn(8, device=device, requires_grad=True)
    grads = torch.autograd.grad(Undefined.apply(op(*inputs, scale)), (*inputs, scale), allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


@pytest.mark.parametrize(
    "x, branch, scale, match",
    [
        (torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(3), r"got \(2, 3\), \(1, 3\), \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1), r"got \(2, 3\), \(2, 3\), \(1,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), "scale"),
        (torch.zeros(()), torch.zeros(()), torch.zeros(()), "must be"),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), torch.zeros(3), "share dtype"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3).half(), "share dtype"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, device="meta"), "share dtype and device.*meta"),
    ],
)
def test_rejects(x, branch, scale, match):
    for op in (layer_scale_residual, layer_scale_residual_statistics):
        with pytest.raises(ValueError, match=f"{op.__name__}: .*{match}"):
            op(x, branch, scale)


def test_fp64_has_no_kernel(device):
    x, scale = torch.randn(2, 3, dtype=torch.float64, device=device), torch.ones(3, dtype=torch.float64, device=device)
    if not use_triton(x):
        assert torch.equal(layer_scale_residual(x, x, scale), 2 * x)
    else:
        with pytest.raises(ValueError, match="layer_scale_residual: x must be float32"):
            layer_scale_residual(x, x, scale)


@pytest.mark.gpu
def test_opcheck(device):
    x, branch = torch.randn(2, 3, 8, device=device, requires_grad=True).unbind()
    for op in (_fwd, _fwd_statistics):
        torch.library.opcheck(op, (x, branch, torch.ones(8, device=device, requires_grad=True)))
