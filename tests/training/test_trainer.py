"""Runs of recipes: what moves and what does not, and that a stopped run goes on as if it had not been stopped."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from nvlm_runtime import NVLM
from nvlm_runtime.model.parts import part_of
from nvlm_runtime.training.checkpoint import checkpoints
from nvlm_runtime.training.objective import Objective
from nvlm_runtime.training.optimizer import Optimizer, learning_rate
from nvlm_runtime.training.recipe import bundled_recipes, read_recipe
from nvlm_runtime.training.records import BadRecord
from nvlm_runtime.training.source import Source
from nvlm_runtime.training.trainer import Trainer
from tests.training.data import write_data, write_model

VARIANTS = ("d", "x", "h")


def changes(folder, variant, out="out", **given):
    """A bundled recipe made small: a small model, a tiny dataset, twenty steps."""
    if not (folder / variant).is_dir():
        write_model(folder / variant, variant)
    if not (folder / "seen.jsonl").is_file():
        write_data(folder)
    data = f'[{{task="seen",file="{folder}/seen.jsonl"}},{{task="text",file="{folder}/text.jsonl",text_only=true}}]'
    values = {"model": folder / variant, "out": folder / out, "data": data, "steps": 20, "warmup": 2, "accumulate": 1}
    values |= {"seq_len": 300, "precision": "float32", "lr": 1e-3, "lr_min": 1e-4, "plot": "false", "text_share": 0.2}
    return [f"{key}={value}" for key, value in (values | given).items()]


def recipe_of(folder, variant, name=None, **given):
    return read_recipe(name or f"sft-{variant}", changes(folder, variant, **given))


def quiet(line):
    pass


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_recipe_runs_and_moves_only_what_it_trains(tmp_path, name):
    """Twenty steps; what it leaves alone has the same bits, and the result answers."""
    recipe = recipe_of(tmp_path, name[-1], name)
    before = {n: p.clone() for n, p in Trainer(recipe, log=quiet).model.state_dict().items()}
    trainer = Trainer(recipe, log=quiet)
    steps = []
    assert trainer.run(steps.append) == 0
    moved = {n for n, p in trainer.model.state_dict().items() if not torch.equal(p, before[n])}
    assert {part_of(n) for n in moved} == set(recipe.train)
    assert moved == set(trainer.learns), "a parameter that should learn did not"
    assert all(p.grad is None for n, p in trainer.model.named_parameters() if n not in trainer.learns)
    assert [step.step for step in steps] == list(range(1, 21))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [step.loss for step in steps]
    result = NVLM.load(tmp_path / "out", native=False)
    assert torch.equal(result.model.mlp1[1].weight, trainer.model.mlp1[1].weight)


def test_the_recipes_are_the_papers():
    """Tables 10 and 11; a batch is that many rows of one."""
    read = {name: read_recipe(name, ["model=m", "out=o", 'data=[{task="a",file="b"}]']) for name in bundled_recipes()}
    assert sorted(read) == ["pretrain-d", "pretrain-h", "pretrain-x", "sft-d", "sft-h", "sft-x"]
    table = {
        name: (r.lr, r.lr_min, r.warmup, r.beta1, r.beta2, r.weight_decay, r.clip, r.seq_len, r.steps, r.accumulate)
        for name, r in read.items()
    }
    assert table == {
        "pretrain-d": (1e-4, 2.5e-5, 500, 0.9, 0.95, 0.1, 10, 512, 20000, 2048),
        "pretrain-x": (1e-4, 1e-5, 1000, 0.9, 0.95, 0.05, 1, 512, 20000, 2048),
        "pretrain-h": (1e-4, 1e-5, 1000, 0.9, 0.98, 0.05, 1, 512, 20000, 2048),
        "sft-d": (2e-6, 2.5e-7, 1000, 0.9, 0.98, 0.1, 10, 3200, 40000, 128),
        "sft-x": (1e-5, 1e-7, 500, 0.9, 0.98, 0.05, 1, 1024, 20000, 256),
        "sft-h": (1e-5, 1e-7, 1000, 0.9, 0.98, 0.05, 1, 1280, 40000, 256),
    }
    assert [read[f"pretrain-{v}"].max_tiles for v in VARIANTS] == [1, 1, None]
    assert all("vision" not in r.train and ("decoder" in r.train) == name.startswith("sft") for name, r in read.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_vision_encoder_learns_where_it_is_asked_to(tmp_path, variant):
    """The published recipes freeze it."""
    trainer = Trainer(recipe_of(tmp_path, variant, train='["vision"]', steps=2, warmup=0), log=quiet)
    before = {n: p.clone() for n, p in trainer.model.state_dict().items()}
    trainer.run()
    moved = {n for n, p in trainer.model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == set(trainer.learns) and {part_of(n) for n in moved} == {"vision"}


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_continued_has_the_bits_of_one_that_was_not(tmp_path, variant, precision):
    given = {"steps": 9, "checkpoint_every": 4, "precision": precision, "rows": 2}
    whole = Trainer(recipe_of(tmp_path, variant, **given), log=quiet)
    whole.run()
    part = Trainer(recipe_of(tmp_path, variant, out="part", **given), log=quiet)
    for _ in range(4):
        part.step()
    part.checkpoint()
    part.step()  # lost with the process
    part.source.close()
    torch.manual_seed(99)
    again = Trainer(recipe_of(tmp_path, variant, out="part", **given), resume=True, log=quiet)
    assert again.next_step == 4
    again.run()
    got, want = parameters(again), parameters(whole)
    assert all(torch.equal(got[name], want[name]) for name in want)
    files = [load_file(tmp_path / out / "model.safetensors") for out in ("out", "part")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_learn_beside_frozen_weights(tmp_path, precision):
    """The base keeps its bits until the end; the adapter's folder on it is the checkpoint; a stopped run goes on."""
    given = {"train": "[]", "lora": '["decoder","cross.q_proj","projector"]', "lora_rank": 4, "lora_dropout": 0.1}
    given |= {"steps": 6, "checkpoint_every": 3, "precision": precision}
    trainer = Trainer(recipe_of(tmp_path, "x", **given), log=quiet)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    for _ in range(4):
        trainer.step()
    assert set(trainer.learns) == {n for n, _ in trainer.model.named_parameters()} - set(base)
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    assert all(p.any() for n, p in trainer.learns.items())
    trainer.source.close()
    whole = Trainer(recipe_of(tmp_path, "x", out="whole", **given), log=quiet)
    whole.run()
    part = Trainer(recipe_of(tmp_path, "x", out="part", **given), log=quiet)
    for _ in range(3):
        part.step()
    part.checkpoint()
    part.source.close()
    Trainer(recipe_of(tmp_path, "x", out="part", **given), resume=True, log=quiet).run()
    files = [load_file(tmp_path / out / "model.safetensors") for out in ("whole", "part")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    put_on = NVLM.load(tmp_path / "x", lora=tmp_path / "whole" / "adapter", dtype=getattr(torch, precision))
    made = NVLM.load(tmp_path / "whole", dtype=getattr(torch, precision))
    ids = made.prepare("What?").input_ids
    assert torch.equal(put_on.logits(ids), made.logits(ids))


def test_loss_falls_on_one_batch(tmp_path):
    trainer = Trainer(recipe_of(tmp_path, "x", steps=40, lr=3e-3, train='["projector","cross","decoder"]'), log=quiet)
    batch = next(trainer.source)
    trainer.source.close()

    class One:
        waited = 0.0

        def __next__(self):
            return batch

        def state(self):
            return {}

    trainer.source = One()
    losses = [trainer.step().loss for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_accumulated_micro_batches_are_one_batch(tmp_path, recompute, precision):
    """Of different numbers of learnt tokens: the mean is over all of them. Recomputing changes nothing."""
    given = {"steps": 3, "clip": 1e9, "precision": precision}
    of_loss, of_norm = (1e-5, 1e-4) if precision == "float32" else (torch.finfo(torch.bfloat16).eps, 2e-2)
    recipes = (
        recipe_of(tmp_path, "h", rows=1, accumulate=4, recompute=str(recompute).lower(), **given),
        recipe_of(tmp_path, "h", out="b", rows=4, recompute="false", **given),
    )
    small, large = (Trainer(recipe, log=quiet) for recipe in recipes)
    a, b = small.step(), large.step()
    for trainer in (small, large):
        trainer.source.close()
    assert a.learnt == b.learnt and a.tokens == b.tokens
    assert abs(a.loss - b.loss) < of_loss * b.loss
    assert abs(a.grad_norm - b.grad_norm) < of_norm * b.grad_norm


def test_bfloat16_has_masters_that_small_steps_are_not_lost_in(tmp_path):
    recipe = recipe_of(tmp_path, "d", precision="bfloat16", lr=1e-6, lr_min=1e-6, warmup=0, steps=5, weight_decay=0.0)
    trainer = Trainer(recipe, log=quiet)
    before = {name: master.clone() for name, master in trainer.optimizer.masters.items()}
    for _ in range(5):
        trainer.step()
    trainer.source.close()
    for name, master in trainer.optimizer.masters.items():
        assert master.dtype == torch.float32 and not torch.equal(master, before[name])
        assert torch.equal(trainer.learns[name], master.bfloat16())


def test_decay_leaves_vectors_alone_unless_asked(tmp_path):
    for decays in (False, True):
        recipe = recipe_of(tmp_path, "x", decay_norms_and_gates=str(decays).lower())
        trainer = Trainer(recipe, log=quiet)
        trainer.source.close()
        groups = trainer.optimizer.optimizers["adamw"].param_groups
        without = [p for g in groups if g["weight_decay"] == 0 for p in g["params"]]
        names = {n for n, p in trainer.optimizer.masters.items() if any(p is q for q in without)}
        vectors = {n for n, p in trainer.learns.items() if p.dim() < 2}
        assert names == (set() if decays else vectors) and any(n.endswith("gate") for n in vectors)


def test_muon_moves_hidden_matrices_by_orthogonal_ones(tmp_path):
    recipe = recipe_of(tmp_path, "d", muon_lr=0.01, warmup=0, weight_decay=0.0)
    trainer = Trainer(recipe, log=quiet)
    before = {name: p.detach().clone() for name, p in trainer.learns.items()}
    trainer.step()
    trainer.source.close()
    by_muon = {name for name, kind in trainer.optimizer.kinds.items() if kind == "muon"}
    matrices = {name for name, p in trainer.learns.items() if p.dim() == 2}
    assert by_muon and matrices - by_muon == {f"language_model.{n}.weight" for n in ("embed_tokens", "lm_head")}
    for name in by_muon:
        moved = (trainer.learns[name].detach() - before[name]) / (0.01 * 0.2 * max(before[name].shape) ** 0.5)
        sizes = torch.linalg.svdvals(moved)
        assert sizes[0] < 1.3 and sizes[7] > 0.5, name  # as a gradient of low rank has them, these are far apart


def test_a_run_by_muon_is_gone_on_with(tmp_path):
    whole, stopped = (
        Trainer(recipe_of(tmp_path, "x", out=out, muon_lr=0.01, steps=6), log=quiet) for out in ("whole", "stopped")
    )
    whole.run()
    for _ in range(3):
        stopped.step()
    stopped.checkpoint()
    stopped.source.close()
    Trainer(stopped.recipe, resume=True, log=quiet).run()
    ends = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "stopped")]
    assert ends[0] == ends[1]


