import pytest
import torch

from nvlm_kernels._backend import use_triton
from nvlm_kernels.ops.rms_norm import _fwd, rms_norm, rms_norm_ref, tile
from tests.util import check_op, planted

EPS = 1e-6
ROWS = tile(192)[0]  # of a program


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 257), (1, ROWS + 1, 192), (1, ROWS, 192), (2, 3200), (3, 8192), (100,), (2, 0, 8)],
    ids=str,
)
def test_matches_reference(shape, dtype, device):
    x = torch.randn(shape, dtype=dtype, device=device)
    check_op(rms_norm, rms_norm_ref, x, torch.randn(shape[-1], dtype=dtype, device=device), EPS)


@pytest.mark.parametrize("scale, eps", [(1e-3, 1e-6), (1e-3, 1e-5), (300.0, 1e-6), (0.0, 1e-6)])
def test_small_and_large_rows(scale, eps, dtype, device):
    x = torch.randn(3, 200, dtype=dtype, device=device) * scale
    x[1] *= 0.5
    check_op(rms_norm, rms_norm_ref, x, torch.randn(200, dtype=dtype, device=device), eps)


def test_programs_of_several_blocks(dtype, device, monkeypatch):
    """Backward: 5 blocks of rows in 2 programs, the last block not full."""
    monkeypatch.setattr("nvlm_kernels.ops.rms_norm.PARTIALS", 2)
    x, weight = torch.randn(4 * ROWS + 6, 192, dtype=dtype, device=device), torch.randn(192, dtype=dtype, device=device)
    check_op(rms_norm, rms_norm_ref, x, weight, EPS)


def test_guarded_and_unaligned(dtype, device):
    x, weight = planted(torch.randn(3, 5, 100, dtype=dtype, device=device)), planted(torch.randn(100, dtype=dtype))
    check_op(rms_norm, rms_norm_ref, x, weight.to(device), EPS)
    y = rms_norm(x, weight.to(device), EPS)
    torch.testing.assert_close(y, rms_norm_ref(x, weight.to(device), EPS), rtol=2e-3, atol=2e-3)


def test_strided_input(dtype, device):
    x = torch.randn(5, 64, 3, dtype=dtype, device=device).transpose(-1, -2)
    check_op(rms_norm, rms_norm_ref, x, torch.randn(128, dtype=dtype, device=device)[::2], EPS)


def test_rounds_before_the_weight(device):
    x, weight = torch.randn(8, 512, device=device).half(), torch.randn(512, device=device).half()
    same = rms_norm(x, weight, EPS) == rms_norm_ref(x, weight, EPS)
    assert same.float().mean() > 0.99  # one rounding instead of two: 0.74


def test_rows_do_not_meet(dtype, device):
    """A row of NaN, in the same program as others, stays alone."""
    x, weight = torch.randn(5, 192, dtype=dtype, device=device), torch.randn(192, dtype=dtype, device=device)
    x[2] = float("nan")
    y = rms_norm(x, weight, EPS)
    assert y[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], rms_norm(x[others], weight, EPS))


def test_bytes(memory, dtype):
    if memory is None:
        pytest.skip("counted in the interpreter")
    x = torch.randn(2 * ROWS + 8, 192, dtype=dtype, requires_grad=True)
    weight = torch.randn(192, dtype=dtype, requires_grad=True)
    y = rms_norm(x, weight, EPS)
    assert memory.access["fwd_kernel", "x_ptr"].loaded == x.nbytes
    assert memory.access["fwd_kernel", "y_ptr"].stored == x.nbytes
    assert memory.access["fwd_kernel", "weight_ptr"].unique_loaded == weight.nbytes
    y.sum().backward()
    assert memory.launches == ["fwd_kernel", "bwd_kernel"]
    for name in ("x_ptr", "dy_ptr"):
        assert memory.access["bwd_kernel", name].loaded == x.nbytes
    assert memory.access["bwd_kernel", "dx_ptr"].stored == x.nbytes
    assert memory.access["bwd_kernel", "dweight_ptr"].stored == 3 * 192 * 4  # of three programs


@pytest.mark.parametrize(
    "x, weight, eps, match",
    [
        (torch.zeros(2, 3), torch.zeros(4), EPS, r"weight must have shape \(3,\), got \(4,\)"),
        (torch.zeros(2, 3), torch.zeros(1), EPS, "weight must have shape"),
        (torch.zeros(2, 3), torch.zeros(1, 3), EPS, "weight must have shape"),
        (torch.zeros(2, 3), torch.zeros(3).half(), EPS, "weight must be torch.float32"),
        (torch.zeros(2, 3), torch.zeros(3, device="meta"), EPS, "got torch.float32 on meta"),
        (torch.zeros(()), torch.zeros(1), EPS, r"expected floating rows \[\*, C\], got torch.float32 \(\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), EPS, "got torch.int64"),
        (torch.zeros(2, 3), torch.zeros(3), 0.0, "eps must be above 0"),
    ],
)
def test_rejects(x, weight, eps, match):
    with pytest.raises(ValueError, match=f"rms_norm: .*{match}"):
        rms_norm(x, weight, eps)


def test_fp64_has_no_kernel(device):
    x, weight = torch.randn(2, 3, dtype=torch.float64, device=device), torch.ones(3, dtype=torch.float64, device=device)
    if not use_triton(x):
        assert rms_norm(x, weight, EPS).dtype == torch.float64
    else:
        with pytest.raises(ValueError, match="rms_norm: x must be float32"):
            rms_norm(x, weight, EPS)


@pytest.mark.gpu
def test_opcheck(device):
    x, weight = torch.randn(3, 8, device=device, requires_grad=True), torch.ones(8, device=device, requires_grad=True)
    torch.library.opcheck(_fwd, (x, weight, EPS))
