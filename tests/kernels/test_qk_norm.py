import pytest
import torch

from nvlm_kernels._backend import use_triton
from nvlm_kernels.ops.qk_norm import (
    _from_sums,
    _fwd,
    _sums,
    qk_norm,
    qk_norm_from_sums,
    qk_norm_from_sums_ref,
    qk_norm_ref,
    qk_sum_squares,
    qk_sum_squares_ref,
)
from nvlm_kernels.ops.rms_norm import tile
from tests.util import check_op, planted

EPS = 1e-6
ROWS = tile(192)[0]  # of a program
ROWS_AND_WIDTH = [
    ((1,), 1),
    ((2, 9), 160),
    ((ROWS,), 192),
    ((ROWS + 1,), 192),
    ((2,), 3200),
    ((), 100),
    ((3,), 257),
    ((2, 0), 8),
]


def _inputs(rows, width, dtype, device, scale=1.0):
    """qkv with Inf where v is, which no op here may read; and the weights."""
    qkv = torch.randn(*rows, 3 * width, dtype=dtype, device=device) * scale
    qkv[..., 2 * width :] = float("inf")
    return qkv, *torch.randn(2, width, dtype=dtype, device=device)


def _sums_of(qkv):
    return qk_sum_squares_ref(qkv).detach()


@pytest.mark.parametrize("rows, width", ROWS_AND_WIDTH, ids=str)
def test_matches_reference(rows, width, dtype, device):
    check_op(qk_norm, qk_norm_ref, *_inputs(rows, width, dtype, device), EPS)


@pytest.mark.parametrize("rows, width", ROWS_AND_WIDTH, ids=str)
def test_sum_squares(rows, width, dtype, device):
    check_op(qk_sum_squares, qk_sum_squares_ref, _inputs(rows, width, dtype, device)[0])


@pytest.mark.parametrize("rows, width", ROWS_AND_WIDTH, ids=str)
def test_from_sums(rows, width, dtype, device):
    """With sums of twice the width, unlike those of the rows themselves."""
    qkv, q_weight, k_weight = _inputs(rows, width, dtype, device)
    sums = _sums_of(qkv) + width * torch.rand(*rows, 2, device=device)
    check_op(qk_norm_from_sums, qk_norm_from_sums_ref, qkv, sums, 2 * width, q_weight, k_weight, EPS)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_small_rows(eps, dtype, device):
    qkv, q_weight, k_weight = _inputs((3,), 200, dtype, device, scale=1e-3)
    check_op(qk_norm, qk_norm_ref, qkv, q_weight, k_weight, eps)
    check_op(qk_norm_from_sums, qk_norm_from_sums_ref, qkv, _sums_of(qkv), 200, q_weight, k_weight, eps)


def test_programs_of_several_blocks(dtype, device, monkeypatch):
    """Backward: 5 blocks of rows in 2 programs, the last block not full."""
    monkeypatch.setattr("nvlm_kernels.ops.qk_norm.PARTIALS", 2)
    qkv, q_weight, k_weight = _inputs((4 * ROWS + 6,), 192, dtype, device)
    check_op(qk_norm, qk_norm_ref, qkv, q_weight, k_weight, EPS)
    check_op(qk_norm_from_sums, qk_norm_from_sums_ref, qkv, _sums_of(qkv), 192, q_weight, k_weight, EPS)


def _in_two_ranks(qkv, q_weight, k_weight, eps):
    """qk_norm of ranks that hold the first third and the others of every head's columns, sums added between."""
    width, cut = len(q_weight), len(q_weight) // 3
    q, k, v = qkv.chunk(3, dim=-1)
    ranks = [slice(0, cut), slice(cut, width)]
    local = [torch.cat([t[..., cols] for t in (q, k, v)], dim=-1) for cols in ranks]
    sums = sum(qk_sum_squares(x) for x in local)
    outs = [qk_norm_from_sums(x, sums, width, q_weight[c], k_weight[c], eps) for x, c in zip(local, ranks)]
    return torch.cat([out[0] for out in outs], dim=-1), torch.cat([out[1] for out in outs], dim=-1)