def test_the_rate_of_a_step():
    recipe = read_recipe("sft-x", ["model=m", "out=o", 'data=[{task="a",file="b"}]', "steps=101", "warmup=10"])
    recipe = replace(recipe, lr=2.0, lr_min=0.5)
    rates = [learning_rate(recipe, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and rates[10] == 2.0 and rates[100] == 0.5
    assert rates[55] == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * 0.5)))


def test_what_is_not_finite_ends_the_run_and_moves_nothing(tmp_path, monkeypatch):
    trainer = Trainer(recipe_of(tmp_path, "d", steps=6, checkpoint_every=2), log=quiet)
    original, calls = Objective.forward, []

    def forward(self, batch, loss_rows):
        calls.append(batch)
        return original(self, batch, loss_rows) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(Objective, "forward", forward)
    with pytest.raises(ValueError, match="step 4: the loss is nan"):
        trainer.run()
    assert [path.name for path in checkpoints(trainer.folder)] == ["step-00000002", "step-00000003"]
    optimizer = Optimizer({"w": torch.nn.Parameter(torch.ones(2, 2))}, trainer.recipe)
    optimizer.masters["w"].grad = torch.full((2, 2), math.inf)
    with pytest.raises(ValueError, match="step 8: the gradients' norm is (inf|nan)"):
        optimizer.step(7)
    assert torch.equal(optimizer.masters["w"], torch.ones(2, 2))


