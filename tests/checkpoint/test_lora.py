"""LoRA: against the `peft` package in both directions, against merged weights in fp64, and what is refused."""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nvlm_runtime.analysis.profile import profile_request
from nvlm_runtime.checkpoint.assembly import assemble
from nvlm_runtime.checkpoint.lora import add_lora, load_lora, merge_lora, save_lora
from nvlm_runtime.checkpoint.weights import save
from nvlm_runtime.commands.cli import main
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.model.adapter import AdaptedLinear
from nvlm_runtime.model.model import NVLMModel
from tests.checkpoint.backbones import save_text_model, text_model
from tests.checkpoint.test_assembly import IDS, RECEIPT, VISION_ENCODER, picture
from tests.small import CONFIGS, micro_tokenizer, randomise, small_model

ALL = {"d": ("vision", "projector", "decoder"), "x": ("vision", "projector", "cross", "decoder")}
ALL["h"] = ALL["x"]


def draw(model, seed=0):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)


def engine_of(model, **options):
    return NVLM(model, micro_tokenizer(), **options)


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def text(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, save_text_model(text_model(request.param), folder)


def made(text, variant="x"):
    new = assemble(variant, text[1], VISION_ENCODER)
    return NVLM(new.model, new.tokenizer, native=False)


def distance(engine, theirs):
    with torch.inference_mode():
        return (engine.logits(IDS) - theirs(torch.tensor([IDS])).logits[0]).abs().max().item()


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("targets", [["decoder"], ["decoder.k_proj", "decoder.up_proj"]], ids=["all", "some"])
def test_peft_reads_ours(tmp_path, text, targets, rslora):
    engine, theirs = made(text), text_model(text[0])
    assert distance(engine, theirs) < 1e-4
    add_lora(engine.model, targets, 3, 5, 0.1, rslora=rslora)
    draw(engine.model)
    engine.model.eval()
    assert distance(engine, theirs) > 0.1
    save_lora(engine.model, tmp_path, text_names=True)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert distance(engine, adapted) < 1e-4
    merge_lora(engine.model)
    assert distance(engine, adapted) < 1e-4


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj", "down_proj"], r".*\.[13]\.mlp\.gate_proj"], ids=["all", "some", "re"]
)
def test_ours_reads_peft(tmp_path, text, targets, rslora):
    engine, theirs = made(text), text_model(text[0])
    options = {"r": 2, "lora_alpha": 2, "target_modules": targets, "use_rslora": rslora, "lora_dropout": 0.3}
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    draw(adapted)
    adapted.save_pretrained(tmp_path)
    assert distance(engine, adapted) > 0.1
    load_lora(engine.model, tmp_path)
    engine.model.eval()
    assert distance(engine, adapted) < 1e-4
    merge_lora(engine.model)
    assert distance(engine, adapted) < 1e-4


def tree_of(tensors):
    """Linears under the names of a checkpoint, as any code that runs it on the hub has them."""
    root = nn.Module()
    root.config = {"model_type": "nvlm"}
    for name, tensor in tensors.items():
        *path, last = name.removesuffix(".weight").split(".")
        if tensor.dim() != 2 or last in ("embed_tokens", "lm_head"):
            continue
        at = root
        for word in path:
            if not hasattr(at, word):
                at.add_module(word, nn.Module())
            at = getattr(at, word)
        linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        linear.weight.data = tensor.clone()
        at.add_module(last, linear)
    return root


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_peft_merges_what_we_merge(tmp_path, variant):
    """All parts, dummy heads and all: the checkpoint that peft merges into is the one we save."""
    cross = {} if variant == "d" else {"ffn": "swiglu"}
    model = small_model(variant, **cross)
    save(model, tmp_path / "base")
    add_lora(model, ALL[variant], 2, 3)
    draw(model)
    save_lora(model, tmp_path / "lora", base="some/where")
    base = load_file(tmp_path / "base" / "model.safetensors")
    theirs = peft.PeftModel.from_pretrained(tree_of(base), tmp_path / "lora").merge_and_unload()
    merge_lora(model)
    save(model, tmp_path / "merged")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    want = {f"{name}": tensor for name, tensor in theirs.state_dict().items()}
    assert set(want) == {n for n, t in base.items() if t.dim() == 2 and "embed_tokens" not in n and "lm_head" not in n}
    for name, tensor in ours.items():
        if name in want:
            assert not torch.equal(tensor, base[name]) and (tensor - want[name]).abs().max() < 1e-5, name
        else:
            assert torch.equal(tensor, base[name]), name
    assert want["vision_model.encoder.layers.0.attn.qkv.weight"].shape[0] == 3 * 8 * 8, "5 heads and 3 dummies"