def _in_two_steps(qkv, q_weight, k_weight, eps):
    return qk_norm_from_sums(qkv, qk_sum_squares(qkv), len(q_weight), q_weight, k_weight, eps)


@pytest.mark.parametrize("op", [_in_two_steps, _in_two_ranks])
def test_two_steps_are_one(op, dtype, device):
    """Outputs and all gradients, those through the sums included."""
    check_op(op, qk_norm_ref, *_inputs((2, 5), 192, dtype, device), EPS)


def test_gradient_of_v_is_zero(dtype, device):
    qkv, q_weight, k_weight = _inputs((2, 5), 100, dtype, device)
    qkv.requires_grad_()
    for op in (qk_norm, _in_two_steps):
        q, k = op(qkv, q_weight, k_weight, EPS)
        (grad,) = torch.autograd.grad(q.sum() + k.sum(), qkv)
        assert torch.equal(grad[..., 200:], torch.zeros_like(grad[..., 200:]))
        assert (grad[..., :200] != 0).float().mean() > 0.99


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output(used, dtype, device):
    qkv, q_weight, k_weight = _inputs((2, 5), 100, dtype, device)
    weights = [q_weight, k_weight]

    def only(op):
        def run(qkv, weight):
            return op(qkv, *(weight if i == used else weights[i].to(weight) for i in range(2)), EPS)[used]

        return run

    check_op(only(qk_norm), only(qk_norm_ref), qkv, weights[used])


def test_guarded_and_unaligned(dtype, device):
    qkv, *weights = (planted(t) for t in _inputs((3, 5), 100, dtype, device))
    want = qk_norm_ref(qkv, *weights, EPS)
    for op in (qk_norm, _in_two_steps):
        for got, expected in zip(op(qkv, *weights, EPS), want):
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_strided_input(dtype, device):
    qkv = torch.randn(5, 96, 4, dtype=dtype, device=device).transpose(-1, -2)
    q_weight, k_weight = torch.randn(2, 64, dtype=dtype, device=device)[:, ::2]
    check_op(qk_norm, qk_norm_ref, qkv, q_weight, k_weight, EPS)
    sums = _sums_of(qkv).flip(-1).transpose(0, 1).contiguous().transpose(0, 1)
    check_op(qk_norm_from_sums, qk_norm_from_sums_ref, qkv, sums, 32, q_weight, k_weight, EPS)


@pytest.mark.parametrize("op", [qk_norm, _in_two_steps])
def test_rounds_before_the_weight(op, device):
    qkv, q_weight, k_weight = _inputs((8,), 512, torch.float16, device)
    for got, want in zip(op(qkv, q_weight, k_weight, EPS), qk_norm_ref(qkv, q_weight, k_weight, EPS)):
        assert (got == want).float().mean() > 0.99  # one rounding instead of two: 0.74


def test_bytes(memory, dtype):
    if memory is None:
        pytest.skip("counted in the interpreter")
    qkv, q_weight, k_weight = (t.requires_grad_() for t in _inputs((2 * ROWS + 8,), 192, dtype, "cpu"))
    third = qkv.nbytes // 3
    q, k = qk_norm(qkv, q_weight, k_weight, EPS)
    assert memory.access["_fwd_kernel", "qkv_ptr"].loaded == 2 * third
    assert memory.total().stored == 2 * third
    (q + k).sum().backward()
    assert memory.access["_bwd_kernel", "qkv_ptr"].loaded == 2 * third
    assert memory.access["_bwd_kernel", "dq_ptr"].loaded == third
    assert memory.access["_bwd_kernel", "dk_ptr"].loaded == third
    assert memory.access["_bwd_kernel", "dqkv_ptr"].stored == 3 * third
    for name in ("dq_weight_ptr", "dk_weight_ptr"):
        assert memory.access["_bwd_kernel", name].stored == 3 * 192 * 4  # of three programs
    qk_sum_squares(qkv)
    assert memory.access["_sums_kernel", "qkv_ptr"].loaded == 2 * third
    assert memory.access["_sums_kernel", "sums_ptr"].stored == (2 * ROWS + 8) * 2 * 4


