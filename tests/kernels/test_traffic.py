"""What the kernels read and write, counted in the interpreter, keeps to the floor."""

import pytest
import torch

from bench.cases import CASES
from bench.traffic import measure
from nvlm_kernels._backend import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="only the interpreter shows every lane")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bytes(case, monkeypatch):
    """An address counted once a launch. Streaming kernels: 1.02 of the floor. Attention: 1.5 of it, as splits leave
    partial sums. Products: less than eager.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    for row in measure(case, with_compiled=False):
        what = {key: row[key] for key in ("pass", "launches", "floor", "weights", "moved", "memory", "eager")}
        assert row["launches"] > 0 and row["moved"] >= row["memory"], what
        if case.op.endswith("attention"):
            assert row["memory"] <= 1.5 * row["floor"], what
            continue
        assert row["memory"] < row["eager"], what
        if case.kind == "stream" and case.op != "pixel_shuffle_project":  # which hands its product to the vendor
            assert row["memory"] <= 1.02 * row["floor"], what