def whole(model, engine, ids, layouts, pixels):
    return engine.model.language_model.logits(model(ids, layouts, [model.encode(pixels)]))


@pytest.mark.parametrize("parts", ["all", "vision", "projector", "cross.o_proj", "decoder.v_proj"])
@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_beside_the_weights_as_in_them(variant, parts):
    """In fp64: the same numbers, and gradients that are the merged weight's through the chain rule."""
    if parts.startswith("cross") and variant == "d":
        with pytest.raises(ValueError, match="no part of this model"):
            add_lora(small_model("d"), [parts], 2, 3)
        return
    cross = {} if variant == "d" else {"ffn": "gelu4x"}
    model = small_model(variant, **cross).double()
    engine = engine_of(model, native=False)
    prepared = engine.prepare("What is this?", [picture()])
    ids = torch.tensor([prepared.input_ids])
    pixels = torch.randn(prepared.plans[0].num_tiles, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(0)
    bare = whole(model, engine, ids, [prepared.layout], pixels)
    parameters = add_lora(model, ALL[variant] if parts == "all" else [parts], 2, 3, 0.5)
    model.eval()
    assert torch.equal(whole(model, engine, ids, [prepared.layout], pixels), bare), "a new adapter changes nothing"
    draw(model)
    weights = torch.randn_like(bare)
    beside = whole(model, engine, ids, [prepared.layout], pixels)
    (beside * weights).sum().backward()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    twin = copy.deepcopy(model)
    merge_lora(twin)
    assert not any(isinstance(module, AdaptedLinear) for module in twin.modules())
    twin.requires_grad_(True)
    merged = whole(twin, engine, ids, [prepared.layout], pixels)
    assert (merged - bare).abs().max() > 1e-3
    assert (beside - merged).abs().max() < 1e-11
    (merged * weights).sum().backward()
    seen = 0
    for path, layer in model.named_modules():
        if not isinstance(layer, AdaptedLinear):
            continue
        gradient = twin.get_submodule(path).weight.grad
        for name, (start, end) in layer.parts.items():
            a, b, wide = layer.lora_A[name], layer.lora_B[name], gradient[start:end] * 1.5
            assert torch.allclose(b.grad, wide @ a.T, rtol=1e-9, atol=1e-10), (path, name)
            assert torch.allclose(a.grad, b.T @ wide, rtol=1e-9, atol=1e-10), (path, name)
            assert wide.abs().max() > 0, (path, name)
            seen += 2
    assert seen == len(parameters)


def test_only_adapters_are_trained():
    model = small_model("x")
    engine = engine_of(copy.deepcopy(model), native=False)
    prepared = engine.prepare("What is this?", [picture()])
    ids = torch.tensor([prepared.input_ids])
    pixels = torch.randn(prepared.plans[0].num_tiles, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = add_lora(model, ALL["x"], 4, 8, generator=torch.Generator().manual_seed(0))
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(8):
        logits = model.language_model.logits(model(ids, [prepared.layout], [model.encode(pixels)]))
        loss = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(after) - set(before) == {name for name in after if ".lora_" in name}


def test_dropout_is_for_training_alone():
    model = small_model("d")
    add_lora(model, ["decoder.o_proj"], 4, 8, 0.5)
    draw(model)
    layer = model.language_model.layers[0].self_attn.o_proj
    x = torch.randn(64, 48)
    model.eval()
    assert torch.equal(layer(x), layer(x))
    want = layer(x)
    model.train()
    many = torch.stack([layer(x) for _ in range(400)])
    assert (
        not torch.equal(many[0], many[1]) and (many.mean(0) - want).abs().mean() < 0.1 * (want - many[0]).abs().mean()
    )


def test_seeds_and_first_weights():
    drawn = []
    for seed in (0, 0, 1):
        model = small_model("h")
        add_lora(model, ["cross", "vision.qkv"], 8, 8, generator=torch.Generator().manual_seed(seed))
        drawn.append({name: p for name, p in model.named_parameters() if ".lora_A." in name})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
    for name, tensor in drawn[0].items():  # PEFT's: uniform up to 1 / sqrt(K)
        bound = tensor.shape[1] ** -0.5
        assert 0.8 * bound < tensor.abs().max() <= bound, name


def test_files_round_trip(tmp_path):
    model = small_model("x")
    add_lora(model, ["projector", "vision", "cross.k_proj", "decoder.q_proj"], 2, 3.5, 0.25, rslora=True)
    draw(model)
    save_lora(model, tmp_path, base="some/where")
    other = small_model("x")
    parameters = load_lora(other, tmp_path)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {id(p) for p in other.parameters() if p.requires_grad} == {id(p) for p in parameters}
    layer = other.language_model.layers[1].self_attn.qkv_proj
    assert layer.config == model.mlp1[1].config and layer.config.dropout == 0.25 and layer.config.rslora
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name.removeprefix("base_model.model."): tuple(tensor.shape) for name, tensor in tensors.items()}
    start = "vision_model.encoder.layers.1.attn."
    assert shapes[start + "qkv.lora_B.weight"] == (192, 2) and shapes[start + "qkv.lora_A.weight"] == (2, 40)
    assert shapes[start + "proj.lora_B.weight"] == (40, 2) and shapes[start + "proj.lora_A.weight"] == (2, 64)
    assert shapes["language_model.model.layers.3.self_attn.q_proj.lora_B.weight"] == (48, 2)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "some/where" and len(values["target_modules"]) == 1 + 8 + 2 + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Beside bf16 weights the adapters stay in fp32; both ways are about as far from fp64 as the bare model is."""
    model = small_model("d").to(dtype)
    add_lora(model, ["decoder"], 2, 1)
    draw(model)
    layer = model.language_model.layers[0].mlp.gate_up_proj
    assert all(p.dtype == torch.float32 for p in layer.lora_A.values())
    x = torch.randn(32, 48).to(dtype)
    exact = copy.deepcopy(layer).double().merged()(x.double())
    beside = layer(x)
    merged = copy.deepcopy(layer).merged()
    assert beside.dtype == dtype and merged.weight.dtype == dtype
    eager = (
        nn.functional.linear(x, layer.weight).double() - nn.functional.linear(x.double(), layer.weight.double())
    ).abs()
    assert (beside.double() - exact).abs().max() <= 4 * eager.max()
    assert (merged(x).double() - exact).abs().max() <= 8 * eager.max()


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_engine_merges_or_not(tmp_path, variant):
    model = NVLM.load(f"micro-{variant}").model
    add_lora(model, ALL[variant], 4, 4)
    draw(model)
    save_lora(model, tmp_path)
    engines = [
        NVLM.load(f"micro-{variant}", lora=tmp_path),
        NVLM.load(f"micro-{variant}", lora=tmp_path, native=False),
        NVLM.load(f"micro-{variant}", lora=tmp_path, merge_lora=False),
        NVLM.load(f"micro-{variant}", lora=tmp_path, merge_lora=False, graphs=True),
    ]
    bare = NVLM.load(f"micro-{variant}")
    outputs = [
        e.generate("What is the total?", [RECEIPT], max_new_tokens=12, ignore_eos=True) for e in (*engines, bare)
    ]
    tokens = [output.token_ids for output in outputs]
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3] != tokens[4]
    ids = bare.prepare("What is the total?", [RECEIPT]).input_ids
    logits = [engine.logits(ids, [RECEIPT]) for engine in engines[1:3]]
    assert (logits[0] - logits[1]).abs().max() < 1e-3
    for wrong in ({"native": True}, {"quantize": {"decoder": "int8"}}):
        with pytest.raises(ValueError, match="merge them first"):
            NVLM.load(f"micro-{variant}", lora=tmp_path, merge_lora=False, **wrong)
    NVLM.load(f"micro-{variant}", lora=tmp_path, quantize={"decoder": "int8"})


def test_cli(capsys, tmp_path):
    model = NVLM.load("micro-d").model
    add_lora(model, ["decoder"], 4, 8)
    save_lora(model, tmp_path / "new")
    draw(model)
    save_lora(model, tmp_path / "drawn")
    answers = []
    for name in ("new", "drawn"):
        words = ["ask", RECEIPT, "What is the total?", "--lora", tmp_path / name, "--max-new-tokens", 8]
        assert main(list(map(str, words))) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == "17.40\n" != answers[1]
    assert main(["ask", "What?", "--lora", str(tmp_path / "none")]) == 2
    assert "expected a folder with adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (["encoder"], 2, 4),
            "'encoder' is no part of this model that can be adapted: expected vision, projector, cross",
        ),
        ((["decoder.qkv_proj"], 2, 4), "'decoder.qkv_proj' is no part"),
        ((["decoder", "cross.fc1"], 2, 4), "'cross.fc1' is no part"),
        ((["decoder.lm_head"], 2, 4), "'decoder.lm_head' is no part"),
        (([], 2, 4), "targets must be a list"),
        (("decoder", 2, 4), "targets must be a list"),
        ((["decoder"], 0, 4), "rank must be a whole number from 1, got 0"),
        ((["decoder"], 2.0, 4), "rank must be a whole number"),
        ((["decoder"], 2, 0), "alpha must be above 0"),
        ((["decoder"], 2, float("nan")), "alpha must be above 0"),
        ((["decoder"], 2, 4, 1.0), "dropout must be from 0 to below 1"),
    ],
)
def test_what_cannot_be_added(given, message):
    model = small_model("x")
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        add_lora(model, *given)
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing was changed"


def test_order_of_calls(tmp_path):
    model = small_model("x")
    for call in (merge_lora, lambda m: save_lora(m, tmp_path)):
        with pytest.raises(ValueError, match="holds no adapters"):
            call(model)
    add_lora(model, ["cross"], 2, 4)
    with pytest.raises(ValueError, match="holds adapters already"):
        add_lora(model, ["decoder"], 2, 4)
    with pytest.raises(ValueError, match="merge them first, or save them alone"):
        save(model, tmp_path / "whole")
    with pytest.raises(ValueError, match="cross_attn.* is no linear of the text model"):
        save_lora(model, tmp_path, text_names=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="needs merged adapters"):
        engine = engine_of(model, reuse=False, image_cache_bytes=0)
        profile_request(engine, "What?", [], GenerationParams(max_new_tokens=2))
    merge_lora(model)
    add_lora(model, ["decoder"], 2, 4)


def broken(values=None, tensors=None, cut=0, rename=None):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | (values or {})))
        found = load_file(folder / "adapter_model.safetensors")
        found = tensors(found) if tensors else found
        save_file(found, folder / "adapter_model.safetensors")
        path = folder / "adapter_model.safetensors"
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])
        if rename:
            path.rename(folder / rename)

    return change


def without(part):
    return broken(tensors=lambda found: {name: tensor for name, tensor in found.items() if part not in name})


def replaced(part, make):
    return broken(tensors=lambda found: {n: make(t).clone() if part in n else t for n, t in found.items()})


DECODER = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_"
QKV = "base_model.model.vision_model.encoder.layers.0.attn.qkv.lora_B.weight"


def with_another_layer(found):
    return found | {name.replace("layers.0", "layers.9"): tensor.clone() for name, tensor in found.items()}


def with_padding(found):
    found[QKV][191] = 1
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken({"use_dora": True}), "use_dora is True, which this runtime does not support"),
        (broken({"bias": "all"}), "bias must be 'none', got 'all'"),
        (broken({"modules_to_save": ["lm_head"]}), r"modules_to_save is \['lm_head'\]"),
        (broken({"rank_pattern": {"q_proj": 4}}), "rank_pattern is"),
        (broken({"alpha_pattern": {"q_proj": 4}}), "alpha_pattern is"),
        (broken({"fan_in_fan_out": True}), "fan_in_fan_out is True"),
        (broken({"init_lora_weights": "pissa"}), "'pissa' changes the base weights"),
        (broken({"some_new_thing": 3}), "some_new_thing is 3"),
        (broken({"peft_type": "IA3"}), "peft_type must be 'LORA', got 'IA3'"),
        (broken({"r": 4}), r"has shape \[2, \d+\], expected \[4, \d+\]: rank 4"),
        (broken({"r": None}), "has no 'r'"),
        (broken({"lora_alpha": "8"}), "alpha must be above 0, got '8'"),
        (broken({"target_modules": 3}), "target_modules must be names"),
        (broken(cut=40), "is truncated or no safetensors file"),
        (broken(rename="adapter_model.bin"), "has no adapter_model.safetensors"),
        (without(DECODER + "B"), "has a lora_A and not"),
        (without(DECODER), "lacks 1 of the linears"),
        (replaced(DECODER + "B", lambda t: t[:-8]), r"shape \[40, 2\], expected \[48, 2\]"),
        (replaced(DECODER + "A", lambda t: t * torch.inf), "must hold finite"),
        (replaced("", lambda t: t.to(torch.int8)), "must hold finite floating"),
        (broken(tensors=with_another_layer), r"layers\.9.* is no linear"),
        (broken(tensors=lambda f: f | {"base_model.model.lm_head.weight": torch.ones(1)}), "no adapter's lora_A or"),
        (broken(tensors=lambda f: {}), "holds no adapters"),
        (broken(tensors=with_padding), r"rows of padding heads \(from 168 to 192\) must be zero"),
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
def test_files_that_cannot_be_loaded(tmp_path, change, message):
    model = small_model("d")
    add_lora(model, ["decoder.q_proj", "vision.qkv"], 2, 4)
    draw(model)
    save_lora(model, tmp_path)
    change(tmp_path)
    fresh = small_model("d")
    with pytest.raises((ValueError, OSError), match=message):
        load_lora(fresh, tmp_path)
    assert not any(isinstance(module, AdaptedLinear) for module in fresh.modules())
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_other_base(tmp_path):
    config = replace(CONFIGS["d"], text=replace(CONFIGS["d"].text, intermediate_size=88))
    model = randomise(NVLMModel(config))
    add_lora(model, ["decoder.down_proj"], 2, 4)
    save_lora(model, tmp_path)
    with pytest.raises(ValueError, match=r"lora_A has shape \[2, 88\], expected \[2, 80\]"):
        load_lora(small_model("d"), tmp_path)
    x = small_model("x")
    add_lora(x, ["cross"], 2, 4)
    save_lora(x, tmp_path)
    with pytest.raises(ValueError, match="cross_attn.* is no linear of this NVLM"):
        load_lora(small_model("d"), tmp_path)
