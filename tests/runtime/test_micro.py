"""The micro models' documents, questions and training; and that the shipped models read what was never trained on."""

import random
from dataclasses import replace

import pytest
import torch

from nvlm_runtime.engine import NVLM
from nvlm_runtime.image import plan_tiles
from nvlm_runtime.micro.dataset import IGNORE, batches, document_at, make_sample, plan_of, shuffle_keys, write_features
from nvlm_runtime.micro.document import CHARS, COLOURS, GRIDS, SIDE, draw, make_document
from nvlm_runtime.micro.evaluate import evaluate, open_tag_mask
from nvlm_runtime.micro.questions import KINDS, questions
from nvlm_runtime.micro.tower import IGNORE as NO_TARGET
from nvlm_runtime.micro.tower import TARGETS, dense_target, document_tiles
from nvlm_runtime.micro.train import Recipe, init_weights, train_decoder, train_micro
from nvlm_runtime.micro.vocabulary import make_tokenizer
from nvlm_runtime.model import NVLMModel
from nvlm_runtime.presets import PRESETS
from nvlm_runtime.prompt import build_prompt


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_documents_lead_the_tiler_to_their_grid(grid):
    for index in range(20):
        document = make_document(f"grid:{index}", grid)
        plan = plan_tiles(document.width, document.height, SIDE)
        assert (plan.cols, plan.rows) == grid == (document.cols, document.rows)
        assert len(document.tiles) == plan.num_regular
    assert draw(document).size == (document.width, document.height)


def test_documents_come_from_their_seed_alone():
    first, again, other = make_document("a:1"), make_document("a:1"), make_document("a:2")
    assert first == again and draw(first).tobytes() == draw(again).tobytes()
    assert other != first


def test_text_stays_inside_its_tile_and_one_glyph_a_patch():
    for index in range(300):
        for tile in make_document(f"inside:{index}").tiles:
            target = dense_target(tile, 8)
            for line in tile.lines:
                assert 0 < line.x and line.x + line.pitch * len(line.text) < SIDE
                assert 0 < line.y - line.height / 2 and line.y + line.height / 2 < SIDE
                centres = [(int(y / 8), int(x / 8)) for x, y in line.centres()]
                assert len(set(centres)) == len(line.text)
                got = [CHARS[target[0].reshape(8, 8)[at] - 1] for at in centres]
                assert "".join(got) == line.text
            assert (target[0] > 0).sum() == sum(len(line.text) for line in tile.lines)
            assert ((target[2] != NO_TARGET) | (target[1] == 0)).all()
            assert all(row.max() < size for row, size in zip(target, TARGETS.values()))


def test_questions_have_one_answer():
    seen = set()
    for index in range(300):
        document = make_document(f"questions:{index}")
        asked = questions(document)
        texts = [question.text for question in asked]
        assert len(texts) == len(set(texts)), "the same question twice"
        seen |= {question.kind for question in asked}
        for question in asked:
            assert question.answer and set(question.answer) <= set(CHARS + " ") or question.answer.islower()
    assert seen == set(KINDS)


def test_document_tiles_are_what_the_model_sees():
    document = make_document("tiles:0", (3, 2))
    assert document_tiles(document).shape == (6, 3, SIDE, SIDE)


