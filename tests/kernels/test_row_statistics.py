import pytest
import torch

from nvlm_kernels import _backend, row_statistics
from nvlm_kernels.ops.row_statistics import _fwd, row_statistics_ref
from tests.util import planted


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (2, 5, 160), (3, 7, 512), (2, 3, 513), (1, 9, 511), (2, 2, 3200), (0, 4, 8), (2, 0, 8)],
    ids=str,
)
def test_matches_reference(shape, dtype, device):
    x = torch.randn(shape, dtype=dtype, device=device)
    found = row_statistics(x)
    assert found.dtype == torch.float32 and torch.equal(found, row_statistics(x))
    torch.testing.assert_close(found.double(), row_statistics_ref(x.double()), rtol=5e-6, atol=1e-6)


def test_large_mean_cancels_nothing(dtype, device):
    """Rows of mean 1000 or -1000 and deviation 1, and rows of steps: an fp32 step of 1000 is 6e-5."""
    x = torch.randn(3, 4, 1300, dtype=dtype, device=device)
    x[0] += 1000
    x[1] -= 1000
    x[2, :, 600:] += 1000
    found, exact = row_statistics(x), row_statistics_ref(x.double())
    assert (found - exact)[..., 0].abs().max() < 1.3e-4
    assert ((found - exact) / exact)[..., 1].abs().max() < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_between_are_not_read(value, dtype, device):
    x = torch.full((3, 9, 70), value, dtype=dtype, device=device)
    inside = x[::2, 1:6, :64]
    inside.normal_()
    assert torch.equal(row_statistics(inside), row_statistics(inside.contiguous()))
    assert row_statistics(inside).isfinite().all()


def test_columns_apart_guarded_and_unaligned(dtype, device):
    x = torch.randn(2, 3, 150, dtype=dtype, device=device)
    torch.testing.assert_close(row_statistics(x[..., ::3]), row_statistics(x[..., ::3].contiguous()))
    torch.testing.assert_close(row_statistics(planted(x)), row_statistics(x))


def test_bytes(memory, dtype):
    if memory is None:
        pytest.skip("counted in the interpreter")
    x = torch.randn(3, 7, 600, dtype=dtype)
    row_statistics(x)
    assert memory.access["_statistics_kernel", "x_ptr"].loaded == x.nbytes
    assert memory.access["_statistics_kernel", "stats_ptr"].stored == 3 * 7 * 2 * 4


def test_has_no_gradient(device):
    assert not row_statistics(torch.randn(1, 2, 8, device=device, requires_grad=True)).requires_grad


@pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.zeros(1, 2, 0), torch.zeros(1, 2, 3, dtype=torch.int32)])
def test_rejects(x):
    with pytest.raises(ValueError, match=r"row_statistics: x must be floating \[N, P, C\], got torch"):
        row_statistics(x)


@pytest.mark.skipif(not _backend.INTERPRET, reason="runs the kernel")
def test_opcheck_without_a_gpu(device):
    torch.library.opcheck(_fwd, (torch.randn(2, 3, 8),), test_utils=("test_schema", "test_autograd_registration"))


@pytest.mark.gpu
def test_opcheck(device):
    torch.library.opcheck(_fwd, (torch.randn(2, 3, 8, device=device),))
