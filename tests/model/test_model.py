"""NVLM-D, -X and -H: where the image goes, what can see it, and that the cache changes nothing."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.inputs.prompt import read_prompt
from nvlm_runtime.micro.vocabulary import make_tokenizer
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from tests.small import CONFIGS, randomise, small_engine, small_model

VARIANTS = ("d", "x", "h")
PICTURES = [(96, 64), (32, 32), (40, 200)]  # 3x2 tiles, one tile, 1x5 tiles


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


REQUESTS = {
    "image": ("What is it?", [picture(PICTURES[0])]),
    "one tile": ("What is it?", [picture(PICTURES[1])]),
    "text": ("What is it?", []),
    "two images": ("Is <image> in\n<image> or not?", [picture(PICTURES[0]), picture(PICTURES[2], 1)]),
    "late image": ("Before it all, what is in <image>", [picture(PICTURES[2])]),
}


def recompute(model: NVLM, prompt: str, images: list, count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens by running the whole sequence anew for each of them."""
    ids = list(model.prepare(prompt, images).input_ids)
    first = len(ids)
    rows = min(model.tokenizer.vocab_size, model.config.text.vocab_size)
    for _ in range(count):
        logits = model.logits(ids, images)
        ids.append(int(logits[-1, :rows].argmax()))
    return ids[first:], logits


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_generation_is_full_recomputation(variant, request_name):
    model = small_engine(variant)
    prompt, images = REQUESTS[request_name]
    tokens, _ = recompute(model, prompt, images, 8)
    assert model.generate(prompt, images, max_new_tokens=8, ignore_eos=True).token_ids == tokens


@pytest.mark.parametrize("switches", [{"placement": "before", "ffn": "gelu4x"}, {"ffn": "swiglu"}], ids=str)
@pytest.mark.parametrize("variant", ["x", "h"])
def test_cached_generation_with_other_cross_layers(variant, switches):
    model = small_engine(variant, **switches)
    prompt, images = REQUESTS["two images"]
    tokens, _ = recompute(model, prompt, images, 6)
    assert model.generate(prompt, images, max_new_tokens=6, ignore_eos=True).token_ids == tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_is_its_rows_alone(variant):
    model = small_engine(variant)
    prepared = [model.prepare(prompt, images) for prompt, images in REQUESTS.values()]
    params = GenerationParams(max_new_tokens=8, ignore_eos=True)
    alone = [model.generate([each], params=params)[0] for each in prepared]
    together = model.generate(prepared, params=params)
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    assert [out.text for out in together] == [out.text for out in alone]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_batch_end_each_in_its_time(variant):
    model = small_engine(variant)
    prepared = [model.prepare(prompt, images) for prompt, images in REQUESTS.values()]
    prepared.append(model.prepare(input_ids=[100 + i % 300 for i in range(509)]))  # the context ends this one
    free = GenerationParams(max_new_tokens=12, ignore_eos=True)
    texts = [model.generate([each], params=free)[0].text for each in prepared]
    stops = [text[2 + row : 5 + row] for row, text in enumerate(texts) if text[2 + row : 5 + row]]
    params = GenerationParams(max_new_tokens=12, ignore_eos=True, stop=stops)
    alone = [model.generate([each], params=params)[0] for each in prepared]
    together = model.generate(prepared, params=params)
    assert len({len(out.token_ids) for out in together}) > 1, "they end at different steps"
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    assert [out.text for out in together] == [out.text for out in alone]


