"""The roof of every case at the real shapes, beside what plain torch moves there; nothing is allocated."""

import pytest

from bench.cases import CASES
from bench.predict import predict


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_nothing_beats_the_roof(case):
    rows = predict(case)
    assert [row["pass"] for row in rows] in (["forward"], ["forward", "backward"])
    for row in rows:
        assert row["predicted"] and 0 < row["roof_us"] <= 1.001 * row["eager_us"], row
