import pytest
import torch

from nvlm_kernels._backend import use_triton
from nvlm_kernels.ops.swiglu import BLOCK, _fwd, swiglu, swiglu_ref
from tests.util import check_op, planted


@pytest.mark.parametrize(
    "rows, width",
    [
        ((1,), 1),
        ((2, 7), 512),
        ((9,), 256),
        ((3,), BLOCK),
        ((2,), BLOCK + 1),
        ((2,), 29568 // 8),
        ((3, 5), 100),
        ((), 64),
    ],
    ids=str,
)
def test_matches_reference(rows, width, dtype, device):
    check_op(swiglu, swiglu_ref, torch.randn(*rows, 2 * width, dtype=dtype, device=device))


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 6), (3, 0)], ids=str)
def test_nothing(shape, dtype, device):
    check_op(swiglu, swiglu_ref, torch.randn(shape, dtype=dtype, device=device))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, under the interpreter
def test_large_gates(dtype, device):
    """exp overflows beyond 88 in fp32: silu is then the gate, or 0."""
    gate = torch.tensor([-60000.0, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0, 60000.0], dtype=dtype, device=device)
    with torch.no_grad():
        y = swiglu(torch.cat([gate, torch.ones_like(gate)]))
    torch.testing.assert_close(y, torch.nn.functional.silu(gate), rtol=2e-3, atol=1e-6)
    check_op(swiglu, swiglu_ref, torch.cat([gate, torch.full_like(gate, 0.5)]))


def test_guarded_and_unaligned(dtype, device):
    gate_up = planted(torch.randn(3, 7, 300, dtype=dtype, device=device))
    torch.testing.assert_close(swiglu(gate_up), swiglu_ref(gate_up), rtol=2e-3, atol=2e-3)


def test_strided_input(dtype, device):
    check_op(swiglu, swiglu_ref, torch.randn(5, 64, 3, dtype=dtype, device=device).transpose(-1, -2))


def test_bytes(memory, dtype):
    if memory is None:
        pytest.skip("counted in the interpreter")
    gate_up = torch.randn(5, 2 * 600, dtype=dtype, requires_grad=True)
    y = swiglu(gate_up)
    moved = memory.total()
    assert (moved.loaded, moved.stored) == (gate_up.nbytes, y.nbytes)
    y.sum().backward()
    moved = memory.total()
    assert (moved.loaded, moved.stored) == (2 * gate_up.nbytes + y.nbytes, y.nbytes + gate_up.nbytes)


@pytest.mark.parametrize(
    "gate_up, match",
    [
        (torch.zeros(2, 3), r"got torch.float32 \(2, 3\)"),
        (torch.zeros(()), r"got torch.float32 \(\)"),
        (torch.zeros(2, 4, dtype=torch.int32), "got torch.int32"),
    ],
)
def test_rejects(gate_up, match):
    with pytest.raises(ValueError, match=f"swiglu: gate_up must be .*{match}"):
        swiglu(gate_up)


def test_fp64_has_no_kernel(device):
    gate_up = torch.randn(2, 4, dtype=torch.float64, device=device)
    if not use_triton(gate_up):
        assert swiglu(gate_up).dtype == torch.float64
    else:
        with pytest.raises(ValueError, match="swiglu: gate_up must be float32"):
            swiglu(gate_up)


@pytest.mark.gpu
def test_opcheck(device):
    torch.library.opcheck(_fwd, (torch.randn(3, 8, device=device, requires_grad=True),))
