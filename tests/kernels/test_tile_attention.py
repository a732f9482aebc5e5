import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.proofs.machine import capture
from nvlm_kernels._backend import INTERPRET
from nvlm_kernels.ops.attention.mask import to_dense
from nvlm_kernels.ops.attention.split import _split, split_attention
from nvlm_kernels.ops.attention.tile import _diagonal_blocks, _fwd, _sizes, tile_attention, tile_attention_ref
from tests.util import check_op, planted

HEADS = [(4, 2, 32), (2, 2, 64), (3, 1, 80), (2, 1, 96), (8, 1, 128)]  # H, Hkv, D
GRIDS = [(cols, rows) for cols in range(1, 7) for rows in range(1, 7) if cols * rows <= 6]
NAN = float("nan")
kernels_only = pytest.mark.skipif(not (INTERPRET or torch.cuda.is_available()), reason="the reference promises less")
traced = pytest.mark.skipif(not INTERPRET, reason="looks into the kernels, through the interpreter")


def random(tokens, keys, heads, dtype, device, batch=1):
    num_heads, kv_heads, head_dim = heads
    shapes = (batch, tokens, num_heads, head_dim), *[(batch, keys, kv_heads, head_dim)] * 2
    return tuple(torch.randn(shape, dtype=dtype, device=device) for shape in shapes)


def mixed(tokens, keys, batch=1):
    """Intervals of all kinds: empty, one key, some keys, all keys; other ones in the second row of a batch."""
    rows = torch.stack([torch.randint(0, keys + 1, (2, batch, tokens)).amin(0), torch.full((batch, tokens), keys)], -1)
    rows[:, 1::4, 1] = (rows[:, 1::4, 0] + 1).clamp(max=keys)
    rows[:, 2::4] = torch.randint(0, keys + 1, (batch, len(range(2, tokens, 4)), 2))  # half of them upside down
    rows[:, 3::4, 0] = 0
    return rows


def prompt(tiles, per_tile, before=2, tag=3, behind=4):
    """Intervals [1, T, 2]: text that sees nothing, `tag` rows a tile that see it, text that sees all tiles."""
    rows = [(0, 0)] * before + [(i * per_tile, (i + 1) * per_tile) for i in range(tiles) for _ in range(tag)]
    return torch.tensor([rows + [(0, tiles * per_tile)] * behind])


def gradients(q, k, v, intervals, dout, op=tile_attention):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = op(q, k, v, intervals)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def in_shares(num_splits):
    return lambda q, k, v, intervals: split_attention(q, k, v, intervals, num_splits)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_matches_reference(heads, dtype, device):
    intervals = mixed(9, 40).to(device)
    check_op(tile_attention, tile_attention_ref, *random(9, 40, heads, dtype, device), intervals)


@pytest.mark.parametrize("tokens, keys", [(9, 1), (16, 32), (17, 33), (65, 129), (130, 20)], ids=str)
def test_sizes_around_a_block(tokens, keys, dtype, device):
    intervals = mixed(tokens, keys).to(device)
    check_op(tile_attention, tile_attention_ref, *random(tokens, keys, (1, 1, 16), dtype, device), intervals)


def test_one_row_and_one_key(dtype, device):
    q, k, v = random(1, 1, (1, 1, 16), dtype, device)
    out, dq, dk, dv = gradients(q, k, v, torch.tensor([[[0, 1]]], device=device), q)
    assert torch.equal(out, v) and torch.equal(dv, q)
    torch.testing.assert_close(dq, torch.zeros_like(q), rtol=0, atol=1e-2 if dtype == torch.float16 else 1e-5)
    torch.testing.assert_close(dk, torch.zeros_like(k), rtol=0, atol=1e-2 if dtype == torch.float16 else 1e-5)


