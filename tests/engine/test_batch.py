"""Rows that join and leave, prefixes that are kept, chunks of any size: the answer is always the lone fresh one."""

import pytest
import torch

from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.slots import cache_bytes, free_bytes
from tests.model.test_model import picture
from tests.small import small_engine

VARIANTS = ("d", "x", "h")
LARGE, SMALL = picture((96, 64)), picture((32, 32), 1)
PARAMS = GenerationParams(max_new_tokens=12, ignore_eos=True)


def fresh(variant: str, **options) -> NVLM:
    return small_engine(variant, positions="sinusoidal", **options) if variant != "d" else small_engine("d", **options)


def requests(model: NVLM) -> list:
    """Different numbers of images, tiles and lengths; the fourth has its second image where others have their first."""
    return [
        model.prepare("What is it?", [LARGE]),
        model.prepare("Hello, what can you do for me today?"),
        model.prepare("And this?", [SMALL]),
        model.prepare("First <image> and then <image>?", [SMALL, LARGE]),
        model.prepare("What is it?", [SMALL]),
    ]


def answers(variant: str, count: int = 5, **options) -> list[list[int]]:
    """Every request alone, in a model that has seen nothing before."""
    return [
        model.generate([requests(model)[i]], params=PARAMS)[0].token_ids
        for i in range(count)
        for model in [fresh(variant, **options)]
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_chunks_do_not_matter(variant, chunk):
    want = answers(variant)
    model = fresh(variant, chunk=chunk, reuse=False)
    assert [model.generate([request], params=PARAMS)[0].token_ids for request in requests(model)] == want


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_join_and_leave_between_steps(variant):
    """Two slots, five requests: each is admitted when another has left, while its neighbour decodes."""
    want = answers(variant)
    model = fresh(variant, chunk=5)
    batch = model.batch(2, 150, 64)
    lengths = [3, 12, 7, 9, 12]
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
    assert all(row.finish_reason == "length" for row in rows)


@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_deterministic_rows_have_the_bits_of_their_single_run(variant, native, monkeypatch):
    def run(together):
        model = fresh(variant, deterministic=True, native=native)
        seen = {}
        original = model.runner.backend.logits

        def keep(slots, *rest):
            logits = original(slots, *rest)
            for row in slots.active.nonzero().flatten():
                seen.setdefault(int(slots.sampling.seed[row]), []).append(logits[row].clone())
            return logits

        monkeypatch.setattr(model.runner.backend, "logits", keep)
        prepared = requests(model)
        groups = [prepared] if together else [[each] for each in prepared]
        number = 0
        for group in groups:
            rows = []
            for each in group:
                params = GenerationParams(max_new_tokens=8, ignore_eos=True, seed=number)
                rows.append(model.request(each, params))
                number += 1
            batch = model.batch(len(rows), 200, 100)
            for row in rows:
                batch.admit(row)
            while not batch.is_idle:
                batch.advance()
        return seen

    alone, together = run(False), run(True)
    for seed, want in alone.items():
        got = [logits for logits in together[seed]][: len(want)]
        assert len(want) == 7 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_conversation_starts_from_what_was_kept(variant):
    model = fresh(variant)
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]}
    out = model.generate(messages=[first], images=[LARGE], max_new_tokens=6, ignore_eos=True)
    assert out.num_reused == 0
    turns = [first, {"role": "assistant", "content": out.text}, {"role": "user", "content": "Sure?"}]
    second = model.generate(messages=turns, images=[LARGE], max_new_tokens=6, ignore_eos=True)
    assert second.num_reused >= out.num_prompt_tokens
    other = fresh(variant, reuse=False).generate(messages=turns, images=[LARGE], max_new_tokens=6, ignore_eos=True)
    assert other.num_reused == 0 and second.token_ids == other.token_ids
    turns += [
        {"role": "assistant", "content": second.text},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
    ]
    third = model.generate(messages=turns, images=[LARGE, SMALL], max_new_tokens=6, ignore_eos=True)
    assert third.num_reused >= second.num_prompt_tokens
    other = fresh(variant, reuse=False)
    assert third.token_ids == other.generate(messages=turns, images=[LARGE, SMALL], **vars_of(6)).token_ids


def vars_of(tokens: int) -> dict:
    return {"max_new_tokens": tokens, "ignore_eos": True}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_text_with_another_image_never_hits(variant):
    model = fresh(variant)
    one = model.generate("What is it?", [picture((96, 64), 3)], **vars_of(6))
    two = model.generate("What is it?", [picture((96, 64), 4)], **vars_of(6))
    block = model.prepare("What is it?", [LARGE]).layout.images[0].span[0]
    assert one.num_reused == 0 and two.num_reused <= block
    assert two.token_ids == fresh(variant).generate("What is it?", [picture((96, 64), 4)], **vars_of(6)).token_ids
    again = model.generate("What is it?", [picture((96, 64), 4)], **vars_of(6))
    assert again.num_reused == again.num_prompt_tokens - 1 and again.token_ids == two.token_ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_changed_weights_are_noticed(variant):
    model = fresh(variant)
    before = model.generate("What is it?", [LARGE], **vars_of(6))
    with torch.no_grad():
        for parameter in model.model.vision_model.parameters():
            parameter.mul_(-1.5)
    after = model.generate("What is it?", [LARGE], **vars_of(6))
    assert after.num_reused == 0 and after.timings["encode"] > 0
    assert before.num_reused == 0
    with torch.no_grad():
        for parameter in model.model.vision_model.parameters():
            parameter.div_(-1.5)
    assert model.generate("What is it?", [LARGE], **vars_of(6)).num_reused == 0


