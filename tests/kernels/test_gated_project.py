import pytest
import torch
import torch.nn.functional as F

from bench.proofs.machine import CHIPS, capture, compile_launch
from nvlm_kernels import _backend
from nvlm_kernels.ops import gated_project as module
from nvlm_kernels.ops.gated_project import _fwd, fold_gate, gated_project, gated_project_ref
from nvlm_kernels.ops.tanh_gated_add import tanh_gated_add_ref
from tests.util import check_op, planted

interpreted = pytest.mark.skipif(not _backend.INTERPRET, reason="traces the interpreter")


def make(shape, inner, width, dtype, device="cpu", gate=0.7):
    """attn, weight, residual, gate for rows of that shape."""
    attn = torch.randn(*shape, inner, dtype=dtype, device=device)
    weight = torch.randn(width, inner, dtype=dtype, device=device) / inner**0.5
    residual = torch.randn(*shape, width, dtype=dtype, device=device)
    return attn, weight, residual, torch.tensor([gate], dtype=dtype, device=device)


def pattern(shape, device="cpu"):
    """About a third of the rows False, the first and the last among them where there are three."""
    rows = torch.arange(torch.Size(shape).numel(), device=device) % 3 != 0
    rows[-1:] = rows.numel() < 3
    return rows.view(shape)


def gradients(inputs, rows):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = gated_project(*inputs, rows)
    dy = torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("masked", [False, True], ids=["every row", "some rows"])
@pytest.mark.parametrize(
    "shape, inner, width",
    [
        ((1,), 1, 1),
        ((2, 3), 192, 192),  # the micro models
        ((16,), 129, 65),  # one more than a block in each direction, as far as the tiles of few rows go
        ((17,), 65, 40),
        ((65,), 40, 129),
        ((2, 65), 129, 24),
        ((2, 0), 16, 24),
    ],
    ids=str,
)
def test_matches_reference(shape, inner, width, masked, dtype, device):
    rows = pattern(shape, device) if masked else None
    check_op(gated_project, gated_project_ref, *make(shape, inner, width, dtype, device), rows)


@pytest.mark.parametrize("gate", [0.0, 1e-4, -1.5, 30.0])
def test_gates(gate, dtype, device):
    check_op(gated_project, gated_project_ref, *make((5,), 32, 48, dtype, device, gate), None)


def test_closed_gate_is_the_residual(dtype, device):
    attn, weight, residual, gate = make((3, 4), 32, 48, dtype, device, 0.0)
    assert torch.equal(gated_project(attn, weight, residual, gate), residual)


def test_fp32_gate(dtype, device):
    attn, weight, residual, gate = make((7,), 32, 48, dtype, device)
    check_op(gated_project, gated_project_ref, attn, weight, residual, gate.float(), pattern((7,), device))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(2, 5), (70,)], ids=str)
def test_masked_rows_do_nothing(shape, value, dtype, device):
    inputs, rows = make(shape, 40, 24, dtype, device), pattern(shape, device)
    inputs[2].view(-1, 24)[0, :2] = torch.tensor([-0.0, 65504.0])
    inputs[0][~rows] = 0
    clean = gradients(inputs, rows)
    inputs[0][~rows] = value
    got = gradients(inputs, rows)
    for a, b in zip(clean, got):
        assert a.isfinite().all() and torch.equal(a, b)
    y, dattn, dweight, _, dgate = got
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert torch.equal(y[~rows].view(bits), inputs[2][~rows].view(bits)), "not the residual's bits"
    assert (dattn[~rows] == 0).all() and (dattn[rows] != 0).any(-1).all()
    live = [t[rows] if t.shape[:-1] == shape else t for t in inputs]
    alone = [t.detach().double().requires_grad_() for t in live]
    dy = torch.linspace(-1, 2, y.numel(), device=device).view(y.shape).to(dtype)[rows].double()
    _, want, _, want_gate = torch.autograd.grad(gated_project_ref(*alone, None), alone, dy)
    for a, b in ((dweight, want), (dgate, want_gate)):
        assert (a - b).abs().max() <= 8 * torch.finfo(dtype).eps * (1 + b.abs().max())


@interpreted
def test_masked_rows_are_not_read(memory, device):
    rows = pattern((70,), device)
    gradients(make((70,), 40, 24, torch.float32, device), rows)
    for kernel in ("_fwd_kernel", "_dattn_kernel", "_dweight_kernel"):
        assert memory.access[kernel, "attn_ptr"].unique_loaded == rows.sum() * 40 * 4, kernel


