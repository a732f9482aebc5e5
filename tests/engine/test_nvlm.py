"""Streaming, endings, exact ids, and every refusal, on small random models."""

import asyncio

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.request import Request
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.step_bytes import step_bytes
from nvlm_runtime.inputs.tokenizer import Detokenizer
from tests.small import small_engine

IMAGE = Image.new("RGB", (96, 64), (200, 30, 60))
VARIANTS = ("d", "x", "h")


def play(engine, ids, eos_id=-1, limit=None, **params):
    """Pieces and the row of a request whose draws are these ids."""
    eos_id = engine.tokenizer.eos_id if eos_id == -1 else eos_id
    params = GenerationParams(**params)
    reads = step_bytes(engine.model)
    row = Request(engine.prepare("Hello?"), params, Detokenizer(engine.tokenizer), eos_id, limit or len(ids), reads)
    pieces = []
    while not row.done:
        pieces.append(row.accept(ids[len(pieces)]))
    return pieces, row


@pytest.fixture(scope="module")
def engine():
    return small_engine("d")


@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_is_generate(variant):
    engine = small_engine(variant)
    out = engine.generate("What?", [IMAGE], max_new_tokens=20, ignore_eos=True)
    stream = engine.stream("What?", [IMAGE], max_new_tokens=20, ignore_eos=True)
    assert "".join(stream) == out.text == stream.output.text
    assert stream.output.token_ids == out.token_ids
    assert out.finish_reason == "length" and len(out.token_ids) == 20
    stages = {"queue", "open", "tile", "encode", "project", "prefill", "decode", "total"}
    assert out.timings.keys() == stages
    assert out.timings["total"] == pytest.approx(sum(out.timings.values()) - out.timings["total"])


def test_never_half_a_character(engine):
    text = "né 日本 🙂!"
    ids = [i for byte in text.encode() for i in [engine.tokenizer._backend.token_to_id(_letter(byte))]]
    pieces, row = play(engine, ids)
    assert "".join(pieces) == row.text == text
    assert not any("\ufffd" in piece for piece in pieces)