@pytest.mark.parametrize("ffn", ["none", "swiglu", "gelu4x"])
@pytest.mark.parametrize("placement", ["inside", "before"])
def test_closed_gates_leave_the_text_model(placement, ffn):
    model = small_model("x", placement=placement, ffn=ffn)
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            parameter.data.zero_()
    bare = NVLMModel(replace(model.config, variant="d", cross=None))
    bare.language_model.load_state_dict(model.language_model.state_dict(), strict=False)
    engine = NVLM(model, make_tokenizer(512))
    text = NVLM(bare.eval(), make_tokenizer(512))
    prompt, images = REQUESTS["two images"]
    ids = engine.prepare(prompt, images).input_ids
    assert torch.equal(engine.logits(ids, images), text.logits(ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_never_change_what_stands_before_them(variant):
    model = small_engine(variant, **({"ffn": "swiglu"} if variant != "d" else {}))
    prompt = "Before it all, <image> and then <image> and more"
    first, second = picture((96, 64)), picture((64, 64), 1)
    ids = model.prepare(prompt, [first, second]).input_ids
    plans = model.prepare(prompt, [first, second]).plans
    starts = [block.start for block in read_prompt(model.tokenizer, model.config, ids, plans).blocks]
    base = model.logits(ids, [first, second])
    for start, other in zip(starts, ([picture((96, 64), 3), second], [first, picture((64, 64), 2)]), strict=True):
        changed = model.logits(ids, other)
        assert torch.equal(base[:start], changed[:start])
        assert (base[-1] != changed[-1]).any(), "and what stands after it does change"


def test_every_subtoken_of_a_tag_sees_its_own_tile_alone():
    model = small_engine("x")
    image = picture((96, 64))
    prepared = model.prepare("What is it?", [image])
    per_tile = model.config.tokens_per_tile
    tags = [model.tokenizer.encode(f"<tile_{k}>") for k in range(1, 7)]
    tags.append(model.tokenizer.encode("<tile_global_thumbnail>"))
    run = [i for tag in tags for i in tag]
    ids = list(prepared.input_ids)
    start = next(i for i in range(len(ids)) if ids[i : i + len(run)] == run)
    intervals = prepared.layout.intervals.tolist()
    assert intervals[:start] == [[0, 0]] * start
    at = start
    for tile, tag in enumerate(tags):
        assert intervals[at : at + len(tag)] == [[tile * per_tile, (tile + 1) * per_tile]] * len(tag)
        at += len(tag)
    assert intervals[at:] == [[0, 7 * per_tile]] * (len(ids) - at)
    assert prepared.layout.after == (0, 7 * per_tile)


def test_h_puts_tags_beside_regular_tiles_and_the_thumbnail_into_the_decoder():
    model = small_engine("h")
    prepared = model.prepare("What is it?", [picture((96, 64)), picture((32, 32))])
    layout, per_tile = prepared.layout, model.config.tokens_per_tile
    tags = [tuple(model.tokenizer.encode(f"<tile_{k}>")) for k in range(1, 7)]
    large, small = layout.images
    assert (
        large.key_sources == tuple(piece for tile, tag in enumerate(tags) for piece in (tag, tile))
        and small.key_sources == ()
    )
    assert large.placeholder_tiles == (6,) and small.placeholder_tiles == (0,), (
        "a one-tile picture is its own thumbnail"
    )
    assert len(large.placeholders) == len(small.placeholders) == per_tile
    assert layout.cross_length == sum(map(len, tags)) + 6 * per_tile
    one = model.prepare("What is it?", [picture((32, 32))])
    assert one.layout.cross_length == 0


def test_h_trains_the_tag_embeddings():
    model = small_engine("h")
    prepared = model.prepare("What is it?", [picture((96, 64))])
    features = Features.cat([model.model.encode(pixels) for pixels in prepared.pixel_values])
    text_ids = torch.tensor([prepared.input_ids])
    hidden = model.model(text_ids, [prepared.layout], [features])
    (grad,) = torch.autograd.grad(hidden.square().sum(), model.model.language_model.embed_tokens.weight)
    digits = [model.tokenizer.encode(f"<tile_{k}>")[2] for k in range(1, 7)]
    assert all(d not in prepared.input_ids for d in digits), "the tags are in the keys, not in the text"
    assert (grad[digits].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("variant", ["x", "h"])
def test_image_keys_are_computed_once_an_image(variant, monkeypatch):
    model = small_engine(variant)
    calls = []
    layers = [model.model.language_model.layers[i].cross_attn for i in model.config.cross.layers]
    for layer in layers:
        original = layer.keys_values
        monkeypatch.setattr(layer, "keys_values", lambda *given, f=original: calls.append(given) or f(*given))
    encoded = []
    original_encode = model.model.encode
    monkeypatch.setattr(model.model, "encode", lambda pixels: encoded.append(len(pixels)) or original_encode(pixels))
    model.generate("What is it?", [picture((96, 64))], max_new_tokens=10, ignore_eos=True)
    assert len(calls) == len(layers) and encoded == [7]


def test_a_text_row_in_a_mixed_batch_is_exactly_the_text_model():
    model = small_engine("x")
    bare = NVLMModel(replace(model.config, variant="d", cross=None))
    bare.language_model.load_state_dict(model.model.language_model.state_dict(), strict=False)
    text = NVLM(bare.eval(), make_tokenizer(512))
    prepared = [model.prepare("What is it?"), model.prepare("What is it?", [picture((96, 64))])]
    want = text.generate("What is it?", max_new_tokens=8, ignore_eos=True)
    got = model.generate(prepared, params=GenerationParams(max_new_tokens=8, ignore_eos=True))[0]
    assert got.token_ids == want.token_ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_used(variant):
    """A gradient reaches every parameter from one picture's answer; none is named but unreachable."""
    model = randomise(NVLMModel(CONFIGS[variant]))
    engine = NVLM(model, make_tokenizer(512))
    prepared = engine.prepare("What is it?", [picture((96, 64))])
    features = Features.cat([model.encode(pixels) for pixels in prepared.pixel_values])
    hidden = model(torch.tensor([prepared.input_ids]), [prepared.layout], [features])
    model.language_model.logits(hidden).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
