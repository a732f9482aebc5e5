import pytest
import torch

from nvlm_kernels._backend import use_triton
from nvlm_kernels.ops.layer_scale_residual import (
    BLOCK_C,
    BLOCK_R,
    _fwd,
    layer_scale_residual,
    layer_scale_residual_ref,
)
from tests.util import check_op, planted


@pytest.mark.parametrize(
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
def test_matches_reference(shape, dtype, device):
    x, branch = torch.randn(2, *shape, dtype=dtype, device=device)
    check_op(
        layer_scale_residual, layer_scale_residual_ref, x, branch, torch.randn(shape[-1], dtype=dtype, device=device)
    )


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
    y.sum().backward()
    for name in ("dy_ptr", "branch_ptr"):
        assert memory.access["_bwd_kernel", name].loaded == x.nbytes
    assert memory.access["_bwd_kernel", "dbranch_ptr"].stored == x.nbytes
    assert memory.access["_bwd_kernel", "dscale_ptr"].stored == 3 * 160 * 4


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
    with pytest.raises(ValueError, match=f"layer_scale_residual: .*{match}"):
        layer_scale_residual(x, branch, scale)


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
    torch.library.opcheck(_fwd, (x, branch, torch.ones(8, device=device, requires_grad=True)))
