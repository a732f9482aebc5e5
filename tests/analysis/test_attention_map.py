"""Attention maps: weights that sum to 1, equal to a softmax written out and to transformers' own; heat maps."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm_runtime import NVLM
from nvlm_runtime.analysis.attention_map import _places, attention_map
from nvlm_runtime.analysis.heat_map import draw_heat_map, stack
from nvlm_runtime.commands.cli import main
from nvlm_runtime.inputs.image import plan_tiles
from nvlm_runtime.model.model import NVLMModel
from tests.model.test_model import picture
from tests.model.test_parity import copy_text, published, text_config
from tests.small import CONFIGS, micro_tokenizer, randomise, small_engine

RECEIPT = Path(__file__).parents[2] / "examples" / "receipt.png"
LARGE, ONE = picture((96, 64)), picture((32, 32), 1)


def map_of(model: NVLM, images: list, num: int = 3):
    prompt = model.prepare("What is it?", images)
    answer = model.generate("What is it?", images, max_new_tokens=num, ignore_eos=True).token_ids
    return (
        prompt,
        [*prompt.input_ids, *answer],
        attention_map(model, [*prompt.input_ids, *answer], images, len(prompt.input_ids)),
    )


@pytest.mark.parametrize("images", [[LARGE], [ONE], [ONE, LARGE]], ids=["seven", "one", "both"])
@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_shares_sum_to_one(variant, images):
    model = small_engine(variant)
    prompt, _, found = map_of(model, images)
    routing, side = model.config.routing, round(model.config.tokens_per_tile**0.5)
    weights = torch.cat([image.weights for image in found.images], dim=1)
    held = torch.tensor([tile for tiles in found.in_decoder for tile in tiles])
    assert weights.shape == (3, sum(plan.num_tiles for plan in prompt.plans), side, side) and (weights >= 0).all()
    for part, there in ((held, routing.decoder != "none"), (~held, routing.cross != "none" and bool((~held).any()))):
        if there:
            torch.testing.assert_close(weights[:, part].sum((1, 2, 3)), torch.ones(3))
        else:
            assert not part.any()
    assert (
        held.tolist()
        == {
            "d": [True] * len(held),
            "x": [False] * len(held),
            "h": [tile == plan.num_tiles - 1 for plan in prompt.plans for tile in range(plan.num_tiles)],
        }[variant]
    )
    share = found.decoder_share
    assert ((share > 0) & (share < 1)).all() if held.any() else (share == 0).all()


@pytest.mark.parametrize("variant", ["x", "h"])
@torch.inference_mode()
def test_cross_attention_is_the_softmax_written_out(variant):
    model = small_engine(variant)
    prompt, ids, found = map_of(model, [LARGE])
    layers, inputs = model.model.language_model.layers, []
    hooks = [
        layer.cross_attn.register_forward_pre_hook(lambda _, i: inputs.append(i))
        for layer in layers
        if layer.cross_attn
    ]
    model.logits(ids, [LARGE])
    for hook in hooks:
        hook.remove()
    total = 0
    for cross, (x, branch, k, _, intervals) in zip((i.cross_attn for i in layers if i.cross_attn), inputs, strict=True):
        x = x if branch is None else x + branch
        q = cross.q_proj(cross.norm(x))[0].unflatten(-1, (-1, cross.head_dim))
        for row in range(len(prompt.input_ids) - 1, len(ids) - 1):
            start, end = intervals[0, row].tolist()
            assert (start, end) == prompt.layout.after
            for head in range(q.shape[1]):
                keys = k[0, :, head * k.shape[2] // q.shape[1]]
                part = torch.zeros(len(ids), k.shape[1])
                part[row] = torch.softmax(keys @ q[row, head] / cross.head_dim**0.5, 0) / q.shape[1]
                total = total + part
    total = total[len(prompt.input_ids) - 1 : -1] / len(inputs)
    image, tokens, at = prompt.layout.images[0], model.config.tokens_per_tile, 0
    kept = []
    for piece in image.key_sources:  # NVLM-H's tags are keys too, and no image
        length = tokens if isinstance(piece, int) else len(piece)
        if isinstance(piece, int):
            kept.append(total[:, at : at + length])
        at += length
    want = torch.stack(kept, dim=1)
    want = want / want.sum((1, 2), keepdim=True)
    got = found.images[0].weights[:, : want.shape[1]].flatten(2)[..., _places(model.config)]
    torch.testing.assert_close(got, want)


def test_the_decoder_s_weights_are_transformers():
    text = text_config("Qwen2ForCausalLM", False, None)
    theirs = published(text)
    theirs.set_attn_implementation("eager")
    tokenizer = micro_tokenizer()
    config = replace(CONFIGS["d"], text=replace(text, vocab_size=max(200, tokenizer.vocab_size)))
    engine = NVLM(randomise(NVLMModel(config)), tokenizer, native=False)
    decoder = engine.model.language_model
    for part in (decoder.embed_tokens, decoder.lm_head):  # of the tokenizer's size; the layers are theirs
        part.weight.data = part.weight.data[:200]
    saved = {name: getattr(decoder, name).weight.data for name in ("embed_tokens", "lm_head")}
    copy_text(decoder, theirs)
    for name in saved:
        getattr(decoder, name).weight.data = torch.randn(tokenizer.vocab_size, 64)
    prompt, ids, found = map_of(engine, [LARGE])
    tokens = engine.encode_image(LARGE).tokens
    x = engine.model.embed(torch.tensor([ids]), [engine.prepare(input_ids=ids, images=[LARGE]).layout], [[tokens]])
    with torch.inference_mode():
        weights = theirs.model(inputs_embeds=x, output_attentions=True).attentions
    mean = torch.stack(weights).mean((0, 2))[0, len(prompt.input_ids) - 1 : -1]
    slots = mean[:, list(prompt.layout.images[0].placeholders)]
    torch.testing.assert_close(found.decoder_share, slots.sum(-1), rtol=1e-4, atol=1e-5)
    want = (slots / slots.sum(-1, keepdim=True)).unflatten(-1, (-1, config.tokens_per_tile))
    got = found.images[0].weights.flatten(2)[..., _places(config)]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_the_shipped_models_read_the_tile_they_are_asked_for(variant):
    model = NVLM.load(f"micro-{variant}")
    for tile in (1, 3, 6):
        question = f"What is the word in tile {tile}?"
        prompt, output = model.prepare(question, [RECEIPT]), model.generate(question, [RECEIPT])
        ids = [*prompt.input_ids, *output.token_ids]
        shares = attention_map(model, ids, [RECEIPT], len(prompt.input_ids)).images[0].weights.mean(0).sum((1, 2))
        assert shares[:6].argmax() == tile - 1, (output.text, shares)


@pytest.mark.parametrize(("version", "want"), [("v2", [0, 1, 2, 3]), ("v1", [0, 2, 1, 3])])
def test_places_of_image_tokens(version, want):
    config = replace(CONFIGS["d"], ps_version=version)
    config = replace(config, vision=replace(config.vision, image_size=4 * config.vision.patch_size))
    assert _places(config).tolist() == want


def test_bad_arguments():
    model = small_engine("x")
    ids = model.prepare("What?", [ONE]).input_ids
    with pytest.raises(ValueError, match="needs an image"):
        attention_map(model, ids, [], 1)
    for first in (0, len(ids), -1):
        with pytest.raises(ValueError, match=f"first must be from 1 to {len(ids) - 1}"):
            attention_map(model, ids, [ONE], first)


def test_the_heat_map_is_bright_where_the_weights_are():
    image = Image.new("RGB", (192, 128), (90, 90, 90))
    plan = plan_tiles(192, 128, 64)
    assert (plan.cols, plan.rows, plan.has_thumbnail) == (3, 2, True)
    weights = torch.zeros(7, 4, 4)
    weights[4, 3, 0] = 0.2  # the second row's second tile, its lower left corner
    weights[6, 0, 3] = 0.01  # the thumbnail's upper right corner
    drawn = draw_heat_map(image, plan, weights)
    assert drawn.size == (3 * 192 + 24 + 192, 2 * 192), "tiles of 64 pixels are drawn three times as large"
    grey = np.asarray(drawn, np.float32).sum(-1)
    tiles, thumbnail = grey[:, :576], grey[:192, 600:]
    tiles[::192] = tiles[:, ::192] = 0
    y, x = np.unravel_index(tiles[200:370, 200:370].argmax(), (170, 170))
    assert y > 110 and x < 60
    y, x = np.unravel_index(thumbnail.argmax(), thumbnail.shape)
    assert y < 48 and x >= 144
    assert drawn.getpixel((576 + 12, 10)) == (255, 255, 255) and drawn.getpixel((600, 300)) == (255, 255, 255)
    both = stack([drawn, draw_heat_map(Image.new("RGB", (64, 64)), plan_tiles(64, 64, 64), torch.ones(1, 4, 4))])
    assert both.size == (drawn.width, drawn.height + 192 + drawn.height // 16)


def test_the_command(tmp_path, capsys):
    words = ["attention-map", str(RECEIPT), "What is the total?", "--model", "micro-h"]
    assert main([*words, "--png", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "17.40" and "thumbnail" in out and "layer 5: gate" in out
    assert main([*words, "--png", str(tmp_path / "b.png"), "--token", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["text"] == "".join(values["tokens"]) == "17.40" and len(values["tiles"][0]) == 5
    assert all(len(shares) == 7 for shares in values["tiles"][0]) and len(values["gates"]) == 6
    with Image.open(tmp_path / "a.png") as whole, Image.open(tmp_path / "b.png") as first:
        assert whole.size == first.size and whole.tobytes() != first.tobytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["What?"], "needs an image"),
        ([str(RECEIPT), "What is the total?", "--token", "9"], "--token must be from 1 to 5"),
        ([str(RECEIPT), "What?", "--png", "nowhere/a.png"], "its folder is not there"),
        ([str(RECEIPT), "What?", "--png", "a.what"], "names a picture format"),
        (["nothing.png", "What?"], "nothing.png"),
    ],
)
def test_bad_words(words, said, capsys):
    assert main(["attention-map", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_tag_attends_to_its_own_tile_and_text_before_the_image_to_none():
    model = small_engine("x")
    prompt = model.prepare("Before <image> and after", [LARGE])
    weights = (
        attention_map(model, prompt.input_ids, [LARGE], 1).images[0].weights.sum((2, 3))
    )  # of all rows but the last
    own = 0
    for row, (start, end) in zip(weights, (prompt.layout.intervals[:-1] // model.config.tokens_per_tile).tolist()):
        assert (row[start:end] > 0).all() and row[:start].sum() == row[end:].sum() == 0
        own += end - start == 1
    assert own >= 7 and (weights[0] == 0).all()
