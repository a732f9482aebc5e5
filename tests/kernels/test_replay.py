"""Every step, and every batch bucket, by the rules of CUDA graphs, on the kernels' own path (the interpreter)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.proofs.replay import ReplayError, check
from bench.setup.gloo import run_ranks
from nvlm_kernels._backend import INTERPRET
from nvlm_runtime.checkpoint.weights import save
from nvlm_runtime.engine.graphs import CapturedRunner, CapturedStep
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.sampling import Draw
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.parallel.group import Group
from tests.model.test_model import picture
from tests.small import CONFIGS, micro_tokenizer, randomise

pytestmark = pytest.mark.skipif(
    not INTERPRET, reason="without a GPU the steps take the kernels' path in the interpreter"
)

ROWS = {"d": 2, "x": 2, "h": 4}  # of a batch: NVLM-H has what the others have


def engine(variant: str, **options) -> NVLM:
    """One layer of each kind, and heads of a size the kernels take."""
    config = CONFIGS[variant]
    text = replace(config.text, hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    vision = replace(config.vision, num_hidden_layers=1)
    cross = config.cross and replace(config.cross, layers=(0,), ffn="swiglu")
    model = NVLMModel(replace(config, text=text, vision=vision, cross=cross))
    return NVLM(randomise(model), micro_tokenizer(), chunk=64, graphs=True, **options)


@torch.inference_mode()
def names_of(model: NVLM, rows: int, tiles: Sequence[int] = (1, 3, 4, 5, 6, 7)) -> list[str]:
    """Of its captured steps, every one of which is checked."""
    for num_tiles in tiles:
        model.runner.project(model.runner.encode(torch.zeros(num_tiles, 3, 32, 32)))
    model.batch(rows, 200, 64).warmup()
    steps = list(model.runner.steps.values())
    for step in steps:
        check(step)
    return [step.name for step in steps]


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_every_step_can_be_replayed(variant):
    rows = ROWS[variant]
    names = set(names_of(engine(variant), rows))
    sees = ("", " sees") if variant != "d" else ("",)
    assert {f"encode {n}" for n in (1, 3, 4, 5, 6, 7)} <= names, "one an image's tile count, nothing padded"
    assert {"prefill 32", "prefill 64"} <= names
    assert {f"step {n} {kind.name}{see}" for n in (1, 2, rows) for kind in Draw for see in sees} <= names


def steps_over_ranks(group: Group, folder: Path) -> list[str]:
    """The names of a rank's captured steps, each checked in step with the other ranks'."""
    return names_of(NVLM.load(folder, group=group, chunk=32, graphs=True), tiles=(3,), rows=1)


def test_steps_over_ranks_can_be_replayed(tmp_path):
    alone = engine("h")
    save(alone.model, tmp_path)
    alone.tokenizer.save(tmp_path)
    one, other = run_ranks(2, steps_over_ranks, tmp_path)
    assert one == other and {f"step 1 {kind.name}{see}" for kind in Draw for see in ("", " sees")} <= set(one)
    assert {"encode 3", "project 3", "prefill 32"} <= set(one)


def broken(change: Callable[[CapturedRunner, CapturedStep], None]) -> CapturedStep:
    model = engine("d")
    batch = model.batch(1, 40, 0)
    step = model.runner._decode_step(batch.slots, 0, 1, False, Draw.GREEDY)
    change(model.runner, step)
    return step


def after(step: CapturedStep, more: Callable[[], None]) -> None:
    fn = step.fn

    def both() -> None:
        fn()
        more()

    step.fn = both


KEPT = []
MUTATIONS = {
    "asks the device for a value: item": lambda _, step: after(step, lambda: step.buffers["token"].sum().item()),
    "asks the device for a value: tolist": lambda _, step: after(step, lambda: step.buffers["token"].tolist()),
    "asks the device for a value: __bool__": lambda _, s: after(s, lambda: bool(s.buffers["active"].any())),
    "asks the device for a value: cpu": lambda _, step: after(step, lambda: step.buffers["token"].cpu()),
    "asks the device for a value: nonzero": lambda _, step: after(step, lambda: step.buffers["active"].nonzero()),
    "asks the device for a value: to.'cpu'": lambda _, s: after(s, lambda: s.buffers["k"].to("cpu")),
    "tensor.mask": lambda _, s: after(s, lambda: s.buffers["token"][s.buffers["active"]]),
    "copies from the host: torch.tensor": lambda _, step: after(step, lambda: torch.tensor([1])),
    "keeps a tensor": lambda _, step: after(step, lambda: KEPT.append(step.buffers["token"] + 1)),
    "changed the address of token": lambda _, s: after(s, lambda: s.buffers.update(token=s.buffers["token"].clone())),
    "changed the shape of token": lambda _, s: after(s, lambda: s.buffers.update(token=s.buffers["token"].expand(2))),
    "changed the dtype of token": lambda _, s: after(s, lambda: s.buffers.update(token=s.buffers["token"].int())),
}


@pytest.mark.parametrize("message", MUTATIONS)
@torch.inference_mode()
def test_a_step_that_breaks_a_rule_is_named(message):
    step = broken(MUTATIONS[message])
    with pytest.raises(ReplayError, match=f"step 'step 1 GREEDY' .*{message}|step 'step 1 GREEDY' keeps a tensor"):
        check(step)


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_graphs_give_the_same_tokens(variant):
    static = engine(variant)
    eager = NVLM(static.model, static.tokenizer)
    image = picture((64, 32))
    for arguments in ({"prompt": "What?", "images": [image]}, {"prompt": "Hello?", "temperature": 1.0, "seed": 5}):
        want = eager.generate(**arguments, max_new_tokens=3, ignore_eos=True)
        assert static.generate(**arguments, max_new_tokens=3, ignore_eos=True).token_ids == want.token_ids
