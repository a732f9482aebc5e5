"""bench.experiments.tile_tags: formats are trained and asked, finished runs stay, the table says what the rows say."""

import json

import pytest
from PIL import Image

from bench.experiments import tile_tags

RUNS = [("d", "none"), ("d", "1d"), ("d", "grid"), ("d", "bbox"), ("x", "none"), ("x", "1d")]


def row(variant, tags, seed, right, steps=1):
    kinds = {"tile": [10, right], "read": [10, 0]}
    common = {"steps": steps, "rows": 8, "loss": 1.0, "seconds": 1.0}
    return {"variant": variant, "tags": tags, "seed": seed, "accuracy": right / 20, "kinds": kinds} | common


def test_the_table_is_of_the_rows(tmp_path):
    rows = [row("d", "1d", seed, right) for seed, right in enumerate((2, 4, 9))] + [row("x", "none", 0, 1)]
    first, second = tile_tags.summary(rows)
    assert (first["mean"], first["least"], first["most"], first["seeds"]) == (0.25, 0.1, 0.45, 3)
    assert first["kinds"]["tile"] == 0.5 and first["kinds"]["shape"] is None and second["variant"] == "x"
    shown = tile_tags.show(rows).splitlines()
    assert len(shown) == 4 and shown[2].split()[:6] == ["NVLM-D", "1d", "3", "25.0%", "10.0%", "45.0%"]
    tile_tags.draw(rows, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 600


def test_runs_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    told = []

    def train(variant, tags, seed, args):
        told.append((variant, tags))
        if len(told) == 3:
            raise KeyboardInterrupt
        return row(variant, tags, seed, 5)

    monkeypatch.setattr(tile_tags, "train", train)
    words = ["--seeds", "0", "--steps", "1", "--work", str(tmp_path), "--json", str(tmp_path / "a.json")]
    with pytest.raises(KeyboardInterrupt):
        tile_tags.main(words)
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 2
    assert tile_tags.main(words) == 0
    assert told == [*RUNS[:3], *RUNS[2:]]
    assert tile_tags.main(words) == 0 and len(told) == 7, "nothing is trained twice"
    assert tile_tags.main([*words, "--rows", "3"]) == 0 and len(told) == 13, "other sizes are other runs"


def test_a_format_is_trained_with_its_tags(tmp_path, monkeypatch):
    loaded = []
    original = tile_tags.evaluate
    monkeypatch.setattr(tile_tags, "evaluate", lambda model, *a, **k: loaded.append(model) or original(model, *a, **k))
    words = ["--steps", "2", "--rows", "1", "--samples", "3", "--num-documents", "24", "--vision-steps", "1"]
    args = tile_tags.parser().parse_args([*words, "--work", str(tmp_path / "work")])
    args.work.mkdir()
    for variant, tags in (("d", "bbox"), ("x", "none")):
        found = tile_tags.train(variant, tags, 0, args)
        assert loaded[-1].config.variant == variant and loaded[-1].config.tile_tags == tags
        assert sum(asked for asked, _ in found["kinds"].values()) == 3 and found["loss"] > 0


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit) as ended:
        tile_tags.main(["--steps", "0"])
    assert ended.value.code == 2 and "at least 1" in capsys.readouterr().err
