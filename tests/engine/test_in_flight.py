"""Captured steps run a step ahead of the host: nobody's answer shows it."""

import pytest
import torch

from nvlm_runtime.engine.in_flight import InFlightStep
from nvlm_runtime.engine.sampling import GenerationParams
from tests.engine.test_batch import PARAMS, VARIANTS, answers, fresh, requests


def watch(monkeypatch, model):
    """What happens in order: "step" for a launch, "read" for its tokens."""
    seen = []
    step, tokens = model.runner.step, InFlightStep.tokens
    monkeypatch.setattr(model.runner, "step", lambda *given: (seen.append("step"), step(*given)))
    monkeypatch.setattr(InFlightStep, "tokens", lambda flight: (seen.append("read"), tokens(flight))[1])
    return seen


@pytest.mark.parametrize("graphs", [True, False])
def test_the_next_step_is_launched_before_tokens_are_read(monkeypatch, graphs):
    model = fresh("d", graphs=graphs)
    seen = watch(monkeypatch, model)
    out = model.generate("Hello", max_new_tokens=5, ignore_eos=True)
    assert len(out.token_ids) == 5
    ahead = ["step", "step", "read", "step", "read", "step", "read", "read"]
    assert seen == (ahead if graphs else ["step", "read"] * 4)  # no step behind the limit


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_join_and_leave_beside_a_step_under_way(variant):
    """Two slots, five requests of other lengths: a slot is taken again while a step still draws for its last row."""
    want = answers(variant)
    model = fresh(variant, graphs=True, chunk=64)
    batch = model.batch(2, 150, 64)
    lengths = [1, 12, 2, 9, 12]
    waiting = [
        model.request(request, GenerationParams(max_new_tokens=n, ignore_eos=True))
        for request, n in zip(requests(model), lengths, strict=True)
    ]
    rows = list(waiting)
    while waiting or not batch.is_idle:
        if waiting and batch.num_free:
            batch.admit(waiting.pop(0))
        batch.advance()
    assert [row.token_ids for row in rows] == [ids[:n] for ids, n in zip(want, lengths, strict=True)]


@pytest.mark.parametrize("end", ["token", "text"])
def test_what_is_drawn_behind_an_end_is_dropped(end):
    """The host sees an end token or a stop string a step late; a prompt that goes on from the answer does not."""
    model, plain = fresh("x", graphs=True, chunk=64), fresh("x", reuse=False)
    ids = plain.generate("Hello", max_new_tokens=12, ignore_eos=True).token_ids
    at = next(i for i in range(2, 10) if ids[i] not in ids[:i])
    row = model.request(model.prepare("Hello"), PARAMS)
    if end == "token":
        row.eos_id = ids[at]
    else:
        stop = model.tokenizer.decode(ids[: at + 1])[-1:]
        row = model.request(model.prepare("Hello"), GenerationParams(max_new_tokens=12, ignore_eos=True, stop=stop))
    batch = model.batch(1, 100, 0)
    batch.admit(row)
    while not batch.is_idle:
        batch.advance()
    assert row.finish_reason == "stop" and row.token_ids == ids[: len(row.token_ids)] and 1 < len(row.token_ids) < 12
    prompt = [*row.prepared.input_ids, *row.token_ids, ids[0]]
    after = model.request(model.prepare(input_ids=prompt), PARAMS)
    batch.admit(after)
    while not batch.is_idle:
        batch.advance()
    assert after.num_reused >= len(prompt) - 2
    assert after.token_ids == plain.generate(input_ids=prompt, max_new_tokens=12, ignore_eos=True).token_ids


def test_a_cancelled_row_s_step_is_nobody_s():
    model, want = fresh("d", graphs=True, chunk=64), answers("d")
    rows = [model.request(request, PARAMS) for request in requests(model)[:2]]
    batch = model.batch(1, max(row.num_positions for row in rows), 0)
    batch.admit(rows[0])
    while len(rows[0].token_ids) < 3:
        batch.advance()
    batch.cancel(rows[0])
    batch.admit(rows[1])
    while not batch.is_idle:
        batch.advance()
    assert rows[0].token_ids == want[0][:3] and rows[0].finish_reason == "cancelled"
    assert rows[1].token_ids == want[1] and rows[1].finish_reason == "length"


def test_logits_that_are_not_finite_end_their_row_alone(monkeypatch):
    model, want = fresh("d", graphs=True, chunk=64), answers("d")
    rows = [model.request(request, PARAMS) for request in requests(model)[:2]]
    batch = model.batch(2, max(row.num_positions for row in rows), 0)
    for row in rows:
        batch.admit(row)
    while len(rows[1].token_ids) < 3:
        batch.advance()
    batch.slots.cache.k[:, batch.requests.index(rows[0])] = torch.nan
    while not batch.is_idle:
        batch.advance()
    assert "not finite" in str(rows[0].error) and rows[0].token_ids == want[0][: len(rows[0].token_ids)]
    assert rows[1].token_ids == want[1] and rows[1].error is None
