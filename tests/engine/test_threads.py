"""Many threads on one model: everybody is answered as if alone, and nobody waits for a thread that waits for them."""

import random
import threading
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

import pytest
import torch

from nvlm_runtime.engine.nvlm import NVLM, PHASES
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.serving import Engine
from nvlm_runtime.inputs.layout import image_layout
from tests.engine.test_batch import fresh
from tests.model.test_model import picture

GUARD = 60  # seconds after which threads are taken to be stuck
PICTURES = [picture(size, seed) for seed, size in enumerate([(900, 600), (32, 32), (700, 1400), (64, 96), (1200, 400)])]
PARAMS = GenerationParams(max_new_tokens=3, ignore_eos=True)


def start(function, *args) -> Future:
    """The function's result, from a thread that cannot keep the interpreter from ending."""
    future: Future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def results(futures: list[Future]) -> list:
    done, stuck = wait_for(futures, GUARD)
    assert not stuck, f"{len(stuck)} of {len(futures)} threads are stuck"
    return [future.result() for future in futures]


@pytest.mark.parametrize("asks", ["cached", "fingerprint"])
def test_no_lock_of_the_encoder_is_held_while_tiles_are_cut(asks):
    """The thread that cuts tiles looks another image up, or names the weights, in a third thread."""
    model = fresh("x")
    prepared = model.prepare("What?", [PICTURES[1]])
    (image,) = prepared.images
    encoder, tiles = model.encoder, image.pixel_values

    def cut() -> torch.Tensor:
        ask = (lambda: encoder.cached("another")) if asks == "cached" else (lambda: encoder.fingerprint)
        results([start(ask)])
        return tiles

    asking = type(image)(image.plan, image.key, cut)
    layout = image_layout(model.tokenizer, model.config, image.plan)
    (handle,) = results([start(encoder.handle, asking, layout, dict.fromkeys(PHASES, 0.0))])
    assert torch.equal(handle.tokens, fresh("x").encode_image(PICTURES[1]).tokens)


def test_threads_that_want_one_image_encode_it_once(monkeypatch):
    model = fresh("x")
    encode, entered, calls = model.runner.encode, threading.Event(), []

    def slow(pixel_values):
        calls.append(len(pixel_values))
        entered.wait(0.3)  # the others come to the encoder meanwhile
        return encode(pixel_values)

    monkeypatch.setattr(model.runner, "encode", slow)
    found = results([start(model.encode_image, PICTURES[3]) for _ in range(8)])
    assert len(calls) == 1 and all(handle is found[0] for handle in found)


def ask(model: NVLM | Engine, seed: int, count: int, handles: list) -> list:
    """(number of the picture, token ids) of a client's requests."""
    rng = random.Random(seed)
    got = []
    for _ in range(count):
        number = rng.randrange(len(PICTURES))
        given = handles[number] if rng.random() < 0.2 else PICTURES[number].copy()
        if isinstance(model, Engine) and rng.random() < 0.2:
            model.submit("Not this.", [given], params=PARAMS).cancel()
        got.append((number, model.generate("What?", [given], params=PARAMS).token_ids))
    return got


@pytest.mark.parametrize("num_threads", [2, 8, 32])
@pytest.mark.parametrize("kind", ["NVLM", "Engine"])
def test_every_thread_gets_the_lone_answer(kind, num_threads):
    """Large and small pictures and handles, with a cache too small for all, so that images are encoded again."""
    lone = fresh("x", deterministic=True)
    want = [lone.generate("What?", [image], params=PARAMS).token_ids for image in PICTURES]
    model = fresh("x", deterministic=True, image_cache_bytes=40_000)
    handles = [model.encode_image(image) for image in PICTURES]
    if kind == "NVLM":
        found = results([start(ask, model, seed, 64 // num_threads, handles) for seed in range(num_threads)])
    else:
        engine = Engine(model, max_batch_size=4, max_model_len=200)
        try:
            found = results([start(ask, engine, seed, 64 // num_threads, handles) for seed in range(num_threads)])
        finally:
            results([start(engine.close, False)])
    assert [ids for client in found for _, ids in client] == [want[number] for client in found for number, _ in client]


def test_close_returns_while_threads_encode():
    """Photographs through an engine, an image of its own, and a text."""
    model = fresh("h")
    engine = Engine(model, max_batch_size=2, max_model_len=200)
    asked = [start(engine.generate, "What?", [PICTURES[i % 5].copy()]) for i in range(6)]
    asked += [start(model.encode_image, PICTURES[2].copy()), start(engine.generate, "Hello?")]
    results([start(engine.close, False)])
    done, stuck = wait_for(asked, GUARD)
    assert not stuck
