"""A checkpoint without its text model, and the whole one that is put together from both."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_runtime.checkpoint import composite
from nvlm_runtime.checkpoint.assembly import assemble
from nvlm_runtime.checkpoint.composite import save_without_text_model, whole_folder
from nvlm_runtime.checkpoint.sources import text_model_digest
from nvlm_runtime.checkpoint.weights import load
from nvlm_runtime.engine.nvlm import NVLM
from tests.checkpoint.backbones import save_text_model, text_model

VISION_ENCODER = "random:hidden_size=64,image_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=96"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text_model(text_model("llama", max_position_embeddings=512), tmp_path_factory.mktemp("text"))


@pytest.fixture(params="xh")
def trained(request, text):
    assembly = assemble(request.param, text, VISION_ENCODER, layers=(0, 2), ffn="swiglu", dtype=torch.bfloat16)
    for parameter in assembly.model.parameters():
        if parameter.shape == (1,):  # gates
            parameter.data.fill_(0.5)
    return assembly


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_whole_is_what_was_taken_apart(trained, text, tmp_path):
    part, cache = tmp_path / "part", tmp_path / "cache"
    save_without_text_model(trained.model, str(text), part)
    assert not any(name.startswith("language_model.model.embed") for name in load_file(part / "model.safetensors"))
    whole = whole_folder(part, cache)
    model, _ = load(whole)
    wanted = dict(trained.model.named_parameters())
    assert all(parameter.equal(wanted[name]) for name, parameter in model.named_parameters())
    assert model.config == trained.model.config
    answers = [NVLM.load(part, cache_folder=cache, native=False).generate("A tile?").text for _ in range(2)]
    assert answers[0] == answers[1] == NVLM.load(whole, native=False).generate("A tile?").text
    assert names_in(cache) == [whole.name]


def test_it_is_put_together_once(trained, text, tmp_path, monkeypatch):
    part, cache = tmp_path / "part", tmp_path / "cache"
    save_without_text_model(trained.model, str(text), part)
    whole = whole_folder(part, cache)
    with monkeypatch.context() as patch:
        patch.delattr(composite, "_compose")
        assert whole_folder(part, cache) == whole
    tensors = load_file(part / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, part / "model.safetensors")
    assert whole_folder(part, cache) != whole  # other weights, other name


def test_what_does_not_fit(trained, text, tmp_path):
    part, cache = tmp_path / "part", tmp_path / "cache"
    save_without_text_model(trained.model, str(text), part)
    config = json.loads((part / "config.json").read_text())
    other = save_text_model(text_model("llama", num_hidden_layers=5), tmp_path / "other")
    for named, said in (
        ({"name": str(other)}, "was trained beside another"),
        ({"name": str(other), "sha256": text_model_digest(other)}, "their configs differ"),
        ({"name": str(tmp_path / "nowhere")}, "no text model .*nowhere"),
        ({"name": 5}, "must give 'name' and 'sha256'"),
    ):
        changed = config | {"text_model": config["text_model"] | named}
        (part / "config.json").write_text(json.dumps(changed))
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            whole_folder(part, cache)
    (part / "config.json").write_text(json.dumps(config | {"text_model": "smollm2"}))
    with pytest.raises(ValueError, match="must give 'name' and 'sha256'"):
        whole_folder(part, cache)
    (part / "config.json").write_text(json.dumps(config))
    tensors = load_file(part / "model.safetensors")
    for wrong in (
        {name: tensor for name, tensor in tensors.items() if name != "mlp1.1.weight"},
        tensors | {"extra": torch.zeros(1)},
        tensors | {"mlp1.1.weight": torch.zeros(3, 3)},
    ):
        save_file(wrong, part / "model.safetensors")
        with pytest.raises(ValueError, match=r"mlp1.1.weight|extra"):
            whole_folder(part, cache)
    assert not names_in(cache)


def test_another_text_model_of_the_same_sizes(trained, text, tmp_path):
    part, copy = tmp_path / "part", shutil.copytree(text, tmp_path / "copy")
    save_without_text_model(trained.model, copy, part)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was trained beside another"):
        whole_folder(part, tmp_path / "cache")


def test_a_text_model_that_has_learnt_is_not_left_out(trained, text, tmp_path):
    trained.model.language_model.norm.weight.data += 1
    with pytest.raises(ValueError, match="text model is not .* any more: language_model.model.norm.weight"):
        save_without_text_model(trained.model, text, tmp_path / "part")
    assert not names_in(tmp_path)


def test_another_process_may_be_first(trained, text, tmp_path, monkeypatch):
    part, cache = tmp_path / "part", tmp_path / "cache"
    save_without_text_model(trained.model, str(text), part)
    whole = whole_folder(part, cache)
    kept = tmp_path / "kept"
    whole.rename(kept)
    original = composite._compose

    def join(*given):
        kept.rename(whole)
        return original(*given)

    monkeypatch.setattr(composite, "_compose", join)
    assert whole_folder(part, cache) == whole and names_in(cache) == [whole.name]


def test_d_is_nothing_without_its_text_model(text, tmp_path):
    assembly = assemble("d", text, VISION_ENCODER)
    with pytest.raises(ValueError, match="NVLM-D"):
        save_without_text_model(assembly.model, text, tmp_path / "part")
    assert not names_in(tmp_path)