def test_a_bad_row_ends_the_run_and_keeps_its_steps(tmp_path, monkeypatch):
    """Met in the middle of a step; mended, the run goes on with the bits of one that never met it."""
    given = {"steps": 5, "checkpoint_every": 100, "accumulate": 3}
    whole = Trainer(recipe_of(tmp_path, "d", out="whole", **given), log=quiet)
    whole.run()
    original, calls = Source.__next__, []

    def meets_a_bad_row(self):
        calls.append(original(self))
        if len(calls) == 8:
            raise BadRecord("seen.jsonl, line 7: broken")
        return calls[-1]

    monkeypatch.setattr(Source, "__next__", meets_a_bad_row)
    with pytest.raises(BadRecord, match="seen.jsonl, line 7: broken"):
        Trainer(recipe_of(tmp_path, "d", **given), log=quiet).run()
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path / "out" / "checkpoints")] == ["step-00000002"]
    again = Trainer(recipe_of(tmp_path, "d", **given), resume=True, log=quiet)
    again.run()
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lrr=3"], "unknown lrr; known are model, out, data"),
        (["lr=high"], "--set lr: 'high' is no TOML value"),
        (["steps=2.5"], "recipe: steps must be int, got 2.5"),
        (["steps=0"], "recipe: steps must be at least 1, got 0"),
        (["warmup=20"], r"warmup \(20 steps\) must end before the 20 steps do"),
        (['train=["encoder"]'], "train may name vision, projector, cross, decoder, got encoder"),
        (["lr_min=1"], "0 <= lr_min <= lr"),
        (["train=[]"], "train and lora name no part"),
        (['lora=["decoder.q_proj"]'], "decoder cannot learn both whole and by adapters"),
        (['data=[{task="a"}]'], r"recipe: data\[0\] lacks file"),
        (['data=[{task="a",file="b",weigth=1}]'], r"recipe: data\[0\]: unknown weigth; known are task, file"),
        (["text_share=1.5"], "text_share is between 0 and 1"),
        (["precision=float16"], "precision must be float32 or bfloat16, got 'float16'"),
        (["steps"], "--set takes key=value, got 'steps'"),
    ],
)
def test_recipes_are_refused_by_name(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        read_recipe("sft-x", [*changes(tmp_path, "x"), *given])


def test_runs_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="'sft-y' is no recipe: expected a TOML file or one of pretrain-d"):
        read_recipe("sft-y")
    with pytest.raises(ValueError, match="recipe lacks model, out, data: give them"):
        read_recipe("sft-x")
    with pytest.raises(ValueError, match="the recipe is for variant x, .* is NVLM-D"):
        Trainer(recipe_of(tmp_path, "d", "sft-x"), log=quiet)
    with pytest.raises(ValueError, match="this model has no cross to train"):
        Trainer(recipe_of(tmp_path, "d", train='["cross","decoder"]'), log=quiet)
    with pytest.raises(ValueError, match="holds no checkpoint to go on from"):
        Trainer(recipe_of(tmp_path, "d"), resume=True, log=quiet)
    assert not (tmp_path / "out").exists()
    trainer = Trainer(recipe_of(tmp_path, "d", steps=2, warmup=1), log=quiet)
    trainer.run()
    with pytest.raises(ValueError, match="holds a run already: --resume goes on with it"):
        Trainer(recipe_of(tmp_path, "d"), log=quiet)
    with pytest.raises(ValueError, match="the checkpoint is of another recipe: steps, lr, warmup differ"):
        Trainer(recipe_of(tmp_path, "d", lr=2e-3), resume=True, log=quiet)
    (checkpoints(trainer.folder)[-1] / "state.pt").write_bytes(b"cut")
    with pytest.raises(ValueError, match="state.pt|cannot be read"):
        Trainer(recipe_of(tmp_path, "d", steps=2, warmup=1), resume=True, log=quiet)


