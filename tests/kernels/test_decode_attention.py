import pytest
import torch

from bench.proofs.machine import capture
from nvlm_kernels._backend import INTERPRET
from nvlm_kernels.ops.attention.decode import decode_attention, decode_attention_ref
from nvlm_kernels.ops.attention.split import _split
from tests.util import check_op, planted

HEADS = [(4, 2, 32), (2, 2, 64), (3, 1, 80), (2, 1, 96), (8, 1, 128)]  # H, Hkv, D
NAN = float("nan")


def random(tokens, slots, heads, dtype, device, batch=3):
    num_heads, kv_heads, head_dim = heads
    shapes = (batch, tokens, num_heads, head_dim), *[(batch, slots, kv_heads, head_dim)] * 2
    return tuple(torch.randn(shape, dtype=dtype, device=device) for shape in shapes)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_matches_reference(heads, dtype, device):
    """Requests of different lengths: some slots, all, and just the new tokens."""
    lengths = torch.tensor([29, 70, 3], device=device)
    check_op(decode_attention, decode_attention_ref, *random(3, 70, heads, dtype, device), lengths, gradients=False)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("slots", [1, 33, 128])
def test_tokens_and_lengths(tokens, slots, dtype, device):
    """Also fewer slots than tokens, so that the first tokens see nothing, and a request with none at all."""
    lengths = torch.tensor([slots, 0, max(1, slots // 2)], device=device, dtype=torch.int32)
    q, k, v = random(tokens, slots, (4, 2, 16), dtype, device)
    check_op(decode_attention, decode_attention_ref, q, k, v, lengths, gradients=False)
    assert not decode_attention(q, k, v, lengths)[1].any()


def test_is_causal_attention(dtype, device):
    """The newest tokens of a whole sequence, one by one or together."""
    q, k, v = random(8, 20, (2, 1, 32), dtype, device, batch=1)
    full = torch.nn.functional.pad(q, (0, 0, 0, 0, 12, 0))  # the 12 before them
    q_, k_, v_ = (t.transpose(1, 2) for t in (full, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=True)
    want = want.transpose(1, 2)[:, -8:]
    out = decode_attention(q, k, v, torch.tensor([20], device=device))
    atol = max(5e-4, torch.finfo(dtype).eps)  # a step of bf16 between two roundings
    torch.testing.assert_close(out, want, rtol=5e-3, atol=atol)
    single = [decode_attention(q[:, i : i + 1], k, v, torch.tensor([13 + i], device=device)) for i in range(8)]
    torch.testing.assert_close(torch.cat(single, 1), want, rtol=5e-3, atol=atol)


@pytest.mark.skipif(not (INTERPRET or torch.cuda.is_available()), reason="the reference promises less")
def test_slots_past_the_length_are_not_read(dtype, device, memory):
    """A layer of a cache, in place: NaN in the free slots, in other layers, and around it, at an odd address."""
    q, k, v = random(2, 100, (2, 1, 32), dtype, device)
    lengths = torch.tensor([64, 17, 99], device=device)
    want = decode_attention(q, k, v, lengths)
    cache = planted(torch.full((2, 2, 3, 110, 1, 32), NAN, dtype=dtype, device=device))
    for request, length in enumerate(lengths.tolist()):
        cache[0, 1, request, :length], cache[1, 1, request, :length] = k[request, :length], v[request, :length]
    if memory:
        memory.access.clear()
    assert torch.equal(decode_attention(planted(q), cache[0, 1, :, :100], cache[1, 1, :, :100], lengths), want)
    if memory:
        seen = int(lengths.sum()) * 32 * q.element_size()
        for argument in ("k_ptr", "v_ptr"):
            assert memory.access["_split_kernel", argument].loaded == seen


def test_long_cache(dtype, device):
    """Many shares: each request's filled slots are dealt out evenly, however long the cache is."""
    q, k, v = random(1, 520, (2, 1, 16), dtype, device, batch=2)
    check_op(decode_attention, decode_attention_ref, q, k, v, torch.tensor([519, 70], device=device), gradients=False)


@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 2, 5), (2, 2, 0)], ids=str)
def test_nothing_to_see(shape, dtype, device):
    batch, tokens, slots = shape
    q, k, v = random(tokens, slots, (2, 1, 32), dtype, device, batch=batch)
    out = decode_attention(q, k, v, torch.zeros(batch, dtype=torch.int64, device=device))
    assert out.shape == q.shape and out.dtype == dtype and not out.any()


@pytest.mark.skipif(INTERPRET, reason="records launches instead of making them")
def test_one_grid_for_every_length(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    q, k, v = random(1, 4096, (8, 1, 32), torch.float16, "cpu", batch=1)
    lengths = [torch.tensor([length]) for length in (1, 2000, 4096)]
    grids = [[launch.grid for launch in capture(lambda n=n: decode_attention(q, k, v, n))] for n in lengths]
    assert grids[0] == grids[1] == grids[2] and len(grids[0]) == 2
    assert grids[0][0][0] > 16, "too few shares to fill a device"


def zeros(*shape):
    return torch.zeros(shape)


Q, CACHE, LENGTHS = (2, 1, 2, 32), (2, 3, 1, 32), torch.tensor([1, 3])


@pytest.mark.parametrize(
    "said, q, k, v, lengths",
    [
        ("q, k_cache, v_cache must be", zeros(2, 2, 32), zeros(*CACHE), zeros(*CACHE), LENGTHS),
        ("q, k_cache, v_cache must be", zeros(*Q), zeros(*CACHE), zeros(2, 4, 1, 32), LENGTHS),
        ("3 heads of q .* 2 heads of k_cache", zeros(2, 1, 3, 32), zeros(2, 3, 2, 32), zeros(2, 3, 2, 32), LENGTHS),
        ("one floating dtype", zeros(*Q), zeros(*CACHE).half(), zeros(*CACHE).half(), LENGTHS),
        ("one device", zeros(*Q), zeros(*CACHE).to("meta"), zeros(*CACHE), LENGTHS),
        ("q must have at most 8 tokens, got 9", zeros(2, 9, 2, 32), zeros(*CACHE), zeros(*CACHE), LENGTHS),
        ("lengths must be .*float32", zeros(*Q), zeros(*CACHE), zeros(*CACHE), LENGTHS.float()),
        (r"lengths must be .*\(3,\)", zeros(*Q), zeros(*CACHE), zeros(*CACHE), torch.tensor([1, 2, 3])),
        ("lengths are on meta", zeros(*Q), zeros(*CACHE), zeros(*CACHE), LENGTHS.to("meta")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects(said, q, k, v, lengths):
    with pytest.raises(ValueError, match=f"decode_attention: .*{said}"):
        decode_attention(q, k, v, lengths)


@pytest.mark.skipif(not INTERPRET, reason="a limit of the kernels")
@pytest.mark.parametrize("head_dim", [8, 40, 144])
def test_rejects_head_dim(head_dim):
    with pytest.raises(ValueError, match=f"decode_attention: head dim of q .*{head_dim}"):
        decode_attention(zeros(2, 1, 2, head_dim), *[zeros(2, 3, 1, head_dim)] * 2, LENGTHS)


@pytest.mark.skipif(INTERPRET, reason="only the reference looks at the values")
@pytest.mark.parametrize("length", [-1, 4])
def test_rejects_lengths_that_leave_the_cache(length):
    with pytest.raises(ValueError, match="decode_attention: lengths must be within the 3 positions"):
        decode_attention(zeros(*Q), zeros(*CACHE), zeros(*CACHE), torch.tensor([1, length]))


@pytest.mark.gpu
def test_opcheck(device):
    q, k, v = random(3, 70, (8, 1, 128), torch.bfloat16, device)
    torch.library.opcheck(_split, (q, k, v, torch.tensor([29, 70, 3], device=device), 3))


@pytest.mark.gpu
def test_one_graph_for_all_lengths(device):
    q, k, v = random(1, 4096, (64, 8, 128), torch.bfloat16, device, batch=2)
    lengths = torch.tensor([4096, 1], device=device)
    decode_attention(q, k, v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, lengths)
    for a, b in ((1, 1), (64, 65), (2048, 4095)):
        lengths.copy_(torch.tensor([a, b]))
        graph.replay()
        assert torch.equal(out, decode_attention(q, k, v, lengths))


@pytest.mark.parametrize("length", [1, 5, 9], ids=lambda n: f"{n} slots")
def test_rows_of_one_length_are_the_reference(length):
    """The CPU's way without a mask: same numbers, and slots past the length are not read."""
    q, k, v = torch.randn(2, 1, 6, 32), torch.randn(2, 9, 3, 32), torch.randn(2, 9, 3, 32)
    lengths = torch.full((2,), length)
    want = decode_attention_ref(q, k, v, lengths)
    k[:, length:] = v[:, length:] = float("nan")
    torch.testing.assert_close(decode_attention(q, k, v, lengths), want)
