"""bench.train_step measures what it says it measures. No time is asserted."""

import json
import math
from dataclasses import replace

import pytest
from PIL import Image

from bench import train_step
from nvlm_runtime.presets import MICRO_TEXT, MICRO_VISION


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Of models of the micro models' sizes; the contestants' processes read them from their folders."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["--rounds", "2", "--documents", "3", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "TEXT", replace(MICRO_TEXT, num_hidden_layers=2))
        patch.setattr(train_step, "VISION", MICRO_VISION)
        assert train_step.main([*words, "--json", str(folder / "a.json"), "--png", str(folder / "a.png")]) == 0
    return folder


def test_trainer_and_loop_make_the_same_steps(result):
    """The same documents, the same losses: also after steps of either's optimizer."""
    rows = json.loads((result / "a.json").read_text())["rows"]
    ours, plain = (row for row in rows if row["part"] == "loop")
    assert (ours["contestant"], plain["contestant"]) == ("trainer", "plain loop")
    assert ours["documents"] == plain["documents"] == 6 and ours["mean_tokens"] == plain["mean_tokens"]
    assert len(ours["losses"]) == 2
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(ours["losses"], plain["losses"], strict=True))
    assert ours["losses"][0] != ours["losses"][1]


def test_every_figure_is_there(result):
    saved = json.loads((result / "a.json").read_text())
    rows = saved["rows"]
    assert saved["bench"] == "train_step" and "commit" in saved["setting"]
    assert [row["contestant"] for row in rows if row["part"] == "variants"] == ["d", "x", "h"]
    for row in rows:
        speed, memory = row["documents_per_s"], row["memory_mb"]
        assert 0 < speed["p20"] <= speed["p50"] <= speed["p80"]
        assert memory["p50"] is None or 0 < memory["p20"] <= memory["p50"] <= memory["p80"]
    lengths = {row["contestant"]: row["mean_tokens"] for row in rows}
    assert [row["contestant"] for row in rows if row["part"] == "plan"] == ["d", "x", "h"]
    assert all(row["planned_mb"] > 10 for row in rows if row["part"] == "plan")
    assert lengths["x"] < lengths["d"] and lengths["h"] < lengths["d"]
    found = train_step.ratios([row for row in rows if row["part"] == "variants"])
    assert found["x"]["paper_documents_per_s"] == 50.6 / 28.8 and set(found) == {"x", "h"}
    shown = train_step.show([row for row in rows if row["part"] == "loop"])
    assert "trainer" in shown and "x" in shown.splitlines()[2]
    with Image.open(result / "a.png") as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(2**20)) > 20


@pytest.mark.parametrize("words", [["--rounds", "1"], ["--documents", "1"], ["--threads", "0"], ["--only", "all"]])
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit) as ended:
        train_step.main(words)
    assert ended.value.code == 2 and capsys.readouterr().err
