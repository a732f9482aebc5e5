"""Ops that are a matrix product with something fused to it."""

from functools import partial

import torch

from bench.proofs.cases.case import Call, Case, nbytes
from nvlm_kernels.ops.gated_project import gated_project, gated_project_ref
from nvlm_kernels.ops.pixel_shuffle_project import pixel_shuffle_project, pixel_shuffle_project_ref
from nvlm_kernels.ops.row_statistics import row_statistics_ref


def _pixel_shuffle_project(
    dtype, device, tiles, side, width, features, *, strategy, gelu, recompute=False, alone=False
) -> Call:
    """A ViT's output with its CLS row, and no biases: the published projectors have none in their Linear. alone: not
    given the statistics, which the ViT's last kernel makes.
    """
    make = partial(torch.randn, dtype=dtype, device=device)
    x, norm_weight, norm_bias = make(tiles, 1 + side * side, width), make(4 * width), make(4 * width)
    weight = make(features, 4 * width) / (4 * width) ** 0.5
    inputs = [t.detach().requires_grad_() for t in (x, norm_weight, norm_bias, weight)]
    options = dict(version="v2", eps=1e-5, gelu=gelu, has_cls=True)
    rows = tiles * side * side // 4
    statistics = None if alone else row_statistics_ref(x[:, 1:])
    moved = nbytes(x[:, 1:], norm_weight, norm_bias, weight) + 8 * 4 * rows
    y = rows * features * x.element_size()
    flops = 2 * rows * 4 * width * features
    kept = gelu and not recompute
    return Call(
        partial(pixel_shuffle_project, statistics=statistics, strategy=strategy, recompute=recompute, **options),
        partial(pixel_shuffle_project_ref, bias=None, **options),
        tuple(inputs),
        forward_bytes=moved + y,
        backward_bytes=moved + y * (1 + kept) + moved + nbytes(x[:, :1]),
        weight_bytes=nbytes(norm_weight, norm_bias, weight),
        forward_flops=flops,
        backward_flops=2 * flops,
        repeated_flops=flops if gelu and recompute else 0,
    )


def _gated_project(dtype, device, rows, width, inner, *, masked, train) -> Call:
    make = partial(torch.randn, dtype=dtype, device=device, requires_grad=train)
    attn, residual = make(rows, inner), make(rows, width)
    weight = (make(width, inner) / inner**0.5).detach().requires_grad_(train)
    gate = torch.full((1,), 0.5, dtype=dtype, device=device, requires_grad=train)
    sees = torch.arange(rows, device=device) >= rows // 8 if masked else None  # text before the image sees nothing
    live = rows - rows // 8 if masked else rows
    flops = 2 * live * width * inner
    read = nbytes(attn[:live], weight)
    return Call(
        gated_project,
        gated_project_ref,
        (attn, weight, residual, gate, sees),
        forward_bytes=read + 2 * nbytes(residual),
        backward_bytes=read + nbytes(residual[:live], attn, weight) if train else None,
        weight_bytes=nbytes(weight),
        forward_flops=flops,
        backward_flops=2 * flops if train else 0,
    )


def _shuffle_cases() -> tuple[Case, ...]:
    tiles = dict(tiles=7, side=32, width=3200)  # 6 tiles and a thumbnail of InternViT-6B
    small = dict(side=16, width=320)  # 64 and 128 rows: two sizes of tiles
    dims = {
        "x": (dict(features=8192), dict(tiles=1, features=816)),
        "d": (dict(features=29568), dict(tiles=2, features=2944)),
    }
    ways = {
        "fused": {"strategy": "fused"},
        "norm_then_gemm": {"strategy": "norm_then_gemm"},
        "recompute": {"strategy": "fused", "recompute": True},
        "alone": {"strategy": "fused", "alone": True},
    }
    return tuple(
        Case(
            "pixel_shuffle_project",
            f"{variant}-{name}",
            "stream" if name == "norm_then_gemm" else "matmul",  # whose product is the vendor's
            partial(_pixel_shuffle_project, gelu=variant == "d", **way),
            tiles | dims[variant][0],
            small | dims[variant][1],
        )
        for variant in dims
        for name, way in ways.items()
        if variant == "d" or name in ("fused", "norm_then_gemm")
    )


CASES: tuple[Case, ...] = (
    *_shuffle_cases(),
    Case(
        "pixel_shuffle_project",
        "micro",
        "matmul",
        partial(_pixel_shuffle_project, strategy="fused", gelu=True),
        dict(tiles=7, side=8, width=160, features=512),
        dict(tiles=1, side=8, width=160, features=192),
    ),
    Case(
        "gated_project",
        "prefill",
        "matmul",
        partial(_gated_project, masked=True, train=True),
        dict(rows=1024, width=8192, inner=8192),
        dict(rows=256, width=512, inner=512),
    ),
    Case(
        "gated_project",
        "decode",
        "matmul",
        partial(_gated_project, masked=False, train=False),
        dict(rows=1, width=8192, inner=8192),
        dict(rows=1, width=512, inner=512),
    ),
    Case(
        "gated_project",
        "batch",
        "matmul",
        partial(_gated_project, masked=False, train=False),
        dict(rows=64, width=8192, inner=8192),
        dict(rows=64, width=512, inner=512),
    ),
)
