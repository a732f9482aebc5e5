"""What the kernels read and write, counted in the interpreter, keeps to the floor."""

import math

import pytest
import torch

from bench.proofs.cases import CASES
from bench.proofs.traffic import measure
from nvlm_kernels._backend import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="only the interpreter shows every lane")

ALONE = "pixel_shuffle_project-d-alone"
ONE_PRODUCT = [f"pixel_shuffle_project-{way}" for way in ("x-fused", "d-fused", "d-recompute", "micro")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bytes(case, monkeypatch):
    """Streaming kernels: 1.02 of the floor, every load counted. The others with an address counted once a launch:
    attention 1.5 of the floor, as splits leave partial sums, and 1.15 of the image keys and values; products less than
    eager, or than eager and the weight where one is made again; pixel shuffle in one product, given the statistics,
    half of eager's activations in the forward, whether z is kept for a backward or not; without them, where it is not.
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
        if case.id in ONE_PRODUCT and row["pass"] != "backward" or (case.id, row["pass"]) == (ALONE, "inference"):
            assert row["memory"] - row["weights"] <= 0.5 * (row["eager"] - row["weights"]), what
