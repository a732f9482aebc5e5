"""A model that several gloo processes train together learns what one process would have."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.setup.gloo import run_ranks
from nvlm_runtime.training.checkpoint import checkpoints
from nvlm_runtime.training.recipe import read_recipe
from tests.parallel import train_work
from tests.parallel.small import write
from tests.parallel.test_command import environment, is_running, ranks_of
from tests.training.test_trainer import changes

VARIANTS = ("d", "x", "h")
TRAINED = {"d": '["vision","projector","decoder"]', "x": '["vision","projector","cross","decoder"]', "h": '["cross"]'}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("training")
    for variant in VARIANTS:
        write(made / variant, variant)
    return made


# tensor-parallel ranks x data-parallel ranks: steps, variants. Of four tensor-parallel ranks pairs share a kv head.
MESHES = {"2x1": (20, "dxh"), "4x1": (6, "dx"), "2x2": (20, "dxh")}


def recipes(folder, mesh, out):
    steps, variants = MESHES[mesh]
    given = {"loss_rows": 16, "clip": 0.5, "rows": 1, "accumulate": 2, "steps": steps, "recompute": mesh == "2x2"}
    given["recompute"] = str(given["recompute"]).lower()
    return [
        read_recipe(f"sft-{v}", changes(folder, v, f"{out}{mesh}-{v}", train=TRAINED[v], **given)) for v in variants
    ]


@pytest.fixture(scope="module", params=MESHES)
def trained(request, folder):
    """Of one process and of ranks: a (loss, gradient norm) a step and recipe."""
    mesh = request.param
    tensor, data = map(int, mesh.split("x"))
    alone = [train_work.curve(train_work.trained(recipe)) for recipe in recipes(folder, mesh, "alone")]
    given = recipes(folder, mesh, "ranks"), str(folder / f"alone{mesh}-d"), data
    return mesh, alone, run_ranks(tensor * data, train_work.everything, *given)


def test_the_curve_is_one_process_s(folder, trained):
    mesh, alone, ranks = trained
    for index, want in enumerate(alone):
        curves = [torch.tensor(rank["curves"][index]) for rank in ranks]
        assert len(want) in (6, 20) and all(torch.equal(curve, curves[0]) for curve in curves)
        torch.testing.assert_close(curves[0], torch.tensor(want), rtol=1e-4, atol=0)
        assert curves[0][-1, 0] < curves[0][0, 0]
        assert (curves[0][:, 1] > 0.5).any(), "nothing was clipped"


def test_the_checkpoint_is_one_process_s(folder, trained):
    mesh, alone, _ = trained
    for variant in VARIANTS[: len(alone)]:
        name = f"{variant}/model.safetensors"
        ours, theirs = load_file(folder / f"ranks{mesh}-{name}"), load_file(folder / f"alone{mesh}-{name}")
        before = load_file(folder / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=2e-5)
            assert torch.equal(ours[key], before[key]) == torch.equal(theirs[key], before[key]), f"{key} learns, or not"


def test_a_run_that_is_gone_on_with_has_the_bits_of_one_that_was_not_stopped(folder, trained):
    mesh, alone, ranks = trained
    assert all(rank["resumed"] == rank["curves"][-1] for rank in ranks)
    name = f"ranks{mesh}-{VARIANTS[len(alone) - 1]}"
    whole, stopped = (folder / f"{name}{end}" / "model.safetensors" for end in ("", "-stopped"))
    assert whole.read_bytes() == stopped.read_bytes()


def test_what_ranks_refuse(trained):
    mesh, _, ranks = trained
    for rank in ranks:
        assert rank["other"] == "the recipe of rank 1 is not rank 0's: every rank needs the same"
        assert rank["lora"] == "recipe: adapters (lora) learn in one process; over ranks whole parts do"
        assert re.search(
            rf"step-\d+ was written by one process, and cannot be gone on with by {len(ranks)} ranks", rank["alone"]
        )
        assert "cannot be read: " in rank["damaged"]
        uneven = "must be a multiple of the 2 data-parallel ranks that share them out, got 3"
        assert rank.get("uneven", "").endswith(uneven) == (mesh == "2x2")


def test_data_parallel_ranks_share_the_rows_out(trained):
    mesh, _, ranks = trained
    tensor, data = map(int, mesh.split("x"))
    for first in range(tensor):
        peers = [rank["held"] for rank in ranks[first::tensor]]
        for name, (_, num, rows) in peers[0].items():
            assert sum(held[name][0] for held in peers) == num, name
            assert max(held[name][0] for held in peers) <= 0.6 * num or data == 1 or rows == 1


def test_another_number_of_data_parallel_ranks_goes_on(folder, trained):
    mesh, _, ranks = trained
    tensor, data = map(int, mesh.split("x"))
    if data == 1:
        return
    recipe = recipes(folder, mesh, "ranks")[-1]
    left = replace(recipe, out=f"{recipe.out}-left")
    (rest, _), again = run_ranks(tensor, train_work.gone_on_with, left, 1), torch.tensor(ranks[0]["curves"][-1][3:])
    torch.testing.assert_close(torch.tensor(rest), again, rtol=1e-5, atol=0)
    other = replace(recipe, out=f"{recipe.out}-stopped")
    assert all(
        "another number of tensor-parallel ranks than 1" in w for w in run_ranks(2, train_work.gone_on_with, other, 2)
    )


def command(folder, out, *words):
    given = changes(folder, "h", out, train=TRAINED["h"], checkpoint_every=2)
    options = [word for change in given for word in ("--set", change)]
    return [sys.executable, "-m", "nvlm_runtime", "train", "sft-h", *options, *words]


def run(folder, out, *words):
    return subprocess.run(command(folder, out, *words), capture_output=True, text=True, env=environment())


def start(folder, out, after):
    """Two ranks that have made `after` steps of very many."""
    words = ["--tp", "2", "--tp-timeout", "6", "--set", "steps=100000", "--set", "log_every=1"]
    process = subprocess.Popen(
        command(folder, out, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    for line in process.stdout:
        if line.startswith(f"step {after}/"):
            return process
    raise AssertionError(process.communicate()[1])


def lines(folder, out):
    return [json.loads(line)["loss"] for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def test_the_command_trains_over_two_ranks(folder):
    done = run(folder, "command", "--tp", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("step 20/20") == 1 and len(lines(folder, "command")) == 20
    again = run(folder, "command", "--resume")
    assert again.returncode == 2 and "was written by ranks, and cannot be gone on with by one process" in again.stderr


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_a_rank_killed_in_a_step_ends_all_and_nothing_but_the_steps_since_is_lost(folder):
    process = start(folder, "killed", after=5)
    ranks = ranks_of(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.count("\n") == 1 and said.endswith("; all ranks are stopped\n")
    assert not any(is_running(rank) for rank in ranks.values()), "an orphan"
    made = checkpoints(folder / "killed" / "checkpoints")
    assert made and not (folder / "killed" / "config.json").exists()
    steps = int(made[-1].name[5:])
    half = shutil.copytree(made[-1], made[-1].with_name("step-00099999.partial"))  # a kill while it was written
    (half / "__1_0.distcp").write_bytes(b"half")
    before = lines(folder, "killed")
    assert steps % 2 == 0 and len(before) - 2 <= steps <= len(before)
    more = ["--tp", "2", "--resume", "--set", "steps=100000", "--set", "log_every=1"]
    process = subprocess.Popen(
        command(folder, "killed", *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    for line in process.stdout:
        if line.startswith(f"step {len(before) + 3}/"):
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert re.search(r"nvlm: stopped after step \d+; --resume goes on from there\n", said)
    after = lines(folder, "killed")
    assert after[: len(before)] == before  # the steps that were made again have the same losses
    assert int(checkpoints(folder / "killed" / "checkpoints")[-1].name[5:]) == len(after)


def test_micro_models_train_in_one_process(folder, monkeypatch, capsys):
    from nvlm_runtime.commands.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "micro", "--variant", "x", "--out", str(folder / "micro")]) == 2
    assert "nvlm train micro runs in one process" in capsys.readouterr().err
