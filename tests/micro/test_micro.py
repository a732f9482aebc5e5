"""The micro models' documents, questions and training; and that the shipped models read what was never trained on."""

import json
import signal
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.inputs.image import plan_tiles
from nvlm_runtime.micro.dataset import FILES, QUESTIONS, document_at, write_dataset
from nvlm_runtime.micro.document import CHARS, COLOURS, GRIDS, SIDE, draw, make_document
from nvlm_runtime.micro.evaluate import evaluate, open_tag_mask
from nvlm_runtime.micro.questions import KINDS, questions, transcription
from nvlm_runtime.micro.train import Sizes, shared_vision_encoder, train_micro
from nvlm_runtime.micro.vision_encoder import IGNORE as NO_TARGET
from nvlm_runtime.micro.vision_encoder import (
    TARGETS,
    DenseHeads,
    TileStream,
    accuracy,
    dense_target,
    document_tiles,
    fit_heads,
)
from nvlm_runtime.micro.vocabulary import make_tokenizer
from nvlm_runtime.model.vision import InternViT
from nvlm_runtime.presets import MICRO_VISION, PRESETS
from nvlm_runtime.training.records import JsonLines
from nvlm_runtime.training.trainer import Trainer


def quiet(line: str) -> None:
    pass


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


def test_rows_are_conversations_about_their_pictures(tmp_path):
    """What is asked in a file is what the document of that picture answers; the same seed gives the same files."""
    write_dataset(tmp_path / "data", 3, 12, lambda line: None)
    files = {name: JsonLines(tmp_path / "data" / f"{name}.jsonl") for name in FILES}
    assert [len(files[name]) for name in ("transcribed", "asked")] == [48, 48]
    seen = set()
    for name, rows in files.items():
        for i in range(len(rows)):
            (picture,) = rows[i].images
            document = document_at(3, int(picture.stem))
            assert Image.open(picture).tobytes() == draw(document).tobytes()
            first, *others = (message["content"] for message in rows[i].messages)
            assert first.startswith("<image>\n")
            said = [first.removeprefix("<image>\n"), *others]
            pairs = list(zip(said[::2], said[1::2], strict=True))
            if name != "asked":
                page = pairs.pop()
                assert page == ("Read the picture.", transcription(document).answer)
            assert 1 <= len(pairs) <= QUESTIONS and len(set(pairs)) == len(pairs)
            assert set(pairs) <= {(question.text, question.answer) for question in questions(document)}
            assert name != "short" or len(document.tiles) in (2, 3)
            seen.add((name, len(document.tiles)))
    assert len(seen) > 6
    write_dataset(tmp_path / "again", 3, 12, lambda line: None)
    for name in FILES:
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == files[name].path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "data"], "whole files, no partial ones"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("micro") / "work"


SMALL = Sizes(steps=8, vision_steps=1, num_documents=12, rows=1)


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_a_micro_model_is_trained_and_a_stopped_run_goes_on(variant, work, tmp_path, monkeypatch):
    """Stopped in its second stage and gone on with, the bits are those of a run that was not stopped."""
    assert train_micro(variant, 0, tmp_path / "whole", work, SMALL, False, quiet) == 0
    model = NVLM.load(tmp_path / "whole")
    assert model.config == PRESETS[f"micro-{variant}"] and model.dtype == torch.float32
    assert sorted(path.name.split("-")[0] for path in work.iterdir()) == ["documents", "tower"]
    made = sorted((path, path.stat().st_mtime_ns) for path in work.iterdir())
    original, steps = Trainer.step, []

    def step(self):
        steps.append(self.out.name)
        if len(steps) == 5:
            self._signal = signal.SIGTERM
        return original(self)

    monkeypatch.setattr(Trainer, "step", step)
    assert train_micro(variant, 0, tmp_path / "parts", work, SMALL, False, quiet) == 128 + signal.SIGTERM
    assert steps == ["pretraining"] * 2 + ["fine-tuning"] * 3
    with pytest.raises(ValueError, match="not empty: --resume"):
        train_micro(variant, 0, tmp_path / "parts", work, SMALL, False, quiet)
    assert train_micro(variant, 0, tmp_path / "parts", work, SMALL, True, quiet) == 0
    assert steps == ["pretraining"] * 2 + ["fine-tuning"] * 6
    assert made == sorted((path, path.stat().st_mtime_ns) for path in work.iterdir()), "made once"
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    vision = [name for name in whole if name.startswith("vision_model.")]
    before = load_file(tmp_path / "parts" / "beginning" / "model.safetensors")
    assert all(torch.equal(whole[name], before[name].bfloat16()) for name in vision), "the vision encoder is frozen"


def test_heads_are_fitted_to_the_shipped_vision_encoder(tmp_path, monkeypatch):
    """They read what it knows; it does not change by a bit."""
    short = partial(fit_heads, steps=60, batch=32)
    monkeypatch.setattr("nvlm_runtime.micro.train.fit_heads", short)
    found = shared_vision_encoder(tmp_path, 0, 0, quiet)
    shipped = NVLM.load("micro-d").model.vision_model.state_dict()
    assert all(torch.equal(found["tower"][name], weight.float()) for name, weight in shipped.items())
    encoder, heads = InternViT(MICRO_VISION).eval(), DenseHeads(MICRO_VISION.hidden_size)
    encoder.load_state_dict(found["tower"])
    heads.load_state_dict(found["heads"])
    pixels, targets = next(iter(TileStream("unseen", 64, partial(dense_target, side=8))))
    with torch.inference_mode():
        shares = accuracy(heads(encoder(pixels)), targets)
    assert min(shares.values()) > 0.9, shares


def test_both_stages_lower_the_loss(work, tmp_path):
    """On 12 documents, by a tenth at least in each; the second begins about where the first ended."""
    sizes = replace(SMALL, steps=48)
    assert train_micro("x", 0, tmp_path / "out", work, sizes, False, quiet) == 0
    ends = []
    for name in ("pretraining", "fine-tuning"):
        lines = (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        ends.append((sum(losses[:5]) / 5, sum(losses[-5:]) / 5))
    assert ends[0][1] < 0.9 * ends[0][0] and ends[1][1] < 0.9 * ends[1][0], ends


@pytest.mark.parametrize("given", [{"steps": 1}, {"vision_steps": -1}, {"num_documents": 0}])
def test_sizes_that_train_nothing(given):
    with pytest.raises(ValueError, match="two steps or more"):
        replace(Sizes(), **given)


@cache
def report(variant):
    model = NVLM.load(f"micro-{variant}")
    assert model.config == PRESETS[f"micro-{variant}"]
    return model, evaluate(model, 777, 200)


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_shipped_models_read_new_documents(variant):
    model, found = report(variant)
    assert found["accuracy"] >= 0.95, found
    assert evaluate(model, 777, 100, blank_tiles=True)["by_kind"]["read"] < 0.2, "the thumbnail alone cannot be read"


def test_without_its_tag_mask_x_mistakes_tiles():
    """Every tag sees every tile: questions by tile suffer, questions by look do not."""
    model, found = report("x")
    masked, opened = found["by_kind"], evaluate(model, 777, 200, open_mask=True)["by_kind"]
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
