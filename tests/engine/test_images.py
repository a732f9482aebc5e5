"""Images that are computed once: handles in any place of a prompt, on disk, in the cache; tokens from elsewhere."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_runtime.engine.images import ImageCache, ImageHandle
from tests.engine.test_batch import LARGE, SMALL, fresh, vars_of
from tests.model.test_model import picture
from tests.small import small_engine

VARIANTS = ("d", "x", "h")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_handle_stands_for_its_picture_in_any_place(variant, monkeypatch):
    want = [
        fresh(variant).generate("First <image>, then <image>?", images, **vars_of(8)).token_ids
        for images in ([LARGE, SMALL], [SMALL, LARGE], [LARGE, LARGE])
    ]
    model = fresh(variant, reuse=False, image_cache_bytes=0)
    large, small = model.encode_image(LARGE), model.encode_image(SMALL)
    monkeypatch.setattr(model.runner, "encode", None)  # nothing may be encoded from here on
    for images, ids in zip(([large, small], [small, large], [large, large]), want, strict=True):
        assert model.generate("First <image>, then <image>?", images, **vars_of(8)).token_ids == ids
    ids = model.prepare("What is it?", [large]).input_ids
    assert torch.equal(model.logits(ids, [large]), fresh(variant).logits(ids, [LARGE]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_handles_are_saved_and_read_bit_for_bit(variant, tmp_path):
    model = fresh(variant)
    handle = model.encode_image(LARGE)
    handle.save(tmp_path / "image.safetensors")
    again = ImageHandle.load(tmp_path / "image.safetensors")
    assert again.key == handle.key and again.plan == handle.plan and again.fingerprint == handle.fingerprint
    assert torch.equal(again.tokens, handle.tokens)
    assert (again.kv is None) == (variant == "d")
    if again.kv:
        assert torch.equal(again.kv.k, handle.kv.k) and torch.equal(again.kv.v, handle.kv.v)
    assert [path.name for path in tmp_path.iterdir()] == ["image.safetensors"]
    want = fresh(variant).generate("What?", [LARGE], **vars_of(6)).token_ids
    assert fresh(variant).generate("What?", [again], **vars_of(6)).token_ids == want


@pytest.mark.parametrize("variant", VARIANTS)
def test_nbytes_is_what_a_handle_holds(variant):
    config = fresh(variant).config
    handle = fresh(variant).encode_image(LARGE)
    tokens = 7 * config.tokens_per_tile
    held = tokens * config.text.hidden_size
    if variant != "d":
        heads = config.text.num_key_value_heads * config.text.head_dim
        held += 2 * len(config.cross.layers) * handle.kv.k.shape[2] * heads
    assert handle.nbytes == 4 * held and handle.tokens.shape[0] == 7


def test_what_is_no_handle_is_refused(tmp_path):
    model = fresh("x")
    path = tmp_path / "handle"
    model.encode_image(SMALL).save(path)
    raw = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageHandle.load(tmp_path / "nothing")
    (tmp_path / "short").write_bytes(raw[:-7])
    (tmp_path / "text").write_text("hello")
    for name in ("short", "text"):
        with pytest.raises(ValueError, match="is not an image handle, or is damaged"):
            ImageHandle.load(tmp_path / name)
    (tmp_path / "flipped").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged: its tensors are not those that were saved"):
        ImageHandle.load(tmp_path / "flipped")
    save_file(load_file(path), tmp_path / "other")
    with pytest.raises(ValueError, match="its format is None"):
        ImageHandle.load(tmp_path / "other")


def test_a_handle_of_other_weights_is_refused():
    model, other = fresh("x"), fresh("x")
    handle = model.encode_image(SMALL)
    with torch.no_grad():
        other.model.vision_model.encoder.layers[0].attn.qkv.weight[0, 0] += 1
    with pytest.raises(ValueError, match="made by other weights"):
        other.prepare("What?", [handle])
    with pytest.raises(ValueError, match="made by other weights"):
        small_engine("x").prepare("What?", [handle])  # the same weights, but keys without positions


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_from_elsewhere(variant):
    model = fresh(variant)
    want = model.encode_image(LARGE)
    handle = model.handle_from_embeds(want.tokens.clone(), *LARGE.size)
    answer = fresh(variant).generate("What?", [handle], **vars_of(6)).token_ids
    assert answer == fresh(variant).generate("What?", [LARGE], **vars_of(6)).token_ids
    assert model.handle_from_embeds(want.tokens + 1, *LARGE.size).key != handle.key
    with pytest.raises(ValueError, match=r"image_embeds must be \[N, P, C\] = \[7, 4, 48\], got \[6, 4, 48\]"):
        model.handle_from_embeds(want.tokens[1:], *LARGE.size)


def test_a_picture_seen_again_is_not_encoded_again(monkeypatch):
    model = fresh("x", reuse=False)
    calls = []
    original = model.runner.encode
    monkeypatch.setattr(model.runner, "encode", lambda pixels: calls.append(len(pixels)) or original(pixels))
    first = model.generate("What?", [LARGE], **vars_of(4))
    second = model.generate("And what else?", [LARGE], **vars_of(4))
    assert calls == [7] and second.timings["encode"] == 0 < first.timings["encode"]
    model.generate("What?", [picture((96, 64), 9)], **vars_of(4))
    assert calls == [7, 7], "another picture of the same size"


def test_the_cache_keeps_the_last_ones_within_its_bytes():
    model = fresh("d", image_cache_bytes=0)
    handles = [model.encode_image(picture((32, 32), seed)) for seed in range(4)]
    cache = ImageCache(2 * handles[0].nbytes)
    for handle in handles[:2]:
        cache.put(handle)
    assert cache.get(handles[0].key) is handles[0]  # used last: the other one goes first
    cache.put(handles[2])
    assert [cache.get(handle.key) is not None for handle in handles] == [True, False, True, False]
    assert cache.nbytes == 2 * handles[0].nbytes and len(cache) == 2
    cache.put(model.encode_image(LARGE))
    assert len(cache) == 2, "larger than the cache: not kept, and nothing is thrown out for it"
    cache.clear()
    assert cache.nbytes == 0 and len(cache) == 0
