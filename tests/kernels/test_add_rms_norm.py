import pytest
import torch

from nvlm_kernels.ops.add_rms_norm import _fwd, add_rms_norm, add_rms_norm_ref
from nvlm_kernels.ops.rms_norm import tile
from tests.util import check_op, planted

EPS = 1e-6
ROWS = tile(192)[0]  # of a program


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 257), (1, ROWS + 1, 192), (2, 3200), (3, 8192), (100,), (2, 0, 8)], ids=str
)
def test_matches_reference(shape, dtype, device):
    x, branch = torch.randn(2, *shape, dtype=dtype, device=device)
    check_op(add_rms_norm, add_rms_norm_ref, x, branch, torch.randn(shape[-1], dtype=dtype, device=device), EPS)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_small_rows(eps, dtype, device):
    x, branch = torch.randn(2, 3, 200, dtype=dtype, device=device) * 1e-3
    check_op(add_rms_norm, add_rms_norm_ref, x, branch, torch.randn(200, dtype=dtype, device=device), eps)


def test_programs_of_several_blocks(dtype, device, monkeypatch):
    """Backward: 5 blocks of rows in 2 programs, the last block not full."""
    monkeypatch.setattr("nvlm_kernels.ops.rms_norm.PARTIALS", 2)
    x, branch = torch.randn(2, 4 * ROWS + 6, 192, dtype=dtype, device=device)
    check_op(add_rms_norm, add_rms_norm_ref, x, branch, torch.randn(192, dtype=dtype, device=device), EPS)


def test_guarded_and_unaligned(dtype, device):
    x, branch = (planted(torch.randn(3, 5, 100, dtype=dtype, device=device)) for _ in range(2))
    weight = planted(torch.randn(100, dtype=dtype, device=device))
    total, y = add_rms_norm(x, branch, weight, EPS)
    assert torch.equal(total, x + branch)
    torch.testing.assert_close(y, add_rms_norm_ref(x, branch, weight, EPS)[1], rtol=2e-3, atol=2e-3)


def test_strided_input(dtype, device):
    x, branch = torch.randn(2, 5, 64, 3, dtype=dtype, device=device).transpose(-1, -2)
    check_op(add_rms_norm, add_rms_norm_ref, x, branch, torch.randn(128, dtype=dtype, device=device)[::2], EPS)


def test_sum_is_rounded_before_the_norm(device):
    x = torch.randn(8, 512, device=device).half()
    branch, weight = torch.randn_like(x) * 100, torch.randn(512, device=device).half()
    same = add_rms_norm(x, branch, weight, EPS)[1] == add_rms_norm_ref(x, branch, weight, EPS)[1]
    assert same.float().mean() > 0.99  # of the unrounded sum: 0.78


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output(used, dtype, device):
    x, branch = torch.randn(2, 3, 200, dtype=dtype, device=device)
    weight = torch.randn(200, dtype=dtype, device=device)
    scale = 0 * weight.sum()  # ties the weight to the sum's graph

    def op(*inputs):
        return add_rms_norm(*inputs)[used] + 0 * inputs[2].sum() + scale.to(inputs[2])

    def ref(*inputs):
        return add_rms_norm_ref(*inputs)[used] + 0 * inputs[2].sum() + scale.to(inputs[2])

    check_op(op, ref, x, branch, weight, EPS)


def test_bytes(memory, dtype):
    if memory is None:
        pytest.skip("counted in the interpreter")
    x, branch = (torch.randn(40, 192, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.randn(192, dtype=dtype, requires_grad=True)
    total, y = add_rms_norm(x, branch, weight, EPS)
    moved = memory.total()
    assert moved.unique_loaded == 2 * x.nbytes + weight.nbytes
    assert moved.stored == 2 * x.nbytes
    (total + y).sum().backward()
    assert memory.launches == ["fwd_kernel", "bwd_kernel"]
    for name in ("x_ptr", "dy_ptr", "skip_ptr"):
        assert memory.access["bwd_kernel", name].loaded == x.nbytes
    assert memory.access["bwd_kernel", "dx_ptr"].stored == x.nbytes


@pytest.mark.parametrize(
    "x, branch, weight, eps, match",
    [
        (torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(3), EPS, r"branch must be like x, \(2, 3\) .*got \(1, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), torch.zeros(3), EPS, "branch must be .*torch.float16"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), torch.zeros(3), EPS, "branch must be .*meta"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1), EPS, "weight must have shape"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3).half(), EPS, "weight must be torch.float32"),
        (torch.zeros(()), torch.zeros(()), torch.zeros(1), EPS, "expected floating rows"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), 0.0, "eps must be above 0"),
    ],
)
def test_rejects(x, branch, weight, eps, match):
    with pytest.raises(ValueError, match=f"add_rms_norm: .*{match}"):
        add_rms_norm(x, branch, weight, eps)


@pytest.mark.gpu
def test_opcheck(device):
    x, branch = torch.randn(2, 3, 8, device=device, requires_grad=True).unbind()
    torch.library.opcheck(_fwd, (x, branch, torch.ones(8, device=device, requires_grad=True), EPS))