def test_every_tile_grid(dtype, device):
    """One in each row of a batch, 16 keys a tile, with a thumbnail where there are several; shorter ones are padded."""
    prompts = [prompt(cols * rows + (cols * rows > 1), 16, before=cols, tag=1, behind=rows)[0] for cols, rows in GRIDS]
    intervals = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
    assert len(intervals) == 14 and intervals.max() == 112
    q, k, v = random(intervals.shape[1], 112, (2, 1, 16), dtype, device, batch=14)
    check_op(tile_attention, tile_attention_ref, q, k, v, intervals)


def test_packed_and_padded_batch(dtype, device):
    """Two documents with two images and one in a row; beside it a shorter prompt, padded with empty rows."""
    first = torch.cat([prompt(2, 16)[0], prompt(1, 16)[0] + 32, prompt(2, 16)[0] + 48])
    second = torch.zeros_like(first)
    second[:9] = prompt(1, 16)[0]
    intervals = torch.stack([first, second]).to(device)
    q, k, v = random(len(first), 80, (4, 2, 32), dtype, device, batch=2)
    check_op(tile_attention, tile_attention_ref, q, k, v, intervals)
    assert not tile_attention(q, k, v, intervals)[1, 9:].any()


@pytest.mark.skipif(INTERPRET or torch.cuda.is_available(), reason="kernels promise it of what no row of a block sees")
def test_trained_documents_of_a_row_are_apart(dtype, device):
    """What one document's keys hold, NaN too, is nothing to another: not masked, but never multiplied."""
    first, text, second = prompt(2, 16)[0], torch.zeros(3, 2, dtype=torch.int64), prompt(3, 16)[0]
    tokens, keys = len(first) + len(text), 32
    intervals = torch.cat([first, text, second + (second[:, 1:] > 0) * keys])[None].to(device)
    assert _diagonal_blocks(intervals[0].cpu()) == [(0, 0), (tokens + 2, keys)]
    q, k, v = random(intervals.shape[1], 80, (2, 1, 16), dtype, device)
    dout = torch.randn_like(q)
    clean = gradients(q, k, v, intervals, dout)
    k[:, keys:], v[:, keys:] = NAN, NAN
    for got, want, num in zip(gradients(q, k, v, intervals, dout), clean, (tokens, tokens, keys, keys)):
        assert torch.equal(got[:, :num], want[:, :num])


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_intervals(data, device):
    keys = data.draw(st.integers(1, 50), "keys")
    bound = st.integers(0, keys)
    rows = data.draw(st.lists(st.tuples(bound, bound), min_size=1, max_size=12), "intervals")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]), "dtype")
    heads = data.draw(st.sampled_from([(1, 1, 16), (3, 1, 48), (4, 2, 32)]), "heads")
    intervals = torch.tensor([rows], device=device)
    q, k, v = random(len(rows), keys, heads, dtype, device)
    check_op(tile_attention, tile_attention_ref, q, k, v, intervals)
    if len(rows) <= 8:
        check_op(tile_attention, tile_attention_ref, q, k, v, intervals, gradients=False)


@kernels_only
def test_large_scores(dtype, device):
    """The maximum moves by hundreds from block to block, up and down."""
    q, k, v = random(9, 150, (2, 1, 32), dtype, device)
    k = k * torch.linspace(-20, 20, 150, device=device).to(dtype)[:, None, None]
    intervals = prompt(3, 50, before=1, tag=2, behind=2).to(device)
    check_op(tile_attention, tile_attention_ref, q, k, v, intervals)
    check_op(in_shares(3), tile_attention_ref, q[:, :8], k, v, intervals[:, :8].contiguous(), gradients=False)


