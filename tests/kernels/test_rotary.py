import pytest
import torch

from nvlm_kernels._backend import use_triton
from nvlm_kernels.ops.rotary import BLOCK, _cache, _fwd, rotary, rotary_cache, rotary_cache_ref, rotary_ref
from tests.util import check_op, planted

# batch, tokens, heads, kv heads, head_dim
SHAPES = [
    (1, 1, 1, 1, 2),
    (2, 3, 6, 3, 32),
    (1, 3, 64, 8, 128),
    (2, 5, 4, 2, 80),
    (1, BLOCK // 16 // 2, 1, 1, 32),  # forward: one program, full
    (1, BLOCK // 16 // 2 + 1, 1, 1, 32),
    (1, BLOCK // 16 // 3 + 1, 1, 1, 32),  # backward and cache: some rows more than a program
    (0, 3, 2, 1, 8),
    (2, 0, 2, 1, 8),
]


def _inputs(batch, tokens, heads, kv_heads, size, dtype, device):
    """qkv and, not only as angles make them, cos and sin: the halves differ."""
    qkv = torch.randn(batch, tokens, (heads + 2 * kv_heads) * size, dtype=dtype, device=device)
    return qkv, *torch.randn(2, batch, tokens, size, dtype=dtype, device=device)


def _bound(op, cos, sin, heads, kv_heads):
    """As a function of qkv alone: cos and sin have no gradient."""
    return lambda qkv: op(qkv, cos.to(qkv), sin.to(qkv), heads, kv_heads)


def _check(qkv, *rest):
    check_op(_bound(rotary, *rest), _bound(rotary_ref, *rest), qkv)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    qkv, cos, sin = _inputs(*shape, dtype, device)
    _check(qkv, cos, sin, *shape[2:4])


def test_is_the_rotation_of_the_model(device):
    """Position p turns pairs (x[i], x[i + D/2]) by p * f[i]: so q.k depends on the distance alone."""
    freqs = 10000.0 ** -(torch.arange(16, device=device) / 16)
    x = torch.randn(3 * 32, device=device).expand(1, 9, 96)
    angles = torch.arange(9, device=device)[:, None] * freqs
    angles = torch.cat([angles, angles], -1)[None]
    q, k = rotary(x, angles.cos(), angles.sin(), 1, 1)
    assert q.shape == k.shape == (1, 9, 1, 32)
    scores = q[0, :, 0] @ k[0, :, 0].T
    torch.testing.assert_close(scores[:-2, 2:].diag(), scores[0, 2].expand(7), rtol=1e-4, atol=1e-4)
    turned = torch.polar(torch.ones(9, 16, device=device), angles[0, :, :16]) * torch.complex(
        x[0, :, :16], x[0, :, 16:32]
    )
    torch.testing.assert_close(q[0, :, 0], torch.cat([turned.real, turned.imag], -1))


def test_v_is_not_read(dtype, device):
    """Inf where v is; its gradient is exactly 0."""
    qkv, cos, sin = _inputs(2, 5, 4, 2, 16, dtype, device)
    qkv[..., -32:] = float("inf")
    _check(qkv, cos, sin, 4, 2)
    qkv.requires_grad_()
    q, k = rotary(qkv, cos, sin, 4, 2)
    (grad,) = torch.autograd.grad(q.sum() + k.sum(), qkv)
    assert torch.equal(grad[..., -32:], torch.zeros_like(grad[..., -32:]))
    assert grad[..., :-32].abs().max() > 0


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output(used, dtype, device):
    qkv, cos, sin = _inputs(2, 3, 4, 2, 16, dtype, device)
    op, ref = (_bound(f, cos, sin, 4, 2) for f in (rotary, rotary_ref))
    check_op(lambda x: op(x)[used], lambda x: ref(x)[used], qkv)


def test_tokens_do_not_meet(dtype, device):
    qkv, cos, sin = _inputs(1, 5, 2, 1, 32, dtype, device)
    qkv[:, 2] = float("nan")
    q, k = rotary(qkv, cos, sin, 2, 1)
    for out in (q, k):
        assert out[:, 2].isnan().all() and out[:, [0, 1, 3, 4]].isfinite().all()


def test_guarded_and_unaligned(dtype, device):
    qkv, cos, sin = (planted(t) for t in _inputs(2, 7, 4, 2, 40, dtype, device))
    for got, want in zip(rotary(qkv, cos, sin, 4, 2), rotary_ref(qkv, cos, sin, 4, 2)):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=5e-3)


def test_strided_input(dtype, device):
    qkv, cos, sin = (t.transpose(0, 1) for t in _inputs(3, 2, 4, 2, 16, dtype, device))
    _check(qkv, cos, sin, 4, 2)


def test_bytes(memory, dtype):
    if memory is None:
        pytest.skip("counted in the interpreter")
    qkv, cos, sin = _inputs(1, 58, 6, 3, 32, dtype, "cpu")
    q, k = rotary(qkv.requires_grad_(), cos, sin, 6, 3)
    moved = memory.total()
    assert moved.unique_loaded == qkv.nbytes * 9 // 12 + 2 * cos.nbytes
    assert moved.loaded == moved.unique_loaded + 2 * 2 * cos[0, 0].nbytes  # two tokens have heads in two programs
    assert moved.stored == q.nbytes + k.nbytes
    (q.sum() + k.sum()).backward()
    assert memory.access["_bwd_kernel", "dq_ptr"].loaded == q.nbytes
    assert memory.access["_bwd_kernel", "dk_ptr"].loaded == k.nbytes
    assert memory.access["_bwd_kernel", "dqkv_ptr"].stored == qkv.nbytes


def _written(op):
    """As a function that returns new caches: [layers, B, S, Hkv, D] of which layer 1 is written."""

    def run(qkv, cos, sin, k_caches, v_caches, positions, num_heads):
        k_caches, v_caches = k_caches.clone(), v_caches.clone()
        q = op(qkv, cos, sin, k_caches[1], v_caches[1], positions, num_heads)
        return q, k_caches, v_caches

    return run


def _caches(batch, slots, kv_heads, size, dtype, device):
    return torch.randn(2, 2, batch, slots, kv_heads, size, dtype=dtype, device=device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cache_matches_reference(shape, dtype, device):
    batch, tokens, heads, kv_heads, size = shape
    slots = tokens + 3
    positions = torch.rand(batch, slots, device=device).argsort(1)[:, :tokens]
    caches = _caches(batch, slots, kv_heads, size, dtype, device)
    inputs = *_inputs(*shape, dtype, device), *caches, positions, heads
    check_op(_written(rotary_cache), _written(rotary_cache_ref), *inputs, gradients=False)
    v = _written(rotary_cache)(*inputs)[2]
    want = caches[1].clone()
    rows = torch.arange(batch, device=device)[:, None]
    want[1][rows, positions] = inputs[0].unflatten(-1, (-1, size))[:, :, heads + kv_heads :]
    assert torch.equal(v, want)  # v to the bit, and nothing else in any layer


@pytest.mark.parametrize("dims", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)], ids=str)
def test_cache_of_any_layout(dims, dtype, device):
    """[B, S, Hkv, D] as views with their axes in another order in memory; k's and v's layouts differ."""
    qkv, cos, sin = _inputs(2, 2, 4, 2, 16, dtype, device)
    positions = torch.tensor([[4, 0], [2, 3]], device=device)
    want = [torch.zeros(2, 5, 2, 16, dtype=dtype, device=device) for _ in range(2)]
    k = torch.zeros_like(want[0]).permute(dims).contiguous().permute(torch.tensor(dims).argsort().tolist())
    v = torch.zeros_like(want[1])
    rotary_cache(qkv, cos, sin, k, v, positions, 4)
    rotary_cache_ref(qkv, cos, sin, *want, positions, 4)
    torch.testing.assert_close(k, want[0], rtol=2e-3, atol=5e-3)
    assert torch.equal(v, want[1])


@pytest.mark.parametrize("outside", [-1, 5, 2**40])
def test_position_outside_writes_nothing(outside, dtype, memory):
    qkv, cos, sin = _inputs(2, 2, 4, 2, 16, dtype, "cpu")
    k, v = torch.full((2, 2, 5, 2, 16), 7.0, dtype=dtype)
    q = rotary_cache(qkv, cos, sin, k, v, torch.tensor([[1, outside], [outside, 3]]), 4)
    torch.testing.assert_close(q, rotary_ref(qkv, cos, sin, 4, 2)[0], rtol=2e-3, atol=5e-3)
    for cache in (k, v):
        written = (cache != 7).flatten(2).any(-1)
        assert written.tolist() == [[False, True, False, False, False], [False, False, False, True, False]]
    if memory is not None:
        assert memory.access["_cache_kernel", "k_cache_ptr"].stored == k[0, 0].nbytes * 2


def test_cache_bytes(memory, dtype):
    if memory is None:
        pytest.skip("counted in the interpreter")
    qkv, cos, sin = _inputs(4, 1, 6, 3, 32, dtype, "cpu")
    k, v = _caches(4, 20, 3, 32, dtype, "cpu")[0]
    q = rotary_cache(qkv, cos, sin, k, v, torch.arange(4)[:, None], 6)
    assert memory.launches == ["_cache_kernel"]
    moved = memory.total()
    assert moved.loaded == moved.unique_loaded == qkv.nbytes + 2 * cos.nbytes + 4 * 8
    assert moved.stored == q.nbytes + 2 * 4 * 3 * 32 * k.element_size()


QKV, ANGLE, CACHE, AT = torch.zeros(2, 3, 32), torch.zeros(2, 3, 8), torch.zeros(2, 5, 1, 8), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    "qkv, cos, sin, heads, kv_heads, match",
    [
        (torch.zeros(2, 3, 31), ANGLE, ANGLE, 2, 1, r"qkv must be \(2, 3, 32\), got \(2, 3, 31\)"),
        (QKV[:1], ANGLE, ANGLE, 2, 1, r"qkv must be \(2, 3, 32\), got \(1, 3, 32\)"),
        (QKV, ANGLE[:, :1], ANGLE, 2, 1, r"cos and sin must be .*got \(2, 1, 8\), \(2, 3, 8\)"),
        (QKV, ANGLE[0], ANGLE[0], 2, 1, "cos and sin must be"),
        (torch.zeros(2, 3, 28), ANGLE[..., :7], ANGLE[..., :7], 2, 1, "D even"),
        (QKV, ANGLE, ANGLE, 0, 2, "heads must be at least 1, got 0 of q and 2 of k"),
        (QKV, ANGLE.half(), ANGLE, 2, 1, "share dtype and device, got .*float16"),
        (QKV, ANGLE, ANGLE.to("meta"), 2, 1, "share dtype and device, got .*meta"),
        (QKV.long(), ANGLE.long(), ANGLE.long(), 2, 1, "qkv must be float32.*got torch.int64"),
        (QKV, ANGLE.clone().requires_grad_(), ANGLE, 2, 1, "cos and sin have no gradient"),
    ],
)
def test_rejects(qkv, cos, sin, heads, kv_heads, match):
    with pytest.raises(ValueError, match=f"rotary: .*{match}"):
        rotary(qkv, cos, sin, heads, kv_heads)


