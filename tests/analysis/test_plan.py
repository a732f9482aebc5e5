"""The planner against what is really allocated, published totals, and hand arithmetic."""

import json

import pytest
import torch

from bench.setup.synthetic import full_tokenizer, shape_config
from nvlm_runtime import NVLM
from nvlm_runtime.analysis.devices import DEVICES
from nvlm_runtime.analysis.plan import Workload, find_device, plan_model
from nvlm_runtime.commands.cli import main
from nvlm_runtime.model.model import NVLMModel, outline
from nvlm_runtime.parallel.group import Group
from nvlm_runtime.presets import PRESETS
from nvlm_runtime.training.recipe import trained_parts

H100 = DEVICES["h100"]


def half_a_billion(variant):
    """An engine of that shape whose weights are allocated and never written."""
    config = shape_config("qwen2-0.5b+internvit-300m", variant)
    with torch.device("meta"):
        model = NVLMModel(config).to(torch.bfloat16)
    return NVLM(model.to_empty(device="cpu").eval(), full_tokenizer(config.text.vocab_size), native=False)


@pytest.mark.parametrize("shape", ["micro", "0.5b"])
@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_weights_and_caches_are_those_that_are_allocated(variant, shape):
    """The parameters of an engine, and every tensor of a batch's caches."""
    engine = NVLM.load(f"micro-{variant}", native=False) if shape == "micro" else half_a_billion(variant)
    dtype = next(engine.model.parameters()).dtype
    plan = plan_model(engine.config, Workload(3, 1000, 7), H100, dtype=dtype)
    assert plan.bytes["weights"] == sum(p.nbytes for p in engine.model.parameters())
    rounded = -(-engine.max_image_keys // 256) * 256
    slots = engine.batch(3, 1000, rounded).slots
    assert plan.bytes["keys and values"] == slots.cache.k.nbytes + slots.cache.v.nbytes
    cross = slots.cross.k.nbytes + slots.cross.v.nbytes if slots.cross else 0
    assert plan.bytes["image keys and values"] == cross


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_of_72b(size):
    """The published parameters less the dummy heads, shared out; keys by hand: 80 layers of 8 heads of 128."""
    plan = plan_model(PRESETS["nvlm-d-72b"], Workload(4, 32767, 7), H100, size, "heads")
    real = 79_379_593_344 - 45 * 7 * 128 * (3 * 3200 + 2 + 3200)
    assert real / size <= plan.bytes["weights"] / 2 < 1.03 * real / size + 10e6
    assert plan.bytes["keys and values"] == 2 * 2 * 80 * 4 * 32768 * 8 * 128 // size
    assert plan.fits == (size > 2)


def test_training_counts_the_pictures_of_a_packed_row():
    """NVLM-X's rows of text hold more of them; a CPU's masked attention has scores; text alone has none of it."""
    parts = ("projector", "cross", "decoder")
    config, tokens = PRESETS["nvlm-x-72b"], 4 * 1024
    found = plan_model(config, Workload(4, 1024, 7), H100, 8, trains=parts).bytes
    tiles = 4 * 10 * 7  # a question of 100 tokens a picture
    assert found["vision features"] == tiles * 1024 * 3200 * 2
    assert "scores of masked attention" not in found
    cpu = plan_model(config, Workload(4, 1024, 7), find_device("cpu"), 8, trains=parts).bytes
    assert cpu["scores of masked attention"] == 8 * tokens * 7 * 256 * 8  # 64 heads over 8 ranks
    text = plan_model(config, Workload(4, 1024, 0), H100, 8, trains=parts).bytes
    assert not {"vision features", "vision activations", "image tokens"} & set(text)
    whole = plan_model(PRESETS["nvlm-d-72b"], Workload(4, 2048, 7), H100, 8, trains=("projector", "decoder")).bytes
    assert whole["vision features"] == 4 * 7 * 1024 * 3200 * 2, "1,792 image tokens: one picture a row"


def test_training_counts_what_the_stage_learns():
    config = PRESETS["nvlm-x-72b"]
    assert trained_parts(config.variant, "pretrain") == ("projector", "cross")
    with torch.device("meta"):
        model = NVLMModel(config, Group(0, 8))
    learns = sum(p.numel() for n, p in model.named_parameters() if n.startswith("mlp1.") or ".cross_attn." in n)
    plan = plan_model(config, Workload(1, 512, 1), H100, 8, trains=("projector", "cross"))
    assert (
        plan.bytes["optimizer"] == 8 * learns
        and plan.bytes["fp32 master weights"] == plan.bytes["gradients"] == 4 * learns
    )
    assert not plan.seconds


def test_groups_share_weights_gradients_and_moments_out():
    config, trains = PRESETS["nvlm-d-72b"], trained_parts("d", "sft")
    alone, shared = (
        plan_model(config, Workload(1, 4096, 7), H100, 8, "heads", trains=trains, data=data).bytes for data in (1, 4)
    )
    model = outline(config, Group(0, 8), "heads")
    whole = sum(p.numel() for p in model.parameters())
    assert shared["weights"] == pytest.approx(4 * whole / 4, rel=1e-6)  # in fp32: as many bytes as masters
    assert shared["optimizer"] == pytest.approx(alone["optimizer"] / 4, rel=1e-6)
    layers = [*model.language_model.layers, *model.vision_model.encoder.layers]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert shared["gathered weights"] == 2 * (whole - sum(sizes) + 2 * max(sizes))
    assert sum(shared.values()) < sum(alone.values())


def test_a_tokens_time_is_its_bytes():
    plan = plan_model(PRESETS["nvlm-d-72b"], Workload(1, 4096, 7), H100, 8)
    with torch.device("meta"):
        decoder = NVLMModel(PRESETS["nvlm-d-72b"], Group(0, 8)).to(torch.bfloat16).language_model
    read = sum(p.nbytes for p in decoder.parameters()) - decoder.embed_tokens.weight.nbytes
    read += 2 * 2 * 80 * 4096 * 8 * 128 // 8
    assert plan.seconds["decode step, batch of 1"] == pytest.approx(read / 3.35e12)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["nvlm-d-72b", "--tp", "3"],
            "3 ranks cannot share 64 heads and 8 kv heads evenly: this model can be",
        ),
        (["nvlm-d-72b", "--context", "40000"], "the context of this model is 32768 tokens, got 40000"),
        (["nvlm-d-72b", "--train", "sft", "--fsdp", "0"], "fsdp must be at least 1, got 0"),
        (["nvlm-d-72b", "--fsdp", "2"], "fsdp is for training only"),
        (["nvlm-d-72b", "--batch", "0"], "batch must be at least 1, got 0"),
        (["nvlm-d-72b", "--tiles", "9"], "tiles must be from 0 to 7, thumbnail included, got 9"),
        (["nvlm-d-72b", "--device", "b200"], "unknown device 'b200': expected cpu or one of a100, h100, h200"),
        (["nvlm-e-72b"], "unknown model 'nvlm-e-72b'"),
    ],
)
def test_refuses(words, said, capsys):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_command(capsys):
    assert main(["plan", "nvlm-x-72b", "--tp", "2", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["total"] == sum(values["bytes"].values()) and not values["fits"]
    assert values["suggestions"] == ["--tp 4 fits"]
    assert main(["plan", "nvlm-x-72b", "--tp", "8", "--batch", "4", "--context", "32768"]) == 0
    out = capsys.readouterr().out
    assert "It fits into 80 GB" in out and "roofline prediction, not measured: encode an image" in out
    assert main(["plan", "micro-d", "--device", "cpu", "--context", "2048", "--train", "sft"]) == 0
    assert find_device("cpu").flops is None
