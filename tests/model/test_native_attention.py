"""The native attention against torch's, fp64 the judge; a row's bits in any call; who takes it."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nvlm_kernels import native
from nvlm_kernels.native import native_attention
from nvlm_runtime.engine.native import use_library
from nvlm_runtime.model import native_attention as route
from nvlm_runtime.model.cache import KVCache
from nvlm_runtime.model.past import CausalPast, make_past
from nvlm_runtime.model.vision_attention import attend
from tests.engine.test_batch import PARAMS, answers, fresh, requests
from tests.small import TEXT
from tests.util import check_op, planted


@pytest.fixture
def library(library):
    if not library.attention_level:
        pytest.skip("this CPU has no AVX512: prompts and tiles go through torch's attention")
    return library


def eager(q, k, v, intervals=None):
    """Torch's; a row that sees nothing gives 0."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    seen, mask = True, None
    if intervals is not None:
        keys = torch.arange(k.shape[2])
        mask = ((keys >= intervals[..., :1]) & (keys < intervals[..., 1:]))[:, None]  # [B, 1, T, S]
        seen = mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return torch.where(torch.as_tensor(seen), out, 0).transpose(1, 2)


def heads(batch, queries, keys, num, num_kv, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, queries, num, head_dim), (batch, keys, num_kv, head_dim), (batch, keys, num_kv, head_dim)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def spans(batch, queries, keys, seed=0):
    """Random intervals: some empty, some of one key, some whole."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, keys + 1, (batch, queries, 2), generator=generator).sort(-1).values
    ends[:, ::5] = torch.tensor([0, keys])
    ends[:, 1::7, 1] = ends[:, 1::7, 0]
    return ends


SHAPES = {  # B, T, S, H, Hkv, D
    "one element": (1, 1, 1, 1, 1, 1),
    "a tile of the 300M vision encoder": (1, 1025, 1025, 2, 2, 64),
    "heads of 128": (1, 257, 300, 5, 5, 128),
    "a block less one": (2, 47, 127, 3, 1, 16),
    "a block": (2, 48, 128, 3, 1, 32),
    "a block and one": (2, 49, 129, 3, 1, 80),
    "keys of a last vector": (1, 7, 145, 2, 1, 96),
    "odd heads": (3, 50, 33, 6, 2, 25),
    "a query": (2, 1, 600, 14, 2, 64),
}


@pytest.mark.parametrize("seen", ["all", "intervals"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 in fp32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_matches_torchs(library, shape, precision, seen):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    intervals = None if seen == "all" else spans(*shape[:3])
    q, k, v = (planted(t) for t in heads(*shape, dtype))

    def ours(q, k, v):
        return native_attention(library, q, k, v, intervals, in_fp32=precision == "bf16 in fp32")

    check_op(ours, lambda q, k, v: eager(q, k, v, intervals), q, k, v, gradients=False)
    if intervals is not None:
        empty = intervals[..., 0] == intervals[..., 1]
        assert (ours(q, k, v)[empty] == 0).all()


@torch.no_grad()
def test_in_fp32_is_rounded_once(library):
    q, k, v = heads(1, 200, 300, 3, 1, 64, torch.bfloat16)
    exact = eager(q.double(), k.double(), v.double())
    bound = exact.abs() * 2**-8 + 1e-5  # half an ulp, and fp32's own error
    assert ((native_attention(library, q, k, v, in_fp32=True) - exact).abs() <= bound).all()
    assert library.attention_level == 1 or not ((native_attention(library, q, k, v) - exact).abs() <= bound).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 in fp32"])
@torch.no_grad()
def test_large_scores_and_far_apart(library, precision):
    """Peaks that grow from block to block, and weights that vanish."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    q, k, v = heads(1, 60, 700, 2, 2, 64, dtype)
    k *= torch.linspace(0, 20, 700)[:, None, None].to(dtype)
    check_op(
        lambda q, k, v: native_attention(library, q, k, v, in_fp32=precision == "bf16 in fp32"),
        eager,
        q,
        k,
        v,
        gradients=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_strides_do_not_matter(library, dtype):
    """Slices of a fused projection and of a cache whose rows are longer."""
    qkv = torch.randn(2, 70, (6 + 2 * 2) * 24).to(dtype)
    q, k, v = qkv.unflatten(-1, (-1, 24)).split([6, 2, 2], dim=2)
    cache = torch.randn(2, 300, 2, 24).to(dtype)
    cache[:, 100:170] = k
    want = native_attention(library, q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(native_attention(library, q, cache[:, 100:170], v), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_rows_bits_are_its_own(library, dtype):
    """Whatever rows stand beside it, how many a call has, and the number of threads."""
    q, k, v = heads(3, 130, 333, 4, 2, 64, dtype)
    intervals = spans(3, 130, 333)
    want, before = native_attention(library, q, k, v, intervals), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for size in (1, 7, 48, 129):
                parts = zip(q.split(size, 1), intervals.split(size, 1), strict=True)
                got = torch.cat([native_attention(library, part, k, v, seen) for part, seen in parts], 1)
                assert torch.equal(got, want), (threads, size)
            assert torch.equal(native_attention(library, q[1:2], k[1:2], v[1:2], intervals[1:2]), want[1:2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_not_finite_stays_in_the_rows_that_see_it(library, dtype):
    q, k, v = heads(1, 60, 300, 2, 2, 64, dtype)
    intervals = torch.tensor([0, 128]).expand(1, 60, 2).clone()
    intervals[:, 30:] = torch.tensor([128, 300])
    want = native_attention(library, q, k, v, intervals)
    k[:, 200] = float("nan")
    got = native_attention(library, q, k, v, intervals)
    assert got[:, 30:].isnan().all() and torch.equal(got[:, :30], want[:, :30])
    for value in ("nan", "inf", "-inf"):
        q[:, 3] = float(value)
        got = native_attention(library, q, k, v, intervals)
        assert got[:, 3].isnan().all() and torch.equal(got[:, :3], want[:, :3])


@torch.no_grad()
def test_nothing_asked_and_nothing_there(library):
    q, k, v = heads(2, 3, 5, 2, 1, 16, torch.float32)
    assert native_attention(library, q[:, :0], k, v).shape == (2, 0, 2, 16)
    assert (native_attention(library, q, k[:, :0], v[:, :0]) == 0).all()


def test_bad_input(library):
    q, k, v = heads(2, 3, 5, 2, 1, 16, torch.float32)
    intervals = torch.zeros(2, 3, 2, dtype=torch.int64)
    for args, said in (
        ((q[0], k, v), r"expected q \[B, T, H, D\]"),
        ((q, k, v[:, :4]), "expected q"),
        ((q[:1], k, v), "must have the batch and head_dim"),
        ((q[..., :8], k, v), "must have the batch and head_dim"),
        ((q, k.expand(-1, -1, 3, -1), v.expand(-1, -1, 3, -1)), "must have the batch and head_dim"),
        ((*(torch.zeros(1, 1, 1, 129) for _ in "qkv"),), "a head_dim of 1 to 128, got 129"),
        ((q, k.bfloat16(), v), "one dtype"),
        ((q.transpose(2, 3).contiguous().transpose(2, 3), k, v), "dense last axis"),
        ((q.double(), k.double(), v.double()), "expected float32 or bfloat16, got torch.float64"),
        ((q, k, v, intervals.int()), r"expected intervals int64 \[2, 3, 2\]"),
        ((q, k, v, intervals[:, :2]), "expected intervals"),
    ):
        with pytest.raises(ValueError, match=said):
            native_attention(library, *args)
    old = replace(library, dll=type("Dll", (), {"nvlm_attention_level": staticmethod(lambda: 0)}))
    assert not route.takes(old, q)
    with pytest.raises(ValueError, match="no AVX512"):
        native_attention(old, q, k, v)


def test_who_takes_it(library, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    q = torch.randn(1, 9, 2, 16)
    assert route.takes(library, q) and route.takes(library, q.bfloat16())
    assert not route.takes(None, q) and not route.takes(library, q.half()) and not route.takes(library, q.to("meta"))
    assert not route.takes(library, q.requires_grad_())
    with torch.no_grad():
        assert route.takes(library, q) and not route.takes(library, torch.zeros(1, 1, 1, 512))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        assert route.takes(library, q) and not route.takes(library, q.bfloat16()), "AMX has another product"


@pytest.mark.parametrize("in_fp32", [False, True], ids=["bf16", "fp32"])
@torch.no_grad()
def test_tiles_go_through_it_in_the_faster_precision(library, monkeypatch, in_fp32):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(route, "fp32_is_faster", lambda: in_fp32)
    q, k, v = heads(2, 70, 70, 3, 3, 32, torch.bfloat16)
    got = attend(*(t.transpose(1, 2) for t in (q, k, v)), library)
    assert torch.equal(got, native_attention(library, q, k, v, in_fp32=in_fp32).flatten(2))


@pytest.mark.parametrize("length", [1, 8, 9, 20], ids=lambda n: f"{n} behind")
@torch.no_grad()
def test_behind_a_cache_is_the_end_of_the_whole(library, length):
    """A prompt in two chunks, its keys in a cache whose other slots hold nothing finite, as torch's in one."""
    total, num, num_kv = 60, TEXT.num_attention_heads, TEXT.num_key_value_heads
    torch.manual_seed(1)
    qkv = torch.randn(2, total, (num + 2 * num_kv) * TEXT.head_dim)
    angles = torch.randn(2, 2, total, TEXT.head_dim).unbind()
    want = CausalPast(torch.arange(total).expand(2, -1), "sdpa").attend(qkv, angles, num, num_kv)
    whole = CausalPast(torch.arange(total).expand(2, -1), library).attend(qkv, angles, num, num_kv)
    torch.testing.assert_close(whole, want)
    cache = KVCache.allocate(TEXT, 2, 80, torch.device("cpu"), torch.float32)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    for first, end in ((0, total - length), (total - length, total)):
        past = make_past(torch.arange(first, end).expand(2, -1), library, cache, end)
        out = past.attend(qkv[:, first:end], tuple(angle[:, first:end] for angle in angles), num, num_kv)
        torch.testing.assert_close(out, want[:, first:end])


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_a_model_takes_it_and_lets_it_go(library, variant, monkeypatch):
    want, called = answers(variant, native=False), []
    model = fresh(variant, native=True, cache_folder=library.path.parent)

    def counting(library, q, *rest):
        called.append(q.shape[1])
        return native_attention(library, q, *rest)

    monkeypatch.setattr(route, "native_attention", counting)
    assert [out.token_ids for out in model.generate(requests(model), params=PARAMS)] == want
    tokens = model.config.vision.num_patches + 1
    assert tokens in called and set(called) - {tokens}, "tiles, and prompts"
    called.clear()
    use_library(copy.deepcopy(model.model), None)
    assert isinstance(model.model.language_model.attention, native.NativeLibrary), "the copy's alone"
    use_library(model.model, None)
    assert [out.token_ids for out in model.generate(requests(model), params=PARAMS)] == want and not called