def test_no_row_sees(memory, dtype, device):
    inputs = make((3, 6), 32, 48, dtype, device)
    inputs[0].fill_(float("nan"))
    y, dattn, dweight, _, dgate = gradients(inputs, torch.zeros(3, 6, dtype=torch.bool, device=device))
    assert torch.equal(y, inputs[2])
    assert not dattn.any() and not dweight.any() and not dgate.any()
    if memory is not None:
        read = {key: access.loaded for key, access in memory.access.items() if access.loaded}
        assert not [key for key in read if key[1] in ("attn_ptr", "weight_ptr")]


def test_nan_in_a_masked_gradient_stays_there(dtype, device):
    inputs = [t.requires_grad_() for t in make((6,), 32, 48, dtype, device)]
    rows = pattern((6,), device)
    dy = torch.randn(6, 48, dtype=dtype, device=device)
    dy[~rows] = float("nan")
    dattn, dweight, dresidual, dgate = torch.autograd.grad(gated_project(*inputs, rows), inputs, dy)
    if _backend.use_triton(dy):
        assert dattn.isfinite().all() and dweight.isfinite().all() and dgate.isfinite().all()
    assert torch.equal(dresidual.isnan(), dy.isnan())


@pytest.mark.parametrize("masked", [False, True])
def test_unaligned_and_guarded(masked, dtype, device):
    inputs = make((2, 9), 40, 24, dtype, device)
    rows = pattern((2, 9), device) if masked else None
    for a, b in zip(gradients(inputs, rows), gradients([planted(t) for t in inputs], rows)):
        assert torch.equal(a, b)


@interpreted
@pytest.mark.parametrize("group", [1, 2, 5])
def test_any_order_of_programs(group, device, monkeypatch):
    inputs = make((130,), 16, 140, torch.float32, device)  # 3 by 3 tiles
    usual = gated_project(*inputs)
    monkeypatch.setattr(module, "GROUP", group)
    assert torch.equal(gated_project(*inputs), usual)


def test_strided_input(dtype, device):
    attn = torch.randn(2, 4, 5, 8, dtype=dtype, device=device)  # [B, H, T, D], as attention may leave it
    weight, residual = (
        torch.randn(32, 24, dtype=dtype, device=device),
        torch.randn(24, 5, 2, dtype=dtype, device=device),
    )
    rows = pattern((5, 2), device)

    def through(op):
        return lambda attn, weight, residual, gate: op(
            attn.transpose(1, 2).flatten(2), weight.T, residual.permute(2, 1, 0), gate, rows.T
        )

    gate = torch.tensor([0.3], dtype=dtype, device=device)
    check_op(through(gated_project), through(gated_project_ref), attn, weight / 6, residual, gate)


@interpreted
def test_branch_is_not_stored(memory, device):
    """The residual and y are all that a forward moves beside attn and weight, and a backward makes no branch."""
    attn, weight, residual, gate = (t.requires_grad_() for t in make((2, 8), 64, 48, torch.float16, device))
    y = gated_project(attn, weight, residual, gate)
    assert {key: a.stored for key, a in memory.access.items() if a.stored} == {("_fwd_kernel", "y_ptr"): 16 * 48 * 2}
    y.sum().backward()
    stored = {key: a.stored for key, a in memory.access.items() if a.stored and key[0] != "_fwd_kernel"}
    assert stored == {
        ("_dattn_kernel", "dattn_ptr"): 16 * 64 * 2,
        ("_dattn_kernel", "dt_ptr"): 4,
        ("_dweight_kernel", "dweight_ptr"): 48 * 64 * 2,
    }


@interpreted
def test_frozen_weight_costs_no_product(memory, device):
    attn, weight, residual, gate = make((2, 8), 64, 48, torch.float32, device)
    gated_project(attn.requires_grad_(), weight, residual, gate).sum().backward()
    assert memory.launches == ["_fwd_kernel", "_dattn_kernel"]
    memory.launches.clear()
    gated_project(attn.detach(), weight.requires_grad_(), residual, gate).sum().backward()
    assert memory.launches == ["_fwd_kernel", "_dweight_kernel"]


