"""Tiles of NVLM-X in another order among the keys: every tag sees its own tile, everything else what it saw."""

import random
from dataclasses import replace

import pytest
import torch

from nvlm_runtime.inputs.layout import shuffle_tiles
from nvlm_runtime.training.documents import make_document
from nvlm_runtime.training.records import JsonLines
from nvlm_runtime.training.source import Source
from nvlm_runtime.training.trainer import Trainer
from tests.model.test_model import picture
from tests.small import CONFIGS, micro_tokenizer
from tests.training.data import datasets, turns, write_records
from tests.training.test_trainer import quiet, recipe_of


def layout_of(folder, variant, *sizes):
    names = [f"{i}.png" for i in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        picture(size).save(folder / name)
    asked = turns(" and ".join(["<image>"] * len(sizes)) + ": what?", "This.")
    row = JsonLines(write_records(folder / "rows.jsonl", [{"image": names, "conversations": asked}]))[0]
    config = CONFIGS[variant]
    return config, make_document(row, micro_tokenizer(), config, 2000, "hf", "task", print).layout


def test_every_tag_keeps_its_tile(tmp_path):
    """Of three images, one of a single tile between the others."""
    config, before = layout_of(tmp_path, "x", (96, 64), (32, 32), (64, 32))
    after, size = shuffle_tiles(config, before, random.Random(1)), config.tokens_per_tile
    for old, new in zip(before.images, after.images, strict=True):
        assert sorted(old.key_sources) == sorted(new.key_sources) and replace(new, key_sources=old.key_sources) == old
    assert before.images[0].key_sources != after.images[0].key_sources

    def tile(layout, start):
        """(image, tile) whose keys begin there."""
        for number, image in enumerate(layout.images):
            if image.keys[0] <= start < image.keys[1]:
                assert (start - image.keys[0]) % size == 0
                return number, image.key_sources[(start - image.keys[0]) // size]

    num_tags = 0
    for old, new in zip(before.intervals.tolist(), after.intervals.tolist(), strict=True):
        if old[1] - old[0] == size:
            num_tags += 1
            assert new[1] - new[0] == size and tile(after, new[0]) == tile(before, old[0])
        else:
            assert new == old
    assert num_tags > 10 and not torch.equal(before.intervals, after.intervals)


@pytest.mark.parametrize(("variant", "size"), [("d", (96, 64)), ("h", (96, 64)), ("x", (32, 32))])
def test_nothing_else_is_shuffled(tmp_path, variant, size):
    config, before = layout_of(tmp_path, variant, size)
    after = shuffle_tiles(config, before, random.Random(1))
    assert after.images == before.images and torch.equal(after.intervals, before.intervals)


def orders(folder, share):
    """The order of the keys' tiles in the first documents of a stream."""
    source = Source(
        datasets(folder), micro_tokenizer(), CONFIGS["x"], rows=2, seq_len=300, seed=3, shuffled_tiles=share
    )
    found = [image.key_sources for _ in range(8) for layout in next(source).layouts for image in layout.images]
    source.close()
    return [cross for cross in found if len(cross) > 2]


def test_the_share_of_a_stream(tmp_path):
    changed = {share: sum(cross != tuple(sorted(cross)) for cross in orders(tmp_path, share)) for share in (0, 0.5, 1)}
    num = len(orders(tmp_path, 1))
    assert changed[0] == 0 < changed[0.5] < changed[1] and changed[1] > 0.7 * num
    assert orders(tmp_path, 0.5) == orders(tmp_path, 0.5)


def test_a_recipe_shuffles(tmp_path):
    trainer = Trainer(recipe_of(tmp_path, "x", shuffled_tiles=1), log=quiet)
    trainer.source.close()
    assert trainer.source.shuffled_tiles == 1
    with pytest.raises(ValueError, match="shuffled_tiles must be from 0 to 1, got 1.5"):
        recipe_of(tmp_path, "x", shuffled_tiles=1.5)