@pytest.mark.parametrize("steps", [0, 4, 12], ids=["unread", "decoding", "gone"])
def test_what_a_row_left_is_not_used_after_weights_changed_under_it(steps):
    model = fresh("x")
    batch = model.batch(1, 150, 64)
    rows = [model.request(requests(model)[1], PARAMS) for _ in range(2)]
    batch.admit(rows[0])
    for _ in range(steps):
        batch.advance()
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.mul_(1.5)
    while not batch.is_idle:
        batch.advance()
    batch.admit(rows[1])
    while not batch.is_idle:
        batch.advance()
    assert rows[1].num_reused == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_may_interleave(variant):
    want = [fresh(variant).generate("What is it?", [LARGE], **vars_of(8)).text, None]
    want[1] = fresh(variant).generate("Hello?", **vars_of(8)).text
    model = fresh(variant)
    one, two = model.stream("What is it?", [LARGE], **vars_of(8)), model.stream("Hello?", **vars_of(8))
    pieces: tuple[list[str], list[str]] = ([], [])
    streams = [iter(one), iter(two)]
    while streams[0] or streams[1]:
        for i, stream in enumerate(streams):
            if stream:
                piece = next(stream, None)
                pieces[i].append(piece or "")
                streams[i] = stream if piece is not None else None
    assert ["".join(each) for each in pieces] == want


def test_a_stream_left_early_frees_its_row():
    model = fresh("x")
    stream = model.stream("What is it?", [LARGE], **vars_of(50))
    pieces = iter(stream)
    next(pieces)
    pieces.close()
    stream.close()
    assert stream.output.finish_reason == "cancelled" and stream.output.text
    assert model._idle is not None and model._idle.is_idle
    assert model.generate("Hello?", **vars_of(5)).token_ids == fresh("x").generate("Hello?", **vars_of(5)).token_ids


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_cancelled_while_its_prompt_is_read(variant, chunks):
    """What was read stays good for the next request; the neighbour notices nothing."""
    want = answers(variant, 2)
    model = fresh(variant, chunk=4)
    batch = model.batch(2, 150, 64)
    first, second = (model.request(request, PARAMS) for request in requests(model)[:2])
    batch.admit(second)
    while not second.token_ids:
        batch.advance()
    batch.admit(first)
    for _ in range(chunks):
        batch.advance()
    batch.cancel(first)
    assert first.finish_reason == "cancelled" and batch.num_free == 1
    again = model.request(requests(model)[0], PARAMS)
    batch.admit(again)
    while not batch.is_idle:
        batch.advance()
    assert [again.token_ids, second.token_ids] == want


@pytest.mark.parametrize("when", ["encode", "prefill", "decode"])
def test_a_failed_row_never_harms_its_neighbours(when, monkeypatch):
    want = answers("x", 2)[1]
    model = fresh("x", chunk=4)
    batch = model.batch(2, 150, 64)
    bad, good = (model.request(request, PARAMS) for request in requests(model)[:2])
    if when == "encode":
        monkeypatch.setattr(model.runner, "encode", lambda pixels: 1 / 0)
    batch.admit(bad)
    batch.admit(good)
    while not batch.is_idle:
        batch.advance()
        if when == "prefill" and bad.error is None:
            batch.slots.cache.k[:, 0] = float("nan")
        if when == "decode" and bad.token_ids and bad.error is None:
            batch.slots.cache.v[:, 0] = float("nan")
    assert good.token_ids == want and good.error is None
    assert isinstance(bad.error, ZeroDivisionError if when == "encode" else ValueError)
    assert batch.num_free == 2


def test_refuses_a_batch_that_memory_cannot_hold():
    model = fresh("x")
    needed = cache_bytes(model.config, 1, 401, 64, torch.float32)
    rows = free_bytes(torch.device("cpu")) // needed + 10
    with pytest.raises(ValueError, match=f"a batch of {rows} needs [0-9,]+ bytes of caches"):
        model.batch(rows, 400, 64)


def test_refuses_what_does_not_fit():
    model = fresh("x")
    batch = model.batch(1, 40, 64)
    with pytest.raises(ValueError, match="the batch has 40 and 64 a row"):
        batch.admit(model.request(model.prepare("What is it?", [LARGE]), PARAMS))
    batch = model.batch(1, 100, 64)
    batch.admit(model.request(model.prepare("Hello?"), PARAMS))
    with pytest.raises(ValueError, match="all 1 rows of the batch are taken"):
        batch.admit(model.request(model.prepare("Hello?"), PARAMS))


def test_cache_bytes_are_what_is_allocated():
    model = fresh("x")
    slots = model.batch(3, 100, 64).slots
    held = sum(t.nbytes for t in (slots.cache.k, slots.cache.v, slots.cross.k, slots.cross.v))
    assert held == cache_bytes(model.config, 3, 101, 64, torch.float32)