def test_vocabulary_spells_what_documents_print():
    tokenizer = make_tokenizer(512)
    text = "MILK 4.35 APPLE 90"
    assert len(tokenizer.encode(text)) == len(text)
    assert all(len(tokenizer.encode(name)) == 1 for name in COLOURS)
    assert len(tokenizer.encode("<tile_1>")) == len(tokenizer.encode("<tile_6>"))


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_samples_are_the_prompt_of_the_conversation(variant):
    config, tokenizer = PRESETS[f"micro-{variant}"], make_tokenizer(512)
    document = document_at(0, 1)
    chosen = questions(document)[:3]
    sample = make_sample(config, tokenizer, document, chosen, slice(0, 1))
    messages = []
    for question in chosen:
        messages += [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
    whole = build_prompt(tokenizer, config, messages, [plan_of(document)], generation=False)
    assert [*sample.input_ids, tokenizer.special("<|im_end|>")] == list(whole.input_ids)
    assert len(sample.labels) == len(sample.input_ids) == len(sample.layout.intervals)
    answers = [label for label in sample.labels if label != IGNORE]
    want = []
    for question in chosen:
        want += [*tokenizer.encode(question.answer), tokenizer.special("<|im_end|>")]
    assert answers == want
    shifted = [
        label for label, token in zip(sample.labels, [*sample.input_ids[1:], want[-1]]) if label not in (IGNORE, token)
    ]
    assert not shifted, "a label is the next token"


def test_shuffled_keys_leave_every_tag_its_own_tile():
    config, tokenizer = PRESETS["micro-x"], make_tokenizer(512)
    document = make_document("shuffle", (3, 2))
    sample = make_sample(config, tokenizer, document, questions(document)[:1], slice(0, 1))
    before, size = sample.layout, config.tokens_per_tile
    after = shuffle_keys(config, before, random.Random(1))
    pieces, shuffled = before.images[0].cross, after.images[0].cross
    assert shuffled != pieces and sorted(shuffled) == sorted(pieces)
    for old, new in zip(before.intervals.tolist(), after.intervals.tolist()):
        if old[1] - old[0] == size:
            assert shuffled[new[0] // size] == pieces[old[0] // size] and new[1] - new[0] == size
        else:
            assert new == old
    assert any(old[1] - old[0] == size for old in before.intervals.tolist())


@pytest.mark.parametrize("variant, grid", [("d", (3, 2)), ("h", (3, 2)), ("x", (1, 1))])
def test_nothing_else_is_shuffled(variant, grid):
    config, tokenizer = PRESETS[f"micro-{variant}"], make_tokenizer(512)
    document = make_document("shuffle:1", grid)
    layout = make_sample(config, tokenizer, document, questions(document)[:1], slice(0, 1)).layout
    assert shuffle_keys(config, layout, random.Random(1)) is layout


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_training_lowers_the_loss(variant, tmp_path):
    torch.manual_seed(0)
    model = NVLMModel(PRESETS[f"micro-{variant}"])
    init_weights(model)
    model.vision_model.requires_grad_(False)
    write_features(model, tmp_path / "features.npy", 0, 16, lambda line: None)
    stream = batches(model.config, make_tokenizer(512), tmp_path / "features.npy", 0, 16, 2, 2, 0, 0)
    lines: list[str] = []
    train_decoder(model, stream, Recipe(steps=26), lines.append)
    first, last = (float(line.split("loss ")[1].split()[0]) for line in lines)
    assert last < 0.8 * first


def test_train_micro_makes_a_checkpoint_that_loads(tmp_path):
    recipe = Recipe(steps=1, tower_steps=1, num_documents=64, batch=2, num_questions=1)
    train_micro("h", 0, tmp_path / "out", tmp_path / "work", replace(recipe, batch=1), lambda line: None)
    model = NVLM.load(tmp_path / "out")
    assert model.config == PRESETS["micro-h"] and model.dtype == torch.float32
    made = sorted(path.name.split("-")[0] for path in (tmp_path / "work").iterdir())
    assert made == ["features", "tower"], "whole files, no partial ones"


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_shipped_models_read_new_documents(variant):
    model = NVLM.load(f"micro-{variant}")
    assert model.config == PRESETS[f"micro-{variant}"]
    report = evaluate(model, 777, 200)
    assert report["accuracy"] >= 0.95, report
    assert evaluate(model, 777, 100, blank_tiles=True)["by_kind"]["read"] < 0.2, "the thumbnail alone cannot be read"


def test_without_its_tag_mask_x_mistakes_tiles():
    """Every tag sees every tile: questions by tile suffer, questions by look do not."""
    model = NVLM.load("micro-x")
    masked, opened = (evaluate(model, 777, 200, open_mask=open_mask)["by_kind"] for open_mask in (False, True))
    assert opened["tile"] < masked["tile"] - 0.25 and opened["read"] < masked["read"] - 0.25, (masked, opened)
    assert opened["colour"] > masked["colour"] - 0.1, (masked, opened)


def test_open_mask_opens_every_tag_and_nothing_else():
    model = NVLM.load("micro-x")
    prepared = model.prepare("What word is in tile 3?", [draw(make_document("open:0", (3, 2)))])
    before, after = prepared.layout.intervals, open_tag_mask(prepared).layout.intervals
    changed = (before != after).any(-1).nonzero().flatten().tolist()
    tags = [i for i, (start, end) in enumerate(before.tolist()) if end - start == model.config.tokens_per_tile]
    assert changed == tags and tags
    assert (after[tags] == torch.tensor([0, prepared.layout.cross_length])).all()
