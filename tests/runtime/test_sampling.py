import numpy as np
import pytest
import torch

from nvlm_runtime.sampling import GenerationParams, Sampler, filtered_probs


def draw(logits, count=1, vocab=None, prompt=(), **params):
    sampler = Sampler(GenerationParams(**params), vocab or len(logits), list(prompt), torch.device("cpu"))
    return [sampler.draw(logits) for _ in range(count)]


def test_greedy_takes_the_largest_and_ignores_padding_rows():
    logits = torch.tensor([0.1, 2.0, 1.0, 9.0])
    assert draw(logits) == [3]
    assert draw(logits, vocab=3) == [1], "rows beyond the tokenizer's are never drawn"


def test_same_seed_same_draws():
    logits = torch.randn(50)
    first = draw(logits, 20, temperature=1.0, seed=7)
    assert draw(logits, 20, temperature=1.0, seed=7) == first
    assert draw(logits, 20, temperature=1.0, seed=8) != first


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.5, 0.3, 0.2])
    counts = torch.bincount(torch.tensor(draw(probs.log(), 4000, temperature=1.0, seed=0)), minlength=3) / 4000
    torch.testing.assert_close(counts, probs, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.49}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.79}, [0, 1]),
        ({"top_p": 0.81}, [0, 1, 2]),
        ({"min_p": 0.31}, [0, 1]),
        ({"min_p": 0.11}, [0, 1, 2]),
        ({"top_p": 0.01}, [0]),
    ],
    ids=str,
)
def test_filters(params, kept):
    got = filtered_probs(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), GenerationParams(temperature=1.0, **params))
    assert got.nonzero().flatten().tolist() == kept
    want = torch.tensor([0.5, 0.3, 0.15, 0.05])[kept]
    torch.testing.assert_close(got[kept], want / want.sum())


def test_temperature_sharpens():
    logits = torch.tensor([2.0, 1.0])
    torch.testing.assert_close(filtered_probs(logits, GenerationParams(temperature=0.5)), (2 * logits).softmax(-1))


def test_a_tiny_temperature_is_greedy():
    assert draw(torch.tensor([1.0, 3.0, 2.0]), 5, temperature=1e-40, seed=0) == [1] * 5


def test_numpy_numbers_are_numbers():
    GenerationParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int64(1), max_new_tokens=np.int32(5))


def test_repetition_penalty_counts_prompt_and_answer():
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert draw(logits, repetition_penalty=1.2, prompt=[0]) == [1]
    assert draw(logits, 3, repetition_penalty=1.5) == [0, 1, 0]
    assert draw(torch.tensor([-1.0, -1.1]), repetition_penalty=1.2, prompt=[0]) == [1], "negative logits sink too"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"temperature": "warm"},
        {"temperature": True},
        {"top_k": 2.5},
        {"seed": 1.5},
        {"seed": 2**70},
        {"seed": "a"},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"max_new_tokens": 2.0},
        {"stop": [""]},
        {"stop": 5},
        {"stop": None},
        {"ignore_eos": 1},
    ],
    ids=str,
)
def test_rejects(params):
    with pytest.raises(ValueError, match=next(iter(params))):
        GenerationParams(**params)
