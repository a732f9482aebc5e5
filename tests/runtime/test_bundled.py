"""A checkpoint without its text model, and the whole one that is put together from both."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_runtime.assembly import assemble
from nvlm_runtime.bundled import save_without_text_model, whole_folder
from nvlm_runtime.engine import NVLM
from nvlm_runtime.weights import load
from tests.runtime.backbones import save_text_model, text_model

TOWER = "random:hidden_size=64,image_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=96"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text_model(text_model("llama", max_position_embeddings=512), tmp_path_factory.mktemp("text"))


@pytest.fixture(params="xh")
def trained(request, text):
    assembly = assemble(request.param, text, TOWER, layers=(0, 2), ffn="swiglu", dtype=torch.bfloat16)
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


def test_it_is_put_together_once(trained, text, tmp_path):
    part, cache = tmp_path / "part", tmp_path / "cache"
    save_without_text_model(trained.model, str(text), part)
    whole = whole_folder(part, cache)
    written = (whole / "model.safetensors").stat().st_mtime_ns
    assert whole_folder(part, cache) == whole and (whole / "model.safetensors").stat().st_mtime_ns == written
    tensors = load_file(part / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, part / "model.safetensors")
    assert whole_folder(part, cache) != whole  # other weights, other name


def test_what_does_not_fit(trained, text, tmp_path):
    part, cache = tmp_path / "part", tmp_path / "cache"
    save_without_text_model(trained.model, str(text), part)
    other = tmp_path / "other"
    save_text_model(text_model("llama", num_hidden_layers=5), other)
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(config | {"text_model": str(other)}))
    with pytest.raises(ValueError, match="was not trained beside the text model"):
        whole_folder(part, cache)
    (part / "config.json").write_text(json.dumps(config | {"text_model": str(tmp_path / "nowhere")}))
    with pytest.raises(FileNotFoundError, match="nowhere"):
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


def test_another_process_may_be_first(trained, text, tmp_path, monkeypatch):
    part, cache = tmp_path / "part", tmp_path / "cache"
    save_without_text_model(trained.model, str(text), part)
    whole = whole_folder(part, cache)
    kept = tmp_path / "kept"
    whole.rename(kept)
    monkeypatch.setattr(
        "nvlm_runtime.assembly.Assembly.save", lambda self, folder: (shutil.copytree(kept, folder), kept.rename(whole))
    )
    assert whole_folder(part, cache) == whole and names_in(cache) == [whole.name]


def test_d_is_nothing_without_its_text_model(text, tmp_path):
    assembly = assemble("d", text, TOWER)
    with pytest.raises(ValueError, match="NVLM-D"):
        save_without_text_model(assembly.model, str(text), tmp_path / "part")
    assert not (tmp_path / "part").exists()
