"""bench.experiments.text_only: what it holds out is never trained on, and its rows say what the models say."""

import json
import sys

import pytest
import torch
from PIL import Image

from bench.experiments import text_only
from nvlm_runtime.training.records import JsonLines
from tests.checkpoint.backbones import save_text_model, text_model


def small_text(folder, monkeypatch) -> str:
    """A token a letter, so pages are cut short."""
    monkeypatch.setattr(text_only, "LETTERS", 90)
    return str(save_text_model(text_model("qwen2", max_position_embeddings=2048), folder / "text"))


def test_held_out_pages_are_no_training_rows(tmp_path):
    text, held = (JsonLines(path) for path in text_only.write_text(tmp_path))
    asked = [{rows[i].messages[0]["content"] for i in range(len(rows))} for rows in (text, held)]
    assert len(asked[0]) == len(text) > 40 and len(asked[1]) == len(held) > 15 and not asked[0] & asked[1]


def test_a_run_on_a_small_text_model(tmp_path, monkeypatch, capsys):
    words = ["--text", small_text(tmp_path, monkeypatch), "--steps", "2", "--documents", "12", "--pages", "3"]
    words += ["--threads", "1", "--png", str(tmp_path / "a.png")]
    assert text_only.main([*words, "--json", str(tmp_path / "a.json")]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 600
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    before, alone, both, frozen = rows
    assert [row["arm"] for row in rows] == ["before", *text_only.ARMS, "NVLM-X, text model frozen"]
    assert before["moved"]["mean"] == 0 == frozen["moved"]["mean"] and frozen["same_bits"]
    for row in (alone, both):
        assert row["moved"]["mean"] != 0 and row["moved"]["p20"] <= row["moved"]["p80"]
        assert row["held_out_loss"] == pytest.approx(before["held_out_loss"] + row["moved"]["mean"])
    assert "NVLM-X, text model frozen" in capsys.readouterr().out


def test_a_picture_is_refused_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        text_only.main(["--png", "a.png"])
    assert "a chart needs matplotlib" in capsys.readouterr().err


def test_a_changed_text_model_has_other_bits(tmp_path, monkeypatch):
    """The check of the frozen model can fail: with a head that moved, it does."""
    original = text_only.train

    def train(recipe):
        model, loss = original(recipe)
        if recipe.variant == "x":
            with torch.no_grad():
                model.language_model.norm.weight[0] *= 1.5
        return model, loss

    monkeypatch.setattr(text_only, "train", train)
    words = ["--text", small_text(tmp_path, monkeypatch), "--steps", "1", "--documents", "8", "--pages", "2"]
    assert text_only.main([*words, "--threads", "1", "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["rows"][-1]["same_bits"] is False


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit) as ended:
        text_only.main(["--pages", "1"])
    assert ended.value.code == 2 and "at least 2" in capsys.readouterr().err
