"""The shipped models on a GPU, eager and captured. Not one of these has run yet where no GPU was at hand."""

from pathlib import Path

import pytest
import torch

from bench.setup.gloo import run_ranks
from nvlm_runtime import NVLM
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.parallel.group import Group
from tests.model.test_model import picture

pytestmark = pytest.mark.gpu
RECEIPT = Path(__file__).parents[2] / "examples" / "receipt.png"
WAYS = [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 4}]
each_model = pytest.mark.parametrize("name", ["micro-d", "micro-x", "micro-h"])


def requests(model: NVLM) -> list:
    asked = [("What is the total?", [RECEIPT]), ("Hello?", []), ("Read tile 2.", [picture((128, 64)), RECEIPT])]
    return [model.prepare(text, images) for text, images in asked]


def answers(model: NVLM) -> list[list[int]]:
    """A batch, and one request each way to draw."""
    outputs = model.generate(requests(model), params=GenerationParams(max_new_tokens=12, ignore_eos=True))
    outputs += [model.generate("What is the tax?", [RECEIPT], max_new_tokens=12, **way) for way in WAYS]
    return [output.token_ids for output in outputs]


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_receipt_is_read(name, dtype, device):
    model = NVLM.load(name, device=device, dtype=dtype)
    assert model.generate("What is the total?", images=[RECEIPT]).text == "17.40"


@each_model
def test_the_kernels_give_the_cpu_s_logits(name, device):
    """In fp32, whose products a GPU may make in TF32 unless it is told not to: torch's default."""
    cpu, gpu = NVLM.load(name, dtype=torch.float32), NVLM.load(name, device=device, dtype=torch.float32)
    ids = cpu.prepare("What is the total?", [RECEIPT]).input_ids
    want, got = cpu.logits(input_ids=ids, images=[RECEIPT]), gpu.logits(input_ids=ids, images=[RECEIPT])
    assert (got.cpu() - want).abs().max() < 1e-3 * want.abs().max()


@each_model
def test_captured_steps_give_eager_s_tokens(name, device):
    want = answers(NVLM.load(name, device=device, dtype=torch.float32))
    model = NVLM.load(name, device=device, dtype=torch.float32, graphs=True)
    model.warmup(max_model_len=400, max_images=2)
    assert answers(model) == want
    steps = model.runner.steps.values()
    assert steps and all(step.graph is not None for step in steps)


@each_model
def test_nothing_is_captured_after_warmup(name, device):
    model = NVLM.load(name, device=device, graphs=True)
    model.warmup(max_model_len=400, max_images=1)
    for way in WAYS:
        model.generate("What is the total?", images=[RECEIPT], max_new_tokens=8, ignore_eos=True, **way)
    assert model.compiles_after_warmup == 0


def over_ranks(group: Group, name: str) -> list[list[list[int]]]:
    device = f"cuda:{group.rank}"
    torch.cuda.set_device(device)
    given = {"device": device, "dtype": torch.float32, "group": group}
    return [answers(NVLM.load(name, **given, graphs=graphs)) for graphs in (False, True)]


@each_model
def test_two_gpus_answer_as_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    want = answers(NVLM.load(name, device="cuda", dtype=torch.float32))
    for eager, captured in run_ranks(2, over_ranks, name, backend="nccl"):
        assert eager == captured == want
