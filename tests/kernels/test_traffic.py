"""What the kernels read and write, counted in the interpreter, keeps to the floor."""

import math

import pytest
import torch

from bench.cases import CASES
from bench.cases.projection import published_projector
from bench.traffic import measure
from nvlm_kernels._backend import INTERPRET
from nvlm_kernels.ops.pixel_shuffle_project import pixel_shuffle_project_ref

pytestmark = pytest.mark.skipif(not INTERPRET, reason="only the interpreter shows every lane")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bytes(case, monkeypatch):
    """Streaming kernels: 1.02 of the floor, every load counted. The others with an address counted once a launch:
    attention 1.5 of the floor, as splits leave partial sums, and 1.15 of the image keys and values; products less than
    eager, or than eager and the weight where one is made again; pixel shuffle half of eager's activations forward, but
    for the vendor's product with a GELU behind it.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rows = measure(case, with_compiled=False)
    for row in rows:
        what = {key: row[key] for key in ("pass", "launches", "floor", "weights", "moved", "memory", "eager")}
        assert row["launches"] > 0 and row["moved"] >= row["memory"], what
        if case.op.endswith("attention"):
            assert row["memory"] <= 1.5 * row["floor"], what
            if case.op == "tile_attention" and row["pass"] == "forward":
                image = math.prod(row["dims"][size] for size in ("batch", "tiles", "per_tile", "kv_heads", "head_dim"))
                keys = [of for name, of in row["by_argument"].items() if name.endswith((".k_ptr", ".v_ptr"))]
                assert len(keys) == 2 and 0 < sum(of["unique_loaded"] for of in keys) <= 1.15 * 2 * 2 * image, what
            continue
        again = case.id.endswith("recompute") and row["pass"] == "backward"  # the weight is read again
        assert row["memory"] < row["eager"] + 1.15 * row["weights"] * again, what
        if case.kind == "stream" and case.op != "pixel_shuffle_project":  # which hands its product to the vendor
            assert row["moved"] <= 1.02 * row["floor"], what
    if case.op == "pixel_shuffle_project":
        for row in (row for row in rows if row["pass"] != "backward"):
            share = 0.72 if case.name == "d-norm_then_gemm" else 0.5
            assert row["memory"] - row["weights"] <= share * (row["eager"] - row["weights"]), row


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_published_projector(version):
    """What pixel shuffle is counted against gives the reference's bits."""
    x, norm_weight, norm_bias, weight = (torch.randn(shape) for shape in ((2, 65, 12), (48,), (48,), (7, 48)))
    options = dict(version=version, eps=1e-5, gelu=True, has_cls=True)
    published = published_projector(x, norm_weight, norm_bias, weight, **options)
    assert torch.equal(published, pixel_shuffle_project_ref(x, norm_weight, norm_bias, weight, **options))