@kernels_only
def test_what_no_row_sees_may_hold_anything(dtype, device):
    """NaN in unseen keys, within a seen block, between blocks and at the end, and in the rows that see nothing."""
    q, k, v = random(11, 160, (2, 1, 32), dtype, device)
    intervals = torch.tensor([[[0, 0], [5, 37], [5, 20], [120, 150], [9, 9]] + [[5, 37]] * 5 + [[7, 3]]], device=device)
    dout = torch.randn_like(q)
    clean = gradients(q, k, v, intervals, dout)
    seen = to_dense(intervals, 160).any(1)[0]
    empty = (intervals[..., 0] >= intervals[..., 1])[0]
    for value in (NAN, float("inf")):
        k[:, ~seen], v[:, ~seen], q[:, empty], dout[:, empty] = value, value, value, value
        for got, want in zip(gradients(q, k, v, intervals, dout), clean):
            assert torch.equal(got, want)
    out, dq, dk, dv = clean
    assert not out[:, empty].any() and not dq[:, empty].any()
    assert not dk[:, ~seen].any() and not dv[:, ~seen].any()
    assert dk[:, seen].any(-1).all() and dq[:, ~empty].any(-1).all()
    short = gradients(q[:, 1:5], k, v, intervals[:, 1:5], dout[:, 1:5])[0]
    with torch.no_grad():
        torch.testing.assert_close(tile_attention(q[:, 1:5], k, v, intervals[:, 1:5]), short, rtol=2e-3, atol=2e-4)