def test_without_triton_it_is_linear_and_gated_add(monkeypatch):
    """What the runtime computes today, bit for bit."""
    monkeypatch.setattr(_backend, "EAGER", True)
    attn, weight, residual, gate = make((2, 5), 40, 24, torch.float32)
    today = tanh_gated_add_ref(residual, F.linear(attn, weight), gate)
    assert torch.equal(gated_project(attn, weight, residual, gate), today)
    attn[0] = 0  # what attention leaves in a row that sees nothing
    rows = torch.arange(2)[:, None].expand(2, 5) > 0
    today = tanh_gated_add_ref(residual, F.linear(attn, weight), gate)
    assert torch.equal(gated_project(attn, weight, residual, gate, rows), today)


def test_folded(dtype, device):
    attn, weight, residual, gate = make((3,), 64, 48, dtype, device)
    folded = fold_gate(weight, gate.float())
    exact = gate.double().tanh() * weight.double()
    assert folded.dtype == dtype
    ulps = 0.501 if dtype.itemsize == 2 else 2  # fp32: tanh itself rounds too
    assert ((folded.double() - exact).abs() <= ulps * torch.finfo(dtype).eps * exact.abs() + 2**-25).all()
    close = dict(atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
    ours = gated_project(attn, weight, residual, gate)
    torch.testing.assert_close(F.linear(attn, folded) + residual, ours, **close)


@pytest.mark.skipif(_backend.INTERPRET, reason="the interpreter has no compiler")
@pytest.mark.parametrize("masked", [False, True])
def test_fp32_is_not_multiplied_in_tf32(masked, monkeypatch):
    """A load of 8 bits in a mask is enough for Triton 3.7 to take TF32 on sm_100, against input_precision="ieee"."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    inputs = [t.requires_grad_() for t in make((256,), 64, 64, torch.float32)]
    rows = pattern((256,)) if masked else None
    launches = capture(lambda: torch.autograd.grad(gated_project(*inputs, rows).sum(), inputs))
    assert len(launches) == 3
    for launch in launches:
        assert "tf32" not in compile_launch(launch, CHIPS["sm_100"]).asm["ptx"], launch.name


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(attn=zeros(2, 3, 32, dtype=torch.int32)), "attn must be floating"),
        (dict(attn=zeros(())), "attn must be floating"),
        (dict(weight=zeros(32)), r"weight must be \[C, 32\]"),
        (dict(weight=zeros(48, 31)), r"weight must be \[C, 32\], got \(48, 31\)"),
        (dict(residual=zeros(1, 3, 48)), r"residual must have shape \(2, 3, 48\), got \(1, 3, 48\)"),
        (dict(residual=zeros(6, 48)), "residual must have shape"),
        (dict(gate=zeros(())), r"gate must have shape \(1,\), got \(\)"),
        (dict(gate=zeros(48)), "gate must have shape"),
        (dict(rows=zeros(2, 1, dtype=torch.bool)), r"rows must have shape \(2, 3\), got \(2, 1\)"),
        (dict(rows=zeros(2, 3)), "rows must be torch.bool on cpu, got torch.float32"),
        (dict(weight=zeros(48, 32, dtype=torch.float16)), "weight must be torch.float32 on cpu, got torch.float16"),
        (dict(residual=zeros(2, 3, 48, dtype=torch.float64)), "residual must be torch.float32"),
        (dict(gate=zeros(1, dtype=torch.float16)), "gate must be torch.float32 on cpu, got torch.float16"),
        (dict(gate=zeros(1, device="meta")), "gate must be torch.float32 on cpu, got torch.float32 on meta"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_rejects(change, message):
    arguments = dict(zip(("attn", "weight", "residual", "gate"), make((2, 3), 32, 48, torch.float32)))
    with pytest.raises(ValueError, match=f"gated_project: {message}"):
        gated_project(**(arguments | change))


def test_fold_rejects():
    with pytest.raises(ValueError, match="fold_gate: weight must be floating"):
        fold_gate(torch.zeros(3, 4), torch.zeros(3))


def opcheck(device, **options):
    inputs = [t.requires_grad_() for t in make((6,), 32, 48, torch.float32, device)]
    torch.library.opcheck(_fwd, (*inputs, pattern((6,), device).to(torch.int32)), **options)


@interpreted
def test_opcheck_without_a_gpu(device):
    opcheck(device, test_utils=("test_schema", "test_autograd_registration"))


@pytest.mark.gpu
def test_opcheck(device):
    opcheck(device)


@pytest.mark.gpu
def test_compiles(dtype, device):
    inputs = make((2, 8), 64, 48, dtype, device)
    rows = pattern((2, 8), device)
    torch.testing.assert_close(
        torch.compile(gated_project, fullgraph=True)(*inputs, rows), gated_project(*inputs, rows)
    )
