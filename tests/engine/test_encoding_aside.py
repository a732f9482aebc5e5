"""Encoding a picture does not hold up the rows that decode. CUDA is stubbed: thread and stream are set by hand."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from nvlm_runtime.engine.sampling import GenerationParams
from tests.engine.test_batch import LARGE, fresh, vars_of


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_rows_decode_while_a_picture_is_encoded(variant, monkeypatch):
    model, want = fresh(variant), fresh(variant).generate("What?", [LARGE], **vars_of(5)).token_ids
    first = model.request(model.prepare("Hello"), GenerationParams(max_new_tokens=12, ignore_eos=True))
    second = model.request(model.prepare("What?", [LARGE]), GenerationParams(max_new_tokens=5, ignore_eos=True))
    monkeypatch.setattr(model.encoder, "_aside", ThreadPoolExecutor(1))
    encoded, original = threading.Event(), model.encoder._encode

    def late(*given):
        assert encoded.wait(5)
        return original(*given)

    monkeypatch.setattr(model.encoder, "_encode", late)
    batch = model.batch(2, max(first.num_positions, second.num_positions), 64)
    batch.admit(first)
    while not first.token_ids:
        batch.advance()
    batch.admit(second)
    for _ in range(6):
        batch.advance()
    assert len(first.token_ids) == 8 and not second.token_ids
    encoded.set()
    while not batch.is_idle:
        batch.advance()
    assert len(first.token_ids) == 12 and second.token_ids == want


def test_a_picture_that_cannot_be_encoded_ends_its_own_request(monkeypatch):
    model = fresh("d")
    request = model.request(model.prepare("What?", [LARGE]), GenerationParams(max_new_tokens=5))
    monkeypatch.setattr(model.encoder, "_aside", ThreadPoolExecutor(1))

    def broken(*given):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.encoder, "_encode", broken)
    batch = model.batch(1, request.num_positions, 0)
    batch.admit(request)
    assert batch.advance() == [(request, "")] and str(request.error) == "no memory" and batch.is_idle


@pytest.mark.parametrize("variant", ["d", "x"])
def test_a_picture_is_encoded_on_a_stream_of_its_own(variant, monkeypatch):
    model, want, events = fresh(variant), fresh(variant).encode_image(LARGE), []
    main = SimpleNamespace(name="main")
    side = SimpleNamespace(device=None, wait_stream=lambda other: events.append(f"wait for {other.name}"))

    @contextmanager
    def on(stream):
        assert stream is side
        events.append("enter")
        yield
        events.append("leave")

    def refuse(*given):
        raise AssertionError("the whole device is waited for")

    monkeypatch.setattr(model.encoder, "_stream", side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: events.append(f"used by {stream.name}"))
    made = model.encode_image(LARGE)
    assert torch.equal(made.tokens, want.tokens)
    assert events == ["wait for main", "enter", "leave", *["used by main"] * (1 if variant == "d" else 3)]


def test_a_stage_waits_for_its_stream_alone(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *given: waited.append("device"))
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    fresh("d").encoder._wait(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)))
    assert waited == ["stream"]
