"""The models that come with this package, and the folder a model is loaded from.

A model trained beside a frozen text model that another package carries comes without it: "text_model" in its
config.json names the text model as `open_backbone` takes it, its weights are tower, projector and cross-attention
alone, and tokenizer and chat template are the text model's. Both are put together once, into a checkpoint like any
other in the user's cache, under a name that is the hash of what it came from.
"""

import hashlib
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

from nvlm_kernels.native import default_folder
from nvlm_runtime.assembly import Assembly, assemble, is_of_text_model
from nvlm_runtime.backbone import SMOLLM2, smollm2_file
from nvlm_runtime.config import from_hf, to_hf
from nvlm_runtime.entries import file_entries, fill, to_file
from nvlm_runtime.model import NVLMModel
from nvlm_runtime.parallel import SOLO
from nvlm_runtime.presets import PRESETS
from nvlm_runtime.weights import SINGLE, open_tensors, read_json, some, write_json

BUNDLED = Path(__file__).parent / "models"
TEXT_MODEL = "text_model"


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a bundled model or of a path. ValueError or FileNotFoundError saying what was expected."""
    bundled = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
    if str(name) in bundled:
        return BUNDLED / str(name)
    if not isinstance(name, str | Path):
        raise ValueError(f"a model is a name or a folder, got {type(name).__name__}")
    if Path(name).is_dir():
        return Path(name)
    if str(name) in PRESETS:
        raise ValueError(f"{name} has no weights in this package: give the folder of its checkpoint")
    raise ValueError(f"unknown model {str(name)!r}: expected a checkpoint folder or one of {', '.join(bundled)}")


def whole_folder(name: str | Path, cache_folder: str | Path | None = None) -> Path:
    """As `checkpoint_folder`, of a checkpoint that has its text model: put together first where it comes without.

    cache_folder: the user's cache where it is None. Raises FileNotFoundError where the text model is not to be had, and
    ValueError where the two do not fit; nothing is left behind then.
    """
    folder = checkpoint_folder(name)
    text = read_json(folder / "config.json").get(TEXT_MODEL)
    if text is None:
        return folder
    cache = default_folder() if cache_folder is None else Path(cache_folder)
    whole = cache / f"{folder.name}-{_digest(folder, text)}"
    if not (whole / "config.json").is_file():
        partial = cache / f".{whole.name}.{os.getpid()}"
        try:
            _join(folder, text).save(partial)
            partial.rename(whole)
        except OSError:
            if not (whole / "config.json").is_file():  # else another process was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return whole


def _digest(folder: Path, text: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    files = [smollm2_file()] if text == SMOLLM2 else sorted(Path(text).iterdir())
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:24]


@torch.no_grad()
def _join(folder: Path, text: str) -> Assembly:
    values = read_json(folder / "config.json")
    config = from_hf(values)
    assembly = assemble(
        config.variant,
        text,
        folder,
        layers=config.cross.layers,
        placement=config.cross.placement,
        ffn=config.cross.ffn,
        positions=config.cross.positions,
        dtype=getattr(torch, values["torch_dtype"]),
        max_tiles=config.max_tiles,
    )
    if assembly.model.config != config:
        raise ValueError(f"{folder} was not trained beside the text model {text!r}: their configs differ")
    entries = {name: entry for name, entry in file_entries(assembly.model).items() if not is_of_text_model(name)}
    parameters = dict(assembly.model.named_parameters())
    with ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        if wrong := set(tensors) ^ set(entries):
            raise ValueError(f"{folder} misses or should not hold {len(wrong)} tensors: {some(wrong)}")
        for name, entry in entries.items():
            if tuple(tensors[name].get_shape()) != entry.shape:
                raise ValueError(f"{name} has shape {tensors[name].get_shape()}, expected {list(entry.shape)}")
            fill(parameters[entry.parameter], entry, tensors[name], name, is_checked=True)
    return assembly


def save_without_text_model(model: NVLMModel, text: str, folder: Path) -> None:
    """Writes what `whole_folder` joins with the text model `text`: weights in bfloat16, and config.json.

    Raises ValueError for NVLM-D, whose text model has learnt.
    """
    if model.config.cross is None:
        raise ValueError("NVLM-D is nothing without its text model")
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    tensors = {
        name: to_file(parameters[entry.parameter], entry, torch.bfloat16, SOLO)
        for name, entry in file_entries(model).items()
        if not is_of_text_model(name)
    }
    partial = folder / f"{SINGLE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(folder / SINGLE)
    write_json(folder / "config.json", to_hf(model.config, "bfloat16") | {TEXT_MODEL: text})
