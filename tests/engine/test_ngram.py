"""Drafts from a row's own words: what is looked up, and that the answer is the one without them."""

import pytest

from nvlm_runtime.engine.ngram import NgramIndex
from nvlm_runtime.engine.sampling import GenerationParams
from tests.engine.test_batch import LARGE, VARIANTS, fresh

REPEATS = "one two three four. one two three four. one two"


@pytest.mark.parametrize(
    ("ids", "draft"),
    [
        ([], []),
        ([1, 2], []),
        ([1, 2, 3, 1, 2], [3, 1, 2]),
        ([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], [4, 8, 1, 2]),  # the last time, not the first
        ([7, 1, 2, 3, 5, 1, 2, 4, 7, 1, 2], [3, 5, 1, 2, 4]),  # three alike go before two alike
        ([5, 5, 5, 5], [5]),
    ],
)
def test_looks_up_what_followed_last(ids, draft):
    assert NgramIndex(ids).draft(5) == draft
    assert NgramIndex(ids).draft(1) == draft[:1]


@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("params", [{}, {"temperature": 0.1, "seed": 3}, {"temperature": 0.2, "top_k": 5, "seed": 1}])
def test_the_answer_is_the_one_without_drafts(variant, native, params):
    """Random models that run in circles: some drafts are right, some are not."""
    params = GenerationParams(max_new_tokens=60, ignore_eos=True, **params)
    want = fresh(variant, native=native)
    model = fresh(variant, native=native, speculate=4)
    calls, verify = [], model.runner.verify

    def counted(slots, row, draft, *rest):
        calls.append((draft, verify(slots, row, draft, *rest)))
        return calls[-1][1]

    model.runner.verify = counted
    for images in ([LARGE], []):
        a, b = (m.generate([m.prepare(REPEATS, images)], params=params)[0] for m in (want, model))
        assert b.token_ids == a.token_ids and b.text == a.text and b.finish_reason == "length"
        assert len(b.token_seconds) == 59
    if not params.temperature:
        assert any(drawn[: len(draft)] == draft for draft, drawn in calls), "no draft was right: nothing was tested"
        assert any(drawn[: len(draft)] != draft for draft, drawn in calls), "no draft was wrong: nothing was tested"


def test_what_a_draft_left_in_the_cache_is_never_read():
    """The next prompt goes on from this answer, in slots that wrong drafts have written over."""
    model, want = fresh("x", speculate=4), fresh("x", reuse=False)
    params = {"max_new_tokens": 30, "ignore_eos": True}
    first = model.generate(REPEATS, [LARGE], **params)
    ids = [*model.prepare(REPEATS, [LARGE]).input_ids, *first.token_ids]
    longer = [*ids, *model.tokenizer.encode(" five six one two three")]
    again = model.generate(input_ids=longer, images=[LARGE], **params)
    assert again.num_reused >= len(ids) - 1
    assert again.token_ids == want.generate(input_ids=longer, images=[LARGE], **params).token_ids


def test_ends_where_the_answer_ends():
    """An end in the middle of a right draft: what was drawn behind it is not part of the answer."""
    plain, model = fresh("d"), fresh("d", speculate=7)
    ids = plain.generate(REPEATS, max_new_tokens=40, ignore_eos=True).token_ids
    for limit in range(1, 12):
        assert model.generate(REPEATS, max_new_tokens=limit, ignore_eos=True).token_ids == ids[:limit]
    text = plain.generate(REPEATS, max_new_tokens=40, ignore_eos=True).text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    a, b = (m.generate(REPEATS, max_new_tokens=40, ignore_eos=True, stop=stop) for m in (plain, model))
    assert (a.text, a.finish_reason, a.token_ids) == (b.text, b.finish_reason, b.token_ids)


def test_rows_with_a_penalty_do_not_guess():
    model, plain = fresh("d", speculate=4), fresh("d")
    model.runner.verify = None
    params = {"max_new_tokens": 20, "ignore_eos": True, "repetition_penalty": 1.3}
    assert model.generate(REPEATS, **params).token_ids == plain.generate(REPEATS, **params).token_ids


@pytest.mark.parametrize(
    "options", [{"speculate": 8}, {"speculate": -1}, {"speculate": 2, "graphs": True, "native": False}]
)
def test_refuses(options):
    with pytest.raises(ValueError, match="speculate"):
        fresh("d", **options)
    with pytest.raises(ValueError, match="excludes graphs, and deterministic in PyTorch"):
        fresh("d", speculate=1, deterministic=True, native=False)
