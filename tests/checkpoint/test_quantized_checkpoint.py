"""Quantised weights on disk: what is loaded is what was saved, and what such a checkpoint is refused for."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_runtime.checkpoint.weights import load, save
from nvlm_runtime.commands.cli import main
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.quantize import quantize, scheme_of
from nvlm_runtime.parallel.group import Group
from nvlm_runtime.training.trainer import Trainer
from tests.model.test_model import picture
from tests.small import CONFIGS, micro_tokenizer, randomise, small_engine, small_model
from tests.training.test_trainer import recipe_of

SCHEMES = [{"vision": "int8_dynamic"}, {"decoder": "int4", "cross": "int8", "head": "int8"}]


@pytest.mark.parametrize("scheme", SCHEMES, ids=["vision encoder", "weights"])
@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_saved_and_loaded_it_answers_bit_for_bit(tmp_path, variant, scheme):
    scheme = {part: method for part, method in scheme.items() if (part, variant) != ("cross", "d")}
    engine = small_engine(variant)
    pixels = picture((96, 64))
    quantize(engine.model, scheme)
    ids = engine.prepare("What is it?", [pixels]).input_ids
    want = engine.logits(input_ids=ids, images=[pixels])
    save(engine.model, tmp_path, shard_bytes=1 << 16)
    engine.tokenizer.save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["quantization"] == scheme and len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = NVLM.load(tmp_path)
    assert scheme_of(again.model) == scheme
    assert torch.equal(again.logits(input_ids=ids, images=[pixels]), want)
    before, after = engine.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_a_tied_head_is_parted_from_the_embedding(tmp_path):
    config = replace(CONFIGS["d"], text=replace(CONFIGS["d"].text, tie_word_embeddings=True))
    model = randomise(NVLMModel(config))
    quantize(model, {"head": "int8"})
    save(model, tmp_path)
    again, _ = load(tmp_path)
    assert torch.equal(again.language_model.lm_head.weight, model.language_model.lm_head.weight)
    assert torch.equal(again.language_model.embed_tokens.weight, model.language_model.embed_tokens.weight)


@pytest.fixture
def folder(tmp_path):
    model = small_model("d")
    quantize(model, {"decoder": "int8"})
    save(model, tmp_path)
    micro_tokenizer().save(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "language_model.model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.scale"), f"misses 1 tensors: {NAME}.scale"),
        (lambda t: t.update({"more": t[f"{NAME}.scale"].clone()}), "holds 1 unexpected tensors: more"),
        (lambda t: t.update({f"{NAME}.scale": t[f"{NAME}.scale"][:-1].clone()}), f"{NAME}.scale has shape"),
        (lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].float()}), f"{NAME}.weight is stored as F32, exp"),
    ],
)
def test_a_damaged_quantised_checkpoint_is_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"decoder": "int3"}, "decoder can be int8, int4, got 'int3'"),
        ({"projector": "int8"}, "part must be one of vision, decoder, cross, head, got 'projector'"),
        ({"cross": "int8"}, "no floating linears in cross"),
        (["decoder"], "config: 'quantization' must be an object of parts and methods"),
        ({"decoder": 8}, "config: 'quantization' must be an object of parts and methods"),
    ],
)
def test_another_quantization_in_config_is_refused(folder, scheme, message):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization": scheme}))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_what_a_quantised_checkpoint_is_not_for(folder, tmp_path):
    with pytest.raises(ValueError, match="is quantised: it is held by one process"):
        load(folder, group=Group(0, 2))
    with pytest.raises(ValueError, match="no floating linears in decoder"):
        NVLM.load(folder, quantize={"decoder": "int4"})
    with pytest.raises(ValueError, match="quantised weights do not support adapters"):
        NVLM.load(folder, lora=tmp_path)
    recipe = replace(recipe_of(tmp_path, "d"), model=str(folder), out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="is quantised: it answers, and does not learn"):
        Trainer(recipe)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "small"
    words = ["quantize", "micro-x", "--quantize", "decoder=int4", "cross=int8", "head=int8", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["quantization"] == {"decoder": "int4", "cross": "int8", "head": "int8"}
    assert values["bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors")) < values["bytes_before"]
    assert main(["ask", "examples/receipt.png", "What is the total?", "--model", str(out)]) == 0
    assert capsys.readouterr().out == "17.40\n"
    assert main(words) == 2 and "is there already" in capsys.readouterr().err
    other = ["quantize", "micro-x", "--out", str(tmp_path / "other"), "--quantize", "head=int8", "--quantize"]
    assert main([*other, "decoder=int5"]) == 2
    assert "decoder can be int8, int4, got 'int5'" in capsys.readouterr().err
    assert main([*other, "head=int4"]) == 2 and "takes a part once" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