ONE = torch.ones(2)
ROW = torch.zeros(4, 6)


@pytest.mark.parametrize(
    "qkv, q_weight, k_weight, eps, match",
    [
        (torch.zeros(4, 7), ONE, ONE, EPS, r"qkv must be \[\*, 3C\], got \(4, 7\)"),
        (torch.zeros(()), ONE, ONE, EPS, r"qkv must be \[\*, 3C\], got \(\)"),
        (ROW, torch.ones(1), ONE, EPS, r"q_weight must have shape \(2,\), got \(1,\)"),
        (ROW, ONE, torch.ones(6), EPS, r"k_weight must have shape \(2,\), got \(6,\)"),
        (ROW, ONE, ONE.half(), EPS, "k_weight must be torch.float32 on cpu, got torch.float16"),
        (ROW, ONE.to("meta"), ONE, EPS, "q_weight must be .* on meta"),
        (ROW.long(), ONE, ONE, EPS, "got torch.int64"),
        (ROW, ONE, ONE, -1.0, "eps must be above 0"),
    ],
)
def test_rejects(qkv, q_weight, k_weight, eps, match):
    with pytest.raises(ValueError, match=f"qk_norm: .*{match}"):
        qk_norm(qkv, q_weight, k_weight, eps)
    with pytest.raises(ValueError, match=f"qk_norm_from_sums: .*{match}"):
        qk_norm_from_sums(qkv, torch.zeros(4, 2), 2, q_weight, k_weight, eps)


@pytest.mark.parametrize(
    "sums, width, match",
    [
        (torch.zeros(4, 1), 2, r"sums must be torch.float32 \(4, 2\) on cpu, got torch.float32 \(4, 1\)"),
        (torch.zeros(1, 2), 2, "sums must be"),
        (torch.zeros(4, 2).half(), 2, "got torch.float16"),
        (torch.zeros(4, 2, device="meta"), 2, "on meta"),
        (torch.zeros(4, 2), 1, "width must be at least 2, got 1"),
    ],
)
def test_rejects_sums(sums, width, match):
    with pytest.raises(ValueError, match=f"qk_norm_from_sums: .*{match}"):
        qk_norm_from_sums(ROW, sums, width, ONE, ONE, EPS)


def test_rejects_rows_of_sum_squares():
    with pytest.raises(ValueError, match=r"qk_sum_squares: qkv must be \[\*, 3C\], got \(4, 7\)"):
        qk_sum_squares(torch.zeros(4, 7))


def test_fp64_has_no_kernel(device):
    qkv, weight = (
        torch.ones(2, 6, dtype=torch.float64, device=device),
        torch.ones(2, dtype=torch.float64, device=device),
    )
    if not use_triton(qkv):
        assert qk_norm(qkv, weight, weight, EPS)[0].dtype == torch.float64
    else:
        with pytest.raises(ValueError, match="qk_norm: x must be float32"):
            qk_norm(qkv, weight, weight, EPS)


@pytest.mark.gpu
def test_opcheck(device):
    qkv, q_weight, k_weight = (torch.randn(n, device=device, requires_grad=True) for n in ((4, 6), (2,), (2,)))
    sums = torch.rand(4, 2, device=device, requires_grad=True)
    torch.library.opcheck(_fwd, (qkv, q_weight, k_weight, EPS))
    torch.library.opcheck(_sums, (qkv,))
    torch.library.opcheck(_from_sums, (qkv, sums, 2, q_weight, k_weight, EPS))
