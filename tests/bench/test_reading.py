"""bench.experiments.reading: what a tile says token by token, and a loss that falls when it is said."""

import pytest
import torch

from bench.experiments.reading import FIELDS, Vocabulary, reading_loss
from nvlm_runtime.checkpoint.bundled import BUNDLED
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.micro.document import COLOURS, LABELS, Line, Shape, Tile
from nvlm_runtime.micro.vision_encoder import ROLES, TileStream


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(BUNDLED / "micro-d")


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary.of(tokenizer, 16)


def line(text, role, y):
    return Line(text, role, "red", 3.0, y, 9.0, 12.0)


def said(vocabulary, target, field):
    return [vocabulary.tokens[at - 1] if at else None for at in target[FIELDS.index(field)].tolist()]


def test_the_upper_part_is_said_first(vocabulary, tokenizer):
    tile = Tile([line("12.5", "value", 50.0), line("TAX", "label", 12.0)])
    target = vocabulary.target(tile)
    tax, value, end = tokenizer.encode("TAX"), tokenizer.encode("12.5"), tokenizer.special("<|im_end|>")
    start = tokenizer.encode("\n")[-1]
    assert said(vocabulary, target, "token") == [*tax, end, *[None] * 4, *value, end, *[None] * 3]
    assert said(vocabulary, target, "before") == [start, *tax, *[None] * 4, start, *value, *[None] * 3]
    roles = [ROLES.index("label")] * 4 + [0] * 4 + [ROLES.index("value")] * 5 + [0] * 3
    assert target[FIELDS.index("role")].tolist() == roles
    assert target[FIELDS.index("colour")].tolist() == [(1 + list(COLOURS).index("red")) * bool(role) for role in roles]
    assert target[FIELDS.index("label")].tolist() == [(1 + LABELS.index("TAX")) * bool(role) for role in roles]


def test_a_shape_says_its_name(vocabulary, tokenizer):
    target = vocabulary.target(Tile([], Shape("star", "blue", 30.0, 30.0, 10.0)))
    ids = [*tokenizer.encode("star"), tokenizer.special("<|im_end|>")]
    assert said(vocabulary, target, "token") == [*ids, *[None] * (16 - len(ids))]
    assert target[FIELDS.index("role"), 0] == ROLES.index("star")


def test_thumbnails_say_nothing(vocabulary):
    pixels, targets = next(iter(TileStream("train", 30, vocabulary.target, thumbnails=True)))
    assert pixels.shape == (30, 3, 64, 64) and targets.shape == (30, len(FIELDS), 16)
    silent = (targets == 0).all(-1).all(-1)
    assert silent.any() and not silent.all()


def test_what_is_said_has_the_least_loss(vocabulary):
    torch.manual_seed(0)
    embedding = torch.randn(512, 160) + 3  # not centred, as trained ones are not
    directions = vocabulary.directions(embedding)
    texts = (("TAX", "12.5"), ("LOT", "K90"))  # with a label, as "nothing" has no direction to be seen by
    tiles = [Tile([line(label, "label", 12.0), line(value, "value", 50.0)]) for label, value in texts]
    targets = torch.stack([vocabulary.target(tile) for tile in tiles])
    exact = sum(rows[targets[:, field]] for field, rows in enumerate(directions))
    loss, shares = reading_loss(20 * exact, targets, directions)
    assert shares == [1.0] * len(FIELDS) and loss < 2
    assert reading_loss(20 * exact.roll(1, 1), targets, directions)[0] > 10
    unit = torch.cat([rows[1:] for rows in directions]).norm(dim=-1)
    torch.testing.assert_close(unit, torch.ones_like(unit))


def test_a_text_that_does_not_fit(tokenizer):
    with pytest.raises(ValueError, match="tokens, a part of a tile has room for 3 and an end"):
        Vocabulary.of(tokenizer, 8)