@pytest.mark.parametrize(
    "qkv, k, v, positions, match",
    [
        (QKV[..., :31], CACHE, CACHE, AT, "qkv must be"),
        (
            QKV,
            CACHE,
            CACHE[:, :4],
            AT,
            r"k_cache and v_cache must be \[B, S, Hkv, D\], got \(2, 5, 1, 8\), \(2, 4, 1, 8\)",
        ),
        (QKV, CACHE[0], CACHE[0], AT, "k_cache and v_cache must be"),
        (QKV, CACHE[:1], CACHE[:1], AT, r"k_cache must be \[2, S, Hkv, 8\], got \(1, 5, 1, 8\)"),
        (QKV, CACHE[..., :4], CACHE[..., :4], AT, r"k_cache must be \[2, S, Hkv, 8\], got \(2, 5, 1, 4\)"),
        (QKV, CACHE.half(), CACHE.half(), AT, "the caches must be torch.float32 on cpu, got torch.float16"),
        (QKV, CACHE, CACHE.to("meta"), AT, "the caches must be torch.float32 on cpu, got .*meta"),
        (QKV, CACHE, torch.zeros(2, 5, 1, 16)[..., ::2], AT, "the caches' last axis must be dense"),
        (QKV, CACHE, CACHE, AT[:, :1], r"positions must be torch.int64 \(2, 3\) on cpu, got torch.int64 \(2, 1\)"),
        (QKV, CACHE, CACHE, AT.int(), "got torch.int32"),
        (QKV, CACHE, CACHE, AT.to("meta"), "on meta"),
    ],
)
def test_cache_rejects(qkv, k, v, positions, match):
    with pytest.raises(ValueError, match=f"rotary_cache: .*{match}"):
        rotary_cache(qkv, ANGLE, ANGLE, k, v, positions, 2)


def test_fp64_has_no_kernel(device):
    qkv, angle = QKV.double().to(device), ANGLE.double().to(device)
    if not use_triton(qkv):
        assert rotary(qkv, angle, angle, 2, 1)[0].dtype == torch.float64
    else:
        with pytest.raises(ValueError, match="rotary: qkv must be float32"):
            rotary(qkv, angle, angle, 2, 1)


@pytest.mark.gpu
def test_opcheck(device):
    qkv, cos, sin = _inputs(2, 3, 4, 2, 16, torch.float32, device)
    torch.library.opcheck(_fwd, (qkv.requires_grad_(), cos, sin, 4, 2))
    k, v = _caches(2, 5, 2, 16, torch.float32, device)[:, 1]
    torch.library.opcheck(
        _cache, (qkv.detach(), cos, sin, k, v, torch.zeros(2, 3, dtype=torch.int64, device=device), 4)
    )