def start(folder, *more):
    command = [sys.executable, "-m", "nvlm_runtime", "train", "sft-x", "--threads", "1", *more]
    given = changes(folder, "x", steps=60, checkpoint_every=5, log_every=1)
    for change in given:
        command += ["--set", change]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(process.stderr.read())


def test_killed_and_stopped_processes_go_on(tmp_path):
    """Kill -9 in a step, kill -9 in the middle of writing a checkpoint, SIGTERM; then the whole run's bits."""
    whole = Trainer(recipe_of(tmp_path, "x", out="whole", steps=60, checkpoint_every=5, log_every=1), log=quiet)
    whole.run()
    process = start(tmp_path)
    read_until(process, 12)
    process.kill()
    process.wait()
    folder = tmp_path / "out" / "checkpoints"
    kept = checkpoints(folder)
    assert kept and len(kept) <= 2
    shutil.copytree(kept[-1], folder / "step-00000099.partial")  # as a kill leaves one
    (folder / "step-00000099.partial" / "state.pt").write_bytes(b"half")
    process = start(tmp_path, "--resume")
    read_until(process, 25)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume goes on from there" in err
    process = start(tmp_path, "--resume")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 61))
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_one(tmp_path, monkeypatch):
    trainer = Trainer(recipe_of(tmp_path, "d", steps=8, checkpoint_every=2), log=quiet)
    for _ in range(2):
        trainer.step()
    trainer.checkpoint()
    original = torch.save

    def cut(state, file):
        original(state, file)
        file.truncate(1000)
        raise KeyboardInterrupt  # nothing after this runs, as after a kill

    monkeypatch.setattr("nvlm_runtime.training.checkpoint.torch.save", cut)
    trainer.step()
    with pytest.raises(KeyboardInterrupt):
        trainer.checkpoint()
    monkeypatch.undo()
    trainer.source.close()
    again = Trainer(recipe_of(tmp_path, "d", steps=8, checkpoint_every=2), resume=True, log=quiet)
    assert again.next_step == 2
    again.run()
    assert [path.name for path in checkpoints(again.folder)] == ["step-00000006", "step-00000008"]


def test_the_picture_and_the_lines(tmp_path):
    from nvlm_runtime.commands.cli import main

    words = ["train", "sft-d", "--threads", str(torch.get_num_threads())]
    for change in changes(tmp_path, "d", steps=3, plot="true", log_every=1):
        words += ["--set", change]
    assert main(words) == 0
    assert (tmp_path / "out" / "metrics.png").stat().st_size > 5000
    assert main(["train", "sft-d", "--steps", "3"]) == 2
    assert main(["train", "micro"]) == 2
