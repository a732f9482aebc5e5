from functools import partial

import pytest
import torch
from torch import nn

from nvlm_kernels import _backend, layer_scale_residual_statistics, pixel_shuffle, row_statistics
from nvlm_kernels.ops import pixel_shuffle_project as module
from nvlm_kernels.ops.layer_scale_residual import layer_scale_residual_ref
from nvlm_kernels.ops.pixel_shuffle_project import (
    _fwd,
    pick_strategy,
    pixel_shuffle_project,
    pixel_shuffle_project_ref,
)
from tests.util import Undefined, check_op, planted

interpreted = pytest.mark.skipif(not _backend.INTERPRET, reason="traces the interpreter")
STRATEGIES = ["fused", "norm_then_gemm"]


def make(shape, dtype, device="cpu", bias=True, has_cls=True):
    """x, norm_weight, norm_bias, weight, bias of (tiles, side, width, features); the tiles differ in scale."""
    tiles, side, width, features = shape
    randn = partial(torch.randn, dtype=dtype, device=device)
    x = randn(tiles, side * side + has_cls, width) * (1 + torch.arange(tiles, device=device)[:, None, None])
    weight = randn(features, 4 * width) / (4 * width) ** 0.5
    return x, randn(4 * width), randn(4 * width), weight, randn(features) if bias else None


def check(strategy, inputs, **options):
    ours = partial(pixel_shuffle_project, strategy=strategy, **options)
    check_op(ours, partial(pixel_shuffle_project_ref, **options), *inputs)


def gradients(inputs, **options):
    """Output and the gradient of every input, run on the very tensors given."""
    inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
    y = pixel_shuffle_project(*inputs, **options)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "shape, version, gelu, bias, has_cls",
    [
        ((1, 8, 160, 48), "v2", True, False, True),  # a tile of the micro models
        ((1, 2, 1, 1), "v1", True, True, False),
        ((2, 6, 65, 65), "v1", False, True, True),  # one more than a block, in columns
        ((3, 12, 17, 130), "v2", False, False, False),  # the tiles of more than 64 rows, and not whole ones
        ((1, 4, 520, 24), "v2", True, True, True),  # runs of more than one block in the row kernels
        ((0, 4, 16, 24), "v2", True, True, True),
    ],
    ids=str,
)
def test_matches_reference(shape, version, gelu, bias, has_cls, strategy, dtype, device):
    inputs = make(shape, dtype, device, bias, has_cls)
    check(strategy, inputs[: 5 if bias else 4], version=version, eps=1e-5, gelu=gelu, has_cls=has_cls)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_both_orders(version, strategy, dtype, device):
    inputs = make((2, 4, 24, 24), dtype, device)
    check(strategy, inputs, version=version, eps=1e-6, gelu=True, has_cls=True)
    other = {"v1": "v2", "v2": "v1"}[version]
    options = dict(eps=1e-6, has_cls=True, strategy=strategy)
    assert not torch.equal(
        pixel_shuffle_project(*inputs, version=version, **options),
        pixel_shuffle_project(*inputs, version=other, **options),
    )


def far_rows(dtype, device):
    """Rows of mean 1000 and deviation 1, of mean -1000, and rows whose four runs have means of their own."""
    x, *rest = make((3, 4, 96, 24), dtype, device, has_cls=False)
    x = torch.randn_like(x)
    x[0] += 1000
    x[1] -= 1000
    x[2] += torch.tensor([0.0, 1000.0, -500.0, 3.0], device=device, dtype=dtype).repeat(4)[:, None]
    return x, *rest


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_large_mean(strategy, dtype, device):
    check(strategy, far_rows(dtype, device), version="v2", eps=1e-5, gelu=True)