def test_a_row_sees_its_own_keys_only(dtype, device):
    """What another row of the same block sees may be huge: it must weigh exactly nothing."""
    q, k, v = random(9, 64, (1, 1, 32), dtype, device)
    intervals = torch.tensor([[[0, 32]] * 5 + [[32, 64]] * 4], device=device)
    v[:, 32:] *= 1000
    k[:, 32:] *= 10
    for tokens in (9, 6):  # the kernel of prefill, and that of decoding
        out = tile_attention(q[:, :tokens], k, v, intervals[:, :tokens])
        want = tile_attention_ref(q[:, :5], k[:, :32], v[:, :32], intervals[:, :5])
        torch.testing.assert_close(out[:, :5], want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tokens", [3, 9])
@pytest.mark.parametrize("empty", ["no keys", "no tokens", "no requests", "empty rows"])
def test_nothing_to_see(empty, tokens, dtype, device):
    batch, tokens, keys = {
        "no keys": (2, tokens, 0),
        "no tokens": (2, 0, 4),
        "no requests": (0, tokens, 4),
        "empty rows": (2, tokens, 4),
    }[empty]
    q, k, v = random(tokens, keys, (2, 1, 32), dtype, device, batch=batch)
    if empty == "no keys":
        q[:] = NAN
    intervals = torch.zeros(batch, tokens, 2, dtype=torch.int64, device=device)
    out, *grads = gradients(q, k, v, intervals, torch.randn_like(q))
    with torch.no_grad():
        decoded = tile_attention(q, k, v, intervals)
    for got, like in zip((out, decoded, *grads), (q, q, q, k, v)):
        assert got.shape == like.shape and got.dtype == dtype and not got.any()


def test_chunks_are_the_whole(dtype, device):
    q, k, v = random(20, 48, (4, 2, 32), dtype, device)
    intervals = prompt(3, 16, before=3, tag=3, behind=8).to(device)

    def chunked(q, k, v, intervals):
        pieces = zip(q.split([11, 2, 7], 1), intervals.split([11, 2, 7], 1))
        return torch.cat([tile_attention(piece, k, v, rows) for piece, rows in pieces], 1)

    check_op(chunked, tile_attention_ref, q, k, v, intervals)


@kernels_only
@pytest.mark.parametrize("tokens", [9, 3])
def test_views_of_larger_tensors(tokens, dtype, device):
    """q out of a fused projection, k and v a layer of a cache: read in place, at any alignment, within their bounds."""
    q, k, v = random(tokens, 33, (2, 2, 16), dtype, device, batch=2)
    intervals = mixed(tokens, 33, batch=2).to(device)
    fused = planted(torch.randn(2, tokens, 7 * 16 + 1, dtype=dtype, device=device))
    cache = planted(torch.full((2, 3, 2, 40, 2, 16), NAN, dtype=dtype, device=device))
    fused[..., 1:33] = q.flatten(2)
    cache[0, 1, :, :33], cache[1, 1, :, :33] = k, v
    views = fused[..., 1:33].unflatten(-1, (2, 16)), cache[0, 1, :, :33], cache[1, 1, :, :33]
    assert not any(t.is_contiguous() for t in views)
    dout = torch.randn_like(q)
    for got, want in zip(gradients(*views, intervals, dout), gradients(q, k, v, intervals, dout)):
        assert torch.equal(got, want)
    with torch.no_grad():
        assert torch.equal(tile_attention(*views, intervals), tile_attention(q, k, v, intervals))
        last = k.mT.contiguous().mT, v.mT.contiguous().mT  # another last axis: copied, not misread
        assert torch.equal(tile_attention(q, *last, intervals), tile_attention(q, k, v, intervals))


def test_intervals_of_any_layout(dtype, device):
    q, k, v = random(9, 20, (2, 1, 32), dtype, device)
    intervals = mixed(9, 20).to(device)
    want = tile_attention(q, k, v, intervals)
    assert torch.equal(tile_attention(q, k, v, intervals.int()), want)
    assert torch.equal(tile_attention(q, k, v, intervals.mT.contiguous().mT), want)


@kernels_only
@pytest.mark.parametrize("tokens, num_splits", [(1, 1), (8, 1), (8, 2), (1, 5), (8, 5)], ids=str)
def test_decode_form(tokens, num_splits, dtype, device):
    """Shares of blocks, more shares than blocks, rows that see nothing of a share, and nothing at all."""
    q, k, v = random(tokens, 130, (10, 1, 16), dtype, device, batch=2)
    intervals = torch.tensor([[0, 130], [90, 100], [0, 0], [1, 129], [0, 1], [129, 130], [60, 70], [50, 50]])
    intervals = torch.stack([intervals, intervals.flip(0)])[:, :tokens].contiguous().to(device)
    check_op(in_shares(num_splits), tile_attention_ref, q, k, v, intervals, gradients=False)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_form_of_every_head(heads, dtype, device):
    intervals = mixed(5, 70).to(device)
    q, k, v = random(5, 70, heads, dtype, device)
    check_op(tile_attention, tile_attention_ref, q, k, v, intervals, gradients=False)


@traced
def test_which_kernels_run(device, memory):
    q, k, v = random(9, 20, (2, 1, 32), torch.float32, device)
    intervals = mixed(9, 20)

    def launches(q, k, rows):
        memory.launches.clear()
        out = tile_attention(q[:, :rows], k, v, intervals[:, :rows])
        if out.requires_grad:
            torch.autograd.grad(out.sum(), [t for t in (q, k) if t.requires_grad])
        return memory.launches

    grad_q, grad_k = (t.clone().requires_grad_() for t in (q, k))
    assert launches(q, k, 8) == ["_split_kernel", "_combine_kernel"]
    assert launches(q, k, 9) == ["_fwd_kernel"]
    assert launches(grad_q, k, 8) == ["_fwd_kernel", "_dq_kernel"]
    assert launches(q, grad_k, 8) == ["_fwd_kernel", "_dq_kernel", "_dkdv_kernel"]


@traced
@pytest.mark.parametrize("layout", ["tiles", "gap", "packed"])
def test_bytes_read_are_what_rows_see(layout, memory):
    """k and v: what each block of rows sees, once for all its query heads; q: the rows that see a block of keys."""
    heads, head_dim, group = 4, 16, 4
    intervals = {
        "tiles": prompt(4, 64, before=9, tag=5, behind=20),
        "gap": torch.tensor([[[0, 20], [236, 256]] * 20]),
        "packed": torch.cat([prompt(2, 64, behind=10), prompt(2, 64, behind=10) + 128], 1),
    }[layout]
    tokens, keys = intervals.shape[1], 256
    q, k, v = random(tokens, keys, (heads, heads // group, head_dim), torch.float16, "cpu")
    dense = to_dense(intervals, keys)[0]
    row = head_dim * k.element_size() * (heads // group)

    def by_blocks_of_rows(kernel):
        blocks = dense.split(_sizes(kernel, q.dtype, head_dim)["BLOCK_M"] // group)
        return row * sum(int(block.any(0).sum()) for block in blocks)

    gradients(q, k, v, intervals, torch.randn_like(q))
    access = memory.access
    for argument in ("k_ptr", "v_ptr"):
        assert access["_fwd_kernel", argument].loaded <= 1.15 * by_blocks_of_rows("fwd")
        assert access["_dq_kernel", argument].loaded <= 1.15 * by_blocks_of_rows("dq")
        assert access["_fwd_kernel", argument].unique_loaded <= 1.15 * row * int(dense.any(0).sum())
    seeing = row * group * int(dense.any(1).sum())
    for kernel, argument in (("_fwd_kernel", "q_ptr"), ("_dq_kernel", "q_ptr"), ("_dq_kernel", "dout_ptr")):
        assert access[kernel, argument].loaded == seeing, "rows that see nothing are read"
    sizes = _sizes("dkdv", q.dtype, head_dim)
    columns = [block.any(1).nonzero() for block in dense.split(sizes["BLOCK_N"], dim=1)]
    for argument in ("q_ptr", "dout_ptr"):
        assert access["_dkdv_kernel", argument].loaded <= 1.15 * row * group * sum(map(len, columns))
    spans = sum(int(rows.max() - rows.min()) + 1 + sizes["BLOCK_M"] // group for rows in columns)
    looked_at = access["_dkdv_kernel", "intervals_ptr"].loaded // intervals[0, 0].nbytes
    assert looked_at <= tokens * len(columns) + spans, "rows before the first and behind the last that see the keys"
    with torch.no_grad():
        tile_attention(q[:, 8:16], k, v, intervals[:, 8:16])
    assert access["_split_kernel", "k_ptr"].loaded <= 1.15 * row * int(dense[8:16].any(0).sum())


@pytest.mark.skipif(INTERPRET, reason="records launches instead of making them")
def test_decode_has_one_grid(monkeypatch):
    """Whatever rows see, and without a look at it: what a CUDA graph needs."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    q, k, v = random(2, 300, (4, 2, 32), torch.float16, "cpu")
    grids = []
    for end in (0, 1, 300):
        intervals = torch.tensor([[[0, end]] * 2])
        grids.append([launch.grid for launch in capture(lambda rows=intervals: tile_attention(q, k, v, rows))])
    assert grids[0] == grids[1] == grids[2] and len(grids[0]) == 2


def zeros(*shape):
    return torch.zeros(shape)


Q, KV, ROWS = (1, 2, 2, 32), (1, 3, 2, 32), (1, 2, 2)


@pytest.mark.parametrize(
    "said, q, k, v, intervals",
    [
        (r"q, k, v must be \[B, T", zeros(1, 2, 32), zeros(*KV), zeros(*KV), zeros(*ROWS)),
        ("q, k, v must be .* 4, 2", zeros(*Q), zeros(*KV), zeros(1, 4, 2, 32), zeros(*ROWS)),
        ("q, k, v must be .*2, 3, 2", zeros(*Q), zeros(2, 3, 2, 32), zeros(2, 3, 2, 32), zeros(*ROWS)),
        ("q, k, v must be .*64", zeros(*Q), zeros(1, 3, 2, 64), zeros(1, 3, 2, 64), zeros(*ROWS)),
        ("3 heads of q", zeros(1, 2, 3, 32), zeros(*KV), zeros(*KV), zeros(*ROWS)),
        ("one floating dtype.*float16", zeros(*Q), zeros(*KV).half(), zeros(*KV), zeros(*ROWS)),
        ("one floating dtype.*int64", zeros(*Q).long(), zeros(*KV).long(), zeros(*KV).long(), zeros(*ROWS)),
        ("one device.*meta", zeros(*Q), zeros(*KV), zeros(*KV).to("meta"), zeros(*ROWS)),
        ("intervals must be .*int16", zeros(*Q), zeros(*KV), zeros(*KV), zeros(*ROWS).short()),
        (r"intervals must be .*\(1, 1, 2\)", zeros(*Q), zeros(*KV), zeros(*KV), zeros(1, 1, 2)),
        ("intervals are on meta", zeros(*Q), zeros(*KV), zeros(*KV), zeros(*ROWS).to("meta")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects(said, q, k, v, intervals):
    if intervals.dtype == torch.float32:
        intervals = intervals.long()
    with pytest.raises(ValueError, match=f"tile_attention: .*{said}"):
        tile_attention(q, k, v, intervals)


def test_rejects_float_intervals():
    with pytest.raises(ValueError, match="tile_attention: intervals must be int32 or int64"):
        tile_attention(zeros(*Q), zeros(*KV), zeros(*KV), zeros(*ROWS))


@pytest.mark.skipif(not INTERPRET, reason="a limit of the kernels")
@pytest.mark.parametrize("head_dim", [8, 40, 144])
def test_rejects_head_dim(head_dim):
    with pytest.raises(ValueError, match=f"tile_attention: head dim of q .*{head_dim}"):
        tile_attention(*random(2, 3, (2, 1, head_dim), torch.float32, "cpu"), zeros(1, 2, 2).long())


@pytest.mark.skipif(INTERPRET, reason="only the reference looks at the values")
@pytest.mark.parametrize("row", [(-1, 2), (0, 4), (5, 5)], ids=str)
def test_rejects_intervals_that_leave_the_keys(row):
    with pytest.raises(ValueError, match="tile_attention: intervals must be within the 3 keys"):
        tile_attention(*random(2, 3, (2, 1, 32), torch.float32, "cpu"), torch.tensor([[(0, 3), row]]))


@traced
@pytest.mark.parametrize("tokens", [2, 9])
def test_kernels_stay_within_the_keys(tokens, dtype):
    """Where no host looks at the values, an interval that leaves the keys is cut, and nothing else is touched."""
    q, k, v = random(tokens, 20, (2, 1, 32), dtype, "cpu")
    intervals = torch.tensor([[[-5, 7]] + [[3, 2**40]] * (tokens - 1)])
    inside = intervals.clamp(0, 20)
    dout = torch.randn_like(q)
    for got, want in zip(gradients(q, k, v, intervals, dout), gradients(q, k, v, inside, dout)):
        assert torch.equal(got, want)
    assert torch.equal(tile_attention(q, k, v, intervals), tile_attention(q, k, v, inside))


@pytest.mark.skipif(not INTERPRET, reason="runs the kernels")
def test_schema_and_autograd(device):
    q, k, v = (t.requires_grad_() for t in random(9, 70, (2, 1, 32), torch.float32, device, batch=2))
    tests = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(_fwd, (q, k, v, mixed(9, 70, batch=2).to(device)), test_utils=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_opcheck(heads, device):
    q, k, v = (t.requires_grad_() for t in random(9, 70, heads, torch.bfloat16, device, batch=2))
    torch.library.opcheck(_fwd, (q, k, v, mixed(9, 70, batch=2).to(device)))
    q, k, v = random(3, 70, heads, torch.bfloat16, device, batch=2)
    torch.library.opcheck(_split, (q, k, v, mixed(3, 70, batch=2).to(device), 3))


@pytest.mark.gpu
def test_one_graph_for_all_intervals(device):
    q, k, v = random(2, 300, (16, 2, 128), torch.bfloat16, device)
    intervals = torch.tensor([[[0, 300]] * 2], device=device)
    tile_attention(q, k, v, intervals)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tile_attention(q, k, v, intervals)
    for end in (0, 5, 64, 299):
        intervals[..., 1] = end
        graph.replay()
        assert torch.equal(out, tile_attention(q, k, v, intervals))
