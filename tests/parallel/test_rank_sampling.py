"""Tokens drawn by top-k and top-p from logits on several ranks are one process's; the logits stay where they are."""

import pytest
import torch

from bench.setup.gloo import run_ranks
from nvlm_runtime.engine.sampling import Draw, draw
from tests.parallel import sampling_work as work

DRAWS = 60


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    return run_ranks(request.param, work.shared_draws, DRAWS)


def alone(known: int, scale: float) -> torch.Tensor:
    positions = torch.arange(DRAWS)[:, None].expand(-1, len(work.WAYS))
    ways = list(work.WAYS.values())
    return torch.stack(
        [draw(scale * work.rows(known), work.sampling_of(ways, known), p, Draw.SORTED) for p in positions]
    )


@pytest.mark.parametrize("case", ["large", "small", "flat"])
def test_tokens_are_one_process_s(ranks, case):
    known = work.SMALL if case == "small" else work.KNOWN
    want = alone(known, 0.001 if case == "flat" else 1.0)
    for rank in ranks:
        tokens, gathers = rank[case]
        assert torch.equal(tokens, want)
        assert gathers == (DRAWS if case == "flat" else 0), "the logits were gathered, or should have been"
    assert len(want[:, 0].unique()) > 5 and len(want[:, 1].unique()) > 1, "equal ones are all among the first"


def test_a_row_that_is_not_finite_draws_nothing(ranks):
    for rank in ranks:
        assert rank["broken"][1] == -1 and (rank["broken"][[0, 2, 3, 4, 5]] >= 0).all()