@interpreted
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_large_mean_cancels_nothing(strategy, device):
    """Stricter than twice eager's error, as eager itself loses digits here. A mean of 1000 has an fp32 step of 6e-5."""
    x = far_rows(torch.float32, device)[0]
    norm_weight, norm_bias, identity = torch.ones(384), torch.zeros(384), torch.eye(384)
    y = pixel_shuffle_project(x, norm_weight, norm_bias, identity, version="v2", eps=1e-5, strategy=strategy)
    rows = pixel_shuffle(x.double(), "v2")
    exact = (rows - rows.mean(-1, keepdim=True)) * (rows.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    assert (y - exact).abs().max() < 2e-4


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_given_statistics_are_those_it_makes(version, strategy, dtype, device):
    """The same bits, forward and backward; as the tower gives them, with a row of the CLS token's between tiles."""
    inputs = make((2, 6, 40, 24), dtype, device)
    options = dict(version=version, eps=1e-5, gelu=True, has_cls=True, strategy=strategy)
    statistics = row_statistics(inputs[0])
    statistics[:, 0] = float("nan")
    made, given = (gradients(inputs, statistics=s, **options) for s in (None, statistics[:, 1:]))
    assert all(torch.equal(a, b) for a, b in zip(made, given))
    spread = torch.stack([statistics] * 2, -1)[:, 1:, :, 0]  # which the kernels do not read in place
    assert torch.equal(made[0], gradients(inputs, statistics=spread, **options)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_behind_the_tower(strategy, dtype, device):
    """Through the last residual add, whose kernel makes the statistics: gradients too, of both of its inputs."""
    x, *rest = make((2, 4, 40, 24), dtype, device)
    options = dict(version="v2", eps=1e-5, gelu=True)

    def ours(x, branch, scale, *rest):
        y, statistics = layer_scale_residual_statistics(x, branch, scale)
        statistics = statistics if statistics is None else statistics[:, 1:]
        return pixel_shuffle_project(y[:, 1:], *rest, statistics=statistics, strategy=strategy, **options)

    def plain(x, branch, scale, *rest):
        y = layer_scale_residual_ref(x, branch, scale)
        return pixel_shuffle_project_ref(y[:, 1:], *rest, **options)

    check_op(ours, plain, x, torch.randn_like(x), torch.randn(40, dtype=dtype, device=device), *rest)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_without_variance(strategy, dtype, device):
    x, *rest = make((1, 4, 32, 24), dtype, device, has_cls=False)
    x = torch.full_like(x, 3.0)
    y = pixel_shuffle_project(x, *rest, version="v2", eps=1e-5, strategy=strategy)
    torch.testing.assert_close(
        y, pixel_shuffle_project_ref(x, *rest, version="v2", eps=1e-5, gelu=False, has_cls=False)
    )


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_eps_of_zero(strategy, dtype, device):
    """Rows past the last in a program have no variance; their 1 / 0 is in no sum."""
    check(strategy, make((1, 4, 600, 24), dtype, device, has_cls=False), version="v2", eps=0.0, gelu=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cls_row_is_never_read(value, strategy, dtype, device):
    inputs = make((2, 4, 40, 24), dtype, device)
    options = dict(version="v2", eps=1e-5, gelu=True, has_cls=True, strategy=strategy)
    clean = gradients(inputs, **options)
    inputs[0][:, 0] = value
    for a, b in zip(clean, gradients(inputs, **options)):
        assert torch.equal(a, b)
    assert (clean[1][:, 0] == 0).all() and (clean[1][:, 1:] != 0).any(-1).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unaligned_and_guarded(strategy, dtype, device):
    inputs = make((2, 4, 40, 24), dtype, device)
    options = dict(version="v1", eps=1e-5, gelu=True, has_cls=True, strategy=strategy)
    for a, b in zip(gradients(inputs, **options), gradients([planted(t) for t in inputs], **options)):
        assert torch.equal(a, b)


VIEWS = {
    "tiles apart": lambda x: x[:, 1:17],
    "rows apart": lambda x: x[:, :16, :24],
    "every other tile": lambda x: x[::2, :16],
    "one tile, many times": lambda x: x[:1, :16].expand(3, -1, -1),
    "columns apart": lambda x: x[:, :16, ::2],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_input(view, strategy, device):
    take = VIEWS[view]
    x = torch.randn(3, 19, 40, dtype=torch.float16, device=device)
    rest = make((1, 4, take(x).shape[2], 24), x.dtype, device)[1:]
    options = dict(version="v2", eps=1e-5, gelu=False, has_cls=False)

    def through(op, **more):
        return lambda x, *rest: op(take(x), *rest, **options, **more)

    check_op(through(pixel_shuffle_project, strategy=strategy), through(pixel_shuffle_project_ref), x, *rest)


@interpreted
@pytest.mark.parametrize("view", [view for view in VIEWS if view != "columns apart"])
def test_strided_input_is_not_copied(view, device, monkeypatch):
    x = torch.full((3, 19, 40), float("nan"), device=device)
    mine = VIEWS[view](x)
    mine.copy_(torch.randn(mine.shape)) if view != "one tile, many times" else x[:1, :16].normal_()
    rest = make((1, 4, mine.shape[2], 24), torch.float32, device)[1:]
    seen = []

    def spy(x, *args):
        seen.append(x.data_ptr())
        return _fwd(x, *args)

    monkeypatch.setattr(module, "_fwd", spy)
    y = pixel_shuffle_project(mine, *rest, version="v2", eps=1e-5)
    assert y.isfinite().all() and seen == [mine.data_ptr()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_gradient_comes_back(strategy, device):
    inputs = [t.requires_grad_() for t in make((1, 4, 16, 24), torch.float32, device)]
    y = pixel_shuffle_project(*inputs, version="v2", eps=1e-5, gelu=True, has_cls=True, strategy=strategy)
    grads = torch.autograd.grad(Undefined.apply(y), inputs, allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


@interpreted
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "nothing to train"])
def test_bytes_of_fused(grad, gelu, memory, device):
    """x once for the product, and once for the statistics where they are not given, y once: nothing else of the size
    of the activations.
    """
    x, *rest = make((2, 8, 64, 96), torch.float16, device)
    patches, y, statistics = x[:, 1:].numel() * 2, 2 * 16 * 96 * 2, row_statistics(x[:, 1:])
    eager = 5 * patches + (3 if gelu else 1) * y  # shuffle, norm, product, GELU
    for given in (None, statistics):
        memory.access.clear()
        with torch.set_grad_enabled(grad):
            options = dict(version="v2", eps=1e-5, gelu=gelu, has_cls=True, strategy="fused")
            pixel_shuffle_project(x, *rest, statistics=given, **options)
        loaded = {kernel: of.unique_loaded for (kernel, name), of in memory.access.items() if name == "x_ptr"}
        assert loaded == {"_project_kernel": patches} | ({"_statistics_kernel": patches} if given is None else {})
        stored = {key: of.stored for key, of in memory.access.items() if of.stored}
        made = {("_statistics_kernel", "stats_ptr"): statistics.nbytes} if given is None else {}
        assert stored == made | {("_project_kernel", "y_ptr"): y}
        assert sum(loaded.values()) + sum(stored.values()) <= (0.5 if given is None else 0.29) * eager


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bias", [True, False])
def test_recomputed(bias, strategy, dtype, device):
    inputs = make((3, 6, 40, 72), dtype, device, bias)[: 5 if bias else 4]
    options = dict(version="v2", eps=1e-5, gelu=True, has_cls=True)
    ours = partial(pixel_shuffle_project, strategy=strategy, recompute=True, **options)
    check_op(ours, partial(pixel_shuffle_project_ref, **options), *inputs)


@pytest.mark.parametrize("eager", [True, False])
def test_recomputed_keeps_no_activation(eager, device, monkeypatch):
    """Of M tokens: nothing as large as z [M, F] or as the shuffled rows [M, 4C], but for x itself."""
    if eager:
        monkeypatch.setattr(_backend, "EAGER", True)
    inputs = [t.requires_grad_() for t in make((2, 8, 64, 96), torch.float32, device)]
    given = {t.data_ptr() for t in inputs}

    def kept(recompute):
        sizes = []

        def pack(t):
            if t.data_ptr() not in given:
                sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            pixel_shuffle_project(*inputs, version="v2", eps=1e-5, gelu=True, has_cls=True, recompute=recompute)
        return max(sizes, default=0)

    assert kept(False) >= 32 * 96 > 32 * 4 * 2 >= kept(True)


@interpreted
def test_bytes_of_norm_then_gemm(memory, device):
    x, *rest = make((2, 8, 64, 96), torch.float16, device)
    statistics, patches = row_statistics(x[:, 1:]), x[:, 1:].numel() * 2
    memory.launches.clear()
    options = dict(version="v2", eps=1e-5, has_cls=True, strategy="norm_then_gemm")
    pixel_shuffle_project(x, *rest, statistics=statistics, **options)
    assert memory.launches == ["_norm_kernel"]
    assert memory.access["_norm_kernel", "x_ptr"].loaded == patches
    assert memory.access["_norm_kernel", "stats_ptr"].unique_loaded == statistics.nbytes
    assert memory.access["_norm_kernel", "normed_ptr"].stored == patches


def test_strategy_is_predicted():
    assert pick_strategy(7 * 256, 12800, 29568, True) == "norm_then_gemm"  # NVLM-D, 7 tiles: bound by flops
    assert pick_strategy(7 * 256, 12800, 8192, False) == "norm_then_gemm"
    assert pick_strategy(256, 12800, 29568, True) == "fused"  # one tile: bound by the weight's bytes
    assert pick_strategy(7 * 16, 640, 512, True) == "fused"


@interpreted
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_is_picked(strategy, memory, device, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "pick_strategy", lambda *args: asked.append(args) or strategy)
    pixel_shuffle_project(*make((2, 4, 16, 24), torch.float32, device), version="v2", eps=1e-5, has_cls=True)
    assert asked == [(8, 64, 24, False)]
    assert ("_project_kernel" in memory.launches) == (strategy == "fused")


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_without_triton_it_is_the_modules(version, gelu, monkeypatch):
    """What the runtime computes today, bit for bit."""
    monkeypatch.setattr(_backend, "EAGER", True)
    x, norm_weight, norm_bias, weight, _ = make((2, 4, 40, 24), torch.float32)
    norm, linear = nn.LayerNorm(160, eps=1e-5), nn.Linear(160, 24, bias=False)
    norm.weight.data, norm.bias.data, linear.weight.data = norm_weight, norm_bias, weight
    today = nn.Sequential(norm, linear, nn.GELU() if gelu else nn.Identity())(pixel_shuffle(x[:, 1:], version))
    ours = pixel_shuffle_project(x, norm_weight, norm_bias, weight, version=version, eps=1e-5, gelu=gelu, has_cls=True)
    assert torch.equal(ours, today)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(version="v3"), "version must be 'v1' or 'v2', got 'v3'"),
        (dict(strategy="both"), "strategy must be"),
        (dict(x=torch.zeros(16, 8)), r"x must be floating \[N, 1 \+ S\*S, C\]"),
        (dict(x=torch.zeros(2, 16, 8)), "S even, got torch.float32"),
        (dict(x=torch.zeros(2, 10, 8)), "S even"),
        (dict(x=torch.zeros(2, 0, 8)), "S even"),
        (dict(x=torch.zeros(2, 17, 8, dtype=torch.int32)), "x must be floating"),
        (dict(weight=torch.zeros(24, 8)), r"weight must be \[F, 32\], got \(24, 8\)"),
        (dict(weight=torch.zeros(24, 32, dtype=torch.float16)), "weight must be torch.float32 on cpu"),
        (dict(norm_weight=torch.zeros(1)), r"norm_weight must be \[32\], got \(1,\)"),
        (dict(norm_bias=torch.zeros(8)), "norm_bias must be"),
        (dict(norm_bias=torch.zeros(32, device="meta")), "norm_bias must be torch.float32 on cpu as x is"),
        (dict(bias=torch.zeros(1)), r"bias must be \[24\], got \(1,\)"),
        (dict(bias=torch.zeros(24, dtype=torch.float64)), "bias must be torch.float32"),
        (dict(statistics=torch.zeros(2, 17, 2)), r"statistics must be torch.float32 \(2, 16, 2\) on cpu, got .*17"),
        (dict(statistics=torch.zeros(2, 16, 2).half()), "statistics must be torch.float32 .*, got torch.float16"),
        (dict(statistics=torch.zeros(2, 16, 2, device="meta")), "statistics must be .* on cpu, got .* on meta"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_rejects(change, message):
    names = ("x", "norm_weight", "norm_bias", "weight", "bias")
    arguments = dict(zip(names, make((2, 4, 8, 24), torch.float32)))
    with pytest.raises(ValueError, match=f"pixel_shuffle_project: .*{message}"):
        pixel_shuffle_project(**(arguments | dict(version="v2", eps=1e-5, has_cls=True) | change))


def opcheck(fused, save, device, **options):
    inputs = [t.requires_grad_() for t in make((2, 4, 16, 24), torch.float32, device)]
    statistics = row_statistics(inputs[0][:, 1:])
    torch.library.opcheck(_fwd, (*inputs, statistics, "v2", 1e-5, True, True, fused, save), **options)


@interpreted
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_opcheck_without_a_gpu(fused, save, device):
    opcheck(fused, save, device, test_utils=("test_schema", "test_autograd_registration"))


@pytest.mark.gpu
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_opcheck(fused, save, device):
    opcheck(fused, save, device)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiles(strategy, recompute, dtype, device):
    inputs = make((2, 8, 64, 96), dtype, device)
    options = dict(version="v2", eps=1e-5, gelu=True, has_cls=True, strategy=strategy, recompute=recompute)
    op = partial(pixel_shuffle_project, **options)
    torch.testing.assert_close(torch.compile(op, fullgraph=True)(*inputs), op(*inputs))