def _letter(byte: int) -> str:
    """GPT-2's letter of a byte, so that a character is fed one byte at a time."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printing:
        return chr(byte)
    return chr(256 + sorted(set(range(256)) - set(printing)).index(byte))


def test_ends_at_the_end_token(engine):
    ids = [*engine.tokenizer.encode("AB"), engine.tokenizer.eos_id, *engine.tokenizer.encode("C")]
    pieces, row = play(engine, ids)
    assert "".join(pieces) == "AB" and row.finish_reason == "stop"
    assert row.token_ids == ids[:2], "the end token is not part of the answer"
    _, row = play(engine, ids, eos_id=None)
    assert row.token_ids == ids and row.text == "ABC" and row.finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (("LO",), "HEL"),
        (("ZZ",), "HELLO WORLD"),
        (("O W", "L"), "HE"),
        (("HELLO WORLD",), ""),
        (("DX",), "HELLO WORLD"),
    ],
    ids=str,
)
def test_stop_strings_are_never_shown(engine, stop, shown):
    pieces, row = play(engine, engine.tokenizer.encode("HELLO WORLD"), stop=stop)
    assert "".join(pieces) == row.text == shown
    assert row.finish_reason == ("length" if shown == "HELLO WORLD" else "stop")
    assert not any(text in "".join(pieces) for text in stop)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_ids_give_what_the_prompt_gives(variant):
    engine = small_engine(variant)
    ids = list(engine.prepare("What?", [IMAGE, IMAGE]).input_ids)
    by_ids = engine.generate(input_ids=ids, images=[IMAGE, IMAGE], max_new_tokens=6, ignore_eos=True)
    by_prompt = engine.generate("What?", [IMAGE, IMAGE], max_new_tokens=6, ignore_eos=True)
    assert by_ids.token_ids == by_prompt.token_ids
    assert by_ids.num_prompt_tokens == len(ids)
    assert engine.logits(ids, [IMAGE, IMAGE]).shape == (len(ids), 512)


def test_bare_slots_are_enough_for_exact_ids():
    engine = small_engine("d")
    pad = engine.tokenizer.special("<|vision_pad|>")
    assert engine.logits([7, *[pad] * 28, 9], [IMAGE]).shape == (30, 512)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_every_kind_are_the_same_image(variant, tmp_path):
    engine = small_engine(variant)
    IMAGE.save(tmp_path / "image.png")
    ids = engine.prepare("What?", [IMAGE]).input_ids
    want = engine.logits(ids, [IMAGE])
    for source in (tmp_path / "image.png", str(tmp_path / "image.png"), np.asarray(IMAGE)):
        assert torch.equal(engine.logits(ids, [source]), want)


def test_context_ends_an_answer(engine):
    ids = [100 + i % 300 for i in range(510)]
    out = engine.generate(input_ids=ids, max_new_tokens=100, ignore_eos=True)
    assert out.finish_reason == "length" and len(out.token_ids) == 512 - 510 + 1


def test_sampled_answers_repeat_with_their_seed(engine):
    options = {"max_new_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    first = engine.generate("What?", seed=3, **options)
    assert engine.generate("What?", seed=3, **options).token_ids == first.token_ids
    assert engine.generate("What?", seed=4, **options).token_ids != first.token_ids


def test_an_answer_that_goes_on_has_no_finish_reason(engine):
    stream = engine.stream("What?", max_new_tokens=5, ignore_eos=True)
    assert stream.output.finish_reason is None
    for _ in stream:
        pass
    assert stream.output.finish_reason == "length"


def test_weights_that_are_not_finite_are_an_error():
    engine = small_engine("d")
    engine.model.language_model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        engine.generate("What?")


@pytest.mark.parametrize("device", ["cuda:7", "nonsense"])
def test_refuses_devices_that_are_not_there(device):
    with pytest.raises(ValueError, match=f"device '{device}'"):
        NVLM.load("micro-d", device=device)


def pads(count):
    return [3] * count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({}, "exactly one of prompt, messages and input_ids"),
        ({"prompt": "a", "input_ids": [1]}, "exactly one of"),
        ({"prompt": 5}, "prompt must be a string"),
        ({"prompt": "a", "images": "picture.png"}, "must be a list"),
        ({"prompt": "a", "images": IMAGE}, "must be a list"),
        ({"prompt": "a", "images": np.zeros((3, 8, 3), np.uint8)}, "must be a list"),
        ({"input_ids": [1.5]}, "whole numbers"),
        ({"input_ids": [True]}, "whole numbers"),
        ({"input_ids": ["7"]}, "whole numbers"),
        ({"input_ids": [[5, 6]]}, "stream takes one prompt, got a list of 1"),
        ({"input_ids": [[5, 6], 7]}, "whole numbers"),
        ({"input_ids": 5}, "whole numbers"),
        ({"prompt": "<image> and <image>", "images": [IMAGE]}, "2 places for images, but there are 1"),
        ({"prompt": "<image>"}, "1 places for images, but there are 0"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [600]}, "from 0 to 511"),
        ({"input_ids": [-1]}, "from 0 to 511"),
        ({"input_ids": [5] * 600}, "600 tokens, the context of this model 512"),
        ({"prompt": "word " * 600}, "the context of this model 512"),
        ({"input_ids": [5, 6], "images": [IMAGE]}, "expected 7 tiles x 4 = 28 image placeholders, got 0"),
        ({"input_ids": pads(27), "images": [IMAGE]}, "expected 7 tiles x 4 = 28 image placeholders, got 27"),
        ({"input_ids": pads(28)}, "expected 0 tiles x 4 = 0 image placeholders, got 28"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "a", "temperature": -1.0}, "temperature"),
        ({"prompt": "a", "stop": [""]}, "stop must be"),
        ({"prompt": "a", "style": "llama"}, "style"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "message 1"),
        ({"messages": []}, "must be a user's"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_refuses(engine, arguments, message):
    with pytest.raises(ValueError, match=message):
        engine.stream(**arguments)


def test_x_refuses_ids_without_its_tags():
    engine = small_engine("x")
    with pytest.raises(ValueError, match="expected 1 images with tags"):
        engine.prepare(input_ids=[5, 6], images=[IMAGE])


def test_conversation_goes_on(engine):
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]}
    turns = [first, {"role": "assistant", "content": "A <image>"}, {"role": "user", "content": "And?"}]
    prepared = engine.prepare(messages=turns, images=[IMAGE])
    assert len(prepared.layout.images[0].placeholders) == 28
    assert engine.tokenizer.decode(prepared.input_ids).endswith("A <image>user\nAnd?assistant\n")


def test_astream_gives_the_pieces_of_stream_and_may_be_left(engine):
    options = {"max_new_tokens": 8, "ignore_eos": True}

    async def whole() -> str:
        return "".join([piece async for piece in engine.astream("What?", **options)])

    async def left() -> None:
        async for _ in engine.astream("What?", max_new_tokens=200, ignore_eos=True):
            break

    asyncio.run(left())
    assert asyncio.run(whole()) == engine.generate("What?", **options).text
    with pytest.raises(ValueError, match="astream takes one prompt"):
        engine.astream(["a", "b"])


@pytest.mark.parametrize(
    ("option", "message"),
    [({"dtype": "int8"}, "dtype must be auto, .*got 'int8'"), ({"native": None}, "native must be True, False")],
    ids=["dtype", "native"],
)
def test_load_refuses_wrong_options(option, message):
    with pytest.raises(ValueError, match=message):
        NVLM.load("micro-d", **option)
    assert NVLM.load("micro-d", dtype="bfloat16", device="cpu", native=False).dtype == torch.bfloat16
