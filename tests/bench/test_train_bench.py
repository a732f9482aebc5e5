"""bench.train_step measures what it says it measures. No time is asserted."""

import json
import math
from dataclasses import replace

import pytest
from PIL import Image

from bench import train_step
from bench.peers.train_contestants import STOCK, digests, without_pause
from nvlm_runtime.presets import MICRO_TEXT, MICRO_VISION
from nvlm_runtime.training.source import Source
from tests.small import CONFIGS, micro_tokenizer
from tests.training.data import datasets


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
    for seen in ("learnt", "texts", "pictures"):
        assert len(ours[seen]) == 2 and ours[seen] == plain[seen]
    assert len(set(ours["texts"])) == 2  # other documents in another round
    ours_sums, plain_sums = (
        [loss * num for loss, num in zip(row["losses"], row["learnt"], strict=True)] for row in (ours, plain)
    )
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(ours_sums, plain_sums, strict=True))
    assert ours["losses"][0] != ours["losses"][1] and ours["loss_difference"] < 1e-6 and not plain["loss_difference"]


def test_variants_see_the_same_pictures(result):
    rows = json.loads((result / "a.json").read_text())["rows"]
    d, x, h = (row["pictures"] for row in rows if row["part"] == "variants")
    assert len(d) == 2 and d == x == h


def test_digests_tell_documents_apart_and_rows_do_not_matter(tmp_path):
    found = []
    for packed, seed in ((True, 0), (False, 0), (True, 1)):
        source = Source(
            datasets(tmp_path), micro_tokenizer(), CONFIGS["d"], rows=6, seq_len=512, seed=seed, packed=packed, window=6
        )
        batch = next(source)
        source.close()
        found.append(digests(batch))
    assert found[0] == found[1] and all(found[0][name] != found[2][name] for name in ("texts", "pictures"))
    at = next(row for row, tiles in enumerate(batch.pixel_values) if len(tiles))
    batch.pixel_values[at][0, 0, 0] += 1
    assert digests(batch)["texts"] == found[2]["texts"] and digests(batch)["pictures"] != found[2]["pictures"]


def test_every_figure_is_there(result):
    saved = json.loads((result / "a.json").read_text())
    rows = saved["rows"]
    assert saved["bench"] == "train_step" and "commit" in saved["setting"]
    assert [row["contestant"] for row in rows if row["part"] == "variants"] == ["d", "x", "h"]
    for row in rows:
        assert row["waited"] is None if row["part"] == "plan" else 0 < row["waited"] < 1
        assert row["load"] >= 0 and row["recompute"] == (row["part"] == "plan")
        for key in ("documents_per_s", "tokens_a_document", "memory_mb", "memory_of_run_mb"):
            for values in (row[key], row["ratio"][key]):
                p20, p50, p80 = (values[name] for name in ("p20", "p50", "p80"))
                assert p50 is None and key.startswith("memory") or 0 < p20 <= p50 <= p80
    lengths = {row["contestant"]: row["mean_tokens"] for row in rows}
    assert [row["contestant"] for row in rows if row["part"] == "plan"] == ["d", "x", "h"]
    assert all(row["planned_mb"] > 10 for row in rows if row["part"] == "plan")
    assert lengths["x"] < lengths["d"] and lengths["h"] < lengths["d"]
    papers = [row["paper_ratio"] for row in rows if row["part"] == "variants"]
    assert papers == [1, 50.6 / 28.8, 36.2 / 28.8]
    shown = train_step.show([row for row in rows if row["part"] == "loop"])
    assert "trainer" in shown and "x" in shown.splitlines()[2]
    assert "documents_per_s" in shown and "wanted at least 1.5x" in shown and "wanted at most 0.6x" in shown
    with Image.open(result / "a.png") as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(2**20)) > 20


def test_a_ratio_is_of_a_rounds_turns():
    """The machine was twice as slow in the second round: the ratio of every round is the same, as its median is."""
    ours, loop = ({"turns": {"documents_per_s": values}} for values in ([6.0, 3.0], [2.0, 1.0]))
    assert set(train_step._ratio(ours, loop)["documents_per_s"].values()) == {3.0}
    assert train_step._ratio({"turns": {"memory_mb": []}}, {"turns": {"memory_mb": []}})["memory_mb"]["p50"] is None


def test_waiting_leaves_out_what_was_ready():
    steps = iter([{"seconds": 9.0, "waited": 0.0}] * STOCK + [{"seconds": 2.0, "waited": 1.0}] * 2)
    assert without_pause(lambda: next(steps), 2) == {"seconds": 4.0, "waited": 2.0}


def test_targets_say_what_was_missed():
    ratio = {key: {"p20": 0.5, "p50": 0.55, "p80": 0.7} for key in train_step.TARGETS}
    ratio["memory_of_run_mb"] = dict.fromkeys(("p20", "p50", "p80"))
    losses, speed, memory, run = train_step.targets({"ratio": ratio, "loss_difference": 2e-3})
    assert "0.002 apart" in losses
    assert speed.endswith("missed") and memory.endswith("met") and "not measured" in run


@pytest.mark.parametrize(
    "words",
    [
        ["--rounds", "1"],
        ["--documents", "1"],
        ["--threads", "0"],
        ["--only", "all"],
        ["--only", "loop", "--png", "a.png"],
    ],
    ids=" ".join,
)
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit) as ended:
        train_step.main(words)
    assert ended.value.code == 2 and capsys.readouterr().err
