"""The benches that start ranks: what they compare is the same, and every figure is there. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import layer, loading
from bench.setup.gloo import run_ranks
from tests.parallel.test_command import environment


def test_a_layer_over_ranks_is_the_layer(tmp_path, capsys):
    file = tmp_path / "layer.json"
    assert layer.main(["--model", "micro-x", "--ranks", "1", "3", "--rounds", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["ranks"], row["tokens"]) for row in rows] == [(1, 100), (1, 1), (3, 100), (3, 1)]
    for row in rows:
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"] and row["planned_ms"] > 0
        assert 0 < row["error"] <= 2 * row["error_of_one"]
    assert "error against fp64" in capsys.readouterr().out


def test_ranks_load_their_share_and_no_more(tmp_path, capsys):
    file = tmp_path / "loading.json"
    assert loading.main(["--model", "micro-d", "--ranks", "1", "3", "--rounds", "2", "--json", str(file)]) == 0
    plain, one, three = json.loads(file.read_text())["rows"]
    assert plain["bytes"] == one["bytes"] == three["bytes"] and plain["share_of_plain_read"]["p50"] == 1
    assert one["share"] == pytest.approx(plain["bytes"], rel=0.01) and three["share"] < 0.7 * one["share"]
    assert all(0 < row["seconds"]["p20"] <= row["seconds"]["p80"] for row in (plain, one, three))
    assert all(row["memory"] < row["share"] + row["largest"] + 2e7 for row in (one, three))
    assert "of a plain read" in capsys.readouterr().out


def generate(*words):
    command = [sys.executable, "-m", "bench.generate", "--tp", "3", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=Path(__file__).parents[2])


def test_generation_is_timed_over_ranks(tmp_path):
    file = tmp_path / "generate.json"
    done = generate("micro-x", "--quick", "--only", "vision", "decode", "--contexts", "32", "--json", str(file))
    assert done.returncode == 0 and done.stdout.count("ms a tile") == 1, done.stderr
    held = json.loads(file.read_text())
    assert held["model"] == "micro-x-tp3"
    rows = [row for part in held["parts"].values() for row in part["rows"]]
    assert {(row["measure"], row["contestant"]) for row in rows} == {("tile_ms", "ours"), ("token_ms", "ours")}
    done = generate("--shape", "micro")
    words = "bench.generate: --tp splits a checkpoint: give a model, not --shape or --against\n"
    assert (done.returncode, done.stderr) == (2, words)


@pytest.mark.parametrize("bench", [layer, loading])
def test_bad_words(bench, capsys):
    for words in (["--rounds", "0"], ["--ranks", "0"]):
        with pytest.raises(SystemExit, match="2"):
            bench.main(words)
    assert "at least 1" in capsys.readouterr().err


def ends(group, code):
    if group.rank:
        os._exit(code)
    group.all_reduce(torch.ones(1))


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_that_is_gone_is_named(code):
    with pytest.raises(AssertionError, match=f"ranks .*1.* brought nothing back; exit codes .*1: {code}"):
        run_ranks(2, ends, code)
