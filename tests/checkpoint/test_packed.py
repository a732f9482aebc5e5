"""Linears packed in 8 and 4 bits: what is stored, what is read back, what is refused; and the size of the tree."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_runtime.checkpoint.composite import save_without_text_model, whole_folder
from nvlm_runtime.checkpoint.packed import is_packed, pack, unpack, unpack_file
from nvlm_runtime.checkpoint.weights import load
from tests.checkpoint.test_composite import text, trained  # noqa: F401

ROOT = Path(__file__).parents[2]
INT8, INT4 = "mlp1.1.weight", "language_model.model.layers.0.cross_attn.up_proj.weight"


def made(rows=12, columns=200):
    tensors = {name: torch.randn(rows, columns, dtype=torch.bfloat16) for name in (INT8, INT4)}
    return tensors | {"mlp1.0.weight": torch.randn(columns, dtype=torch.bfloat16)}


def is_near(dense, weight, is_int4):
    """Whether every weight is off by at most half a step of int8, or by a step of int4, whose codes end at -8 and 7."""
    weight = weight.float()
    step = weight.abs().amax(-1, keepdim=True) * (1.05 / 8 if is_int4 else 0.51 / 127)
    return bool(((dense.float() - weight).abs() <= step + 0.005 * weight.abs()).all())


def test_a_weight_is_read_back_within_a_step():
    tensors = made()
    stored = pack(tensors, {INT8, INT4})
    assert stored[INT8].dtype == torch.int8
    assert stored[INT4.replace("weight", "nibbles")].dtype == torch.int32
    assert stored["mlp1.0.weight"] is tensors["mlp1.0.weight"]
    for name, is_int4 in ((INT8, False), (INT4, True)):
        assert is_near(unpack(stored, name, tuple(tensors[name].shape), torch.float32), tensors[name], is_int4)
    assert unpack(stored, "mlp1.0.weight", (200,), torch.float32) is tensors["mlp1.0.weight"]


def test_a_file_must_hold_what_is_expected(tmp_path):
    stored, shapes = pack(made(), {INT8, INT4}), {name: tuple(tensor.shape) for name, tensor in made().items()}
    packed, dense = tmp_path / "packed.safetensors", tmp_path / "dense.safetensors"
    save_file(stored, packed)
    assert is_packed(packed) and not is_packed(tmp_path / "nowhere")
    unpack_file(packed, dense, shapes, torch.bfloat16)
    assert not is_packed(dense)
    for name, tensor in load_file(dense).items():
        assert tensor.equal(unpack(stored, name, shapes[name], torch.bfloat16))
    stem = INT4.removesuffix(".weight")
    for wrong in (
        {name: tensor for name, tensor in stored.items() if name != f"{stem}.nibbles"},
        {name: tensor for name, tensor in stored.items() if name != "mlp1.0.weight"},
        stored | {"mlp1.0.bias": torch.zeros(1)},
    ):
        save_file(wrong, packed)
        with pytest.raises(ValueError, match=r"misses or should not hold 1 tensors: "):
            unpack_file(packed, tmp_path / "never.safetensors", shapes, torch.bfloat16)
    assert not (tmp_path / "never.safetensors").exists()


@pytest.mark.parametrize("name", [INT8, INT4], ids=["int8", "int4"])
def test_a_damaged_tensor_is_named(name):
    stored, shape = pack(made(), {INT8, INT4}), (12, 200)
    scale = f"{name.removesuffix('.weight')}.scale"
    for wrong in (stored[scale][:-1], stored[scale].double()):
        with pytest.raises(ValueError, match=rf"{scale} is .*, expected "):
            unpack(stored | {scale: wrong}, name, shape, torch.bfloat16)
    with pytest.raises(ValueError, match="expected"):
        unpack(stored, name, (13, 200), torch.bfloat16)
    with pytest.raises(ValueError, match="finite"):
        pack({name: torch.full(shape, torch.inf)}, {name})


def test_a_packed_part_becomes_the_rounded_model(trained, text, tmp_path):  # noqa: F811
    part = tmp_path / "part"
    save_without_text_model(trained.model, str(text), part, packed=True)
    stored = load_file(part / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} >= {"torch.int8", "torch.int32", "torch.bfloat16"}
    model, _ = load(whole_folder(part, tmp_path / "cache"))
    wanted = dict(trained.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.dim() == 2 and (".cross_attn." in name or name.startswith(("mlp1", "vision_model.encoder"))):
            is_int4 = ".cross_attn." in name and name.split(".")[-2] in ("gate_proj", "up_proj", "down_proj")
            assert is_near(parameter, wanted[name], is_int4) and not parameter.equal(wanted[name]), name
        else:
            assert parameter.equal(wanted[name]), name


def test_the_tracked_files_fit_a_gpu_machine():
    """A GPU machine takes 64 MiB; 48 leave room for results."""
    if not (ROOT / ".git").exists():
        pytest.skip("a copy of the tree, not a checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    sizes = [(ROOT / name.decode()).stat().st_size for name in names if name and (ROOT / name.decode()).exists()]
    assert sum(sizes) <= 48 * 2**20
