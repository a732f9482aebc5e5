"""A checkpoint without its text model: what was trained beside a frozen one that comes from elsewhere.

"text_model" in its config.json names the text model, as `open_text_model` takes it, and the hash of its weights. The
checkpoint's own weights are the vision encoder, the projector and the cross-attention; tokenizer and chat template are
the text model's. Both are put together once, into a checkpoint like any other in the
user's cache, named after what it came from.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from nvlm_kernels.native import default_folder
from nvlm_runtime.checkpoint.assembly import Assembly, assemble, is_of_text_model, new_folder
from nvlm_runtime.checkpoint.bundled import checkpoint_folder
from nvlm_runtime.checkpoint.packed import is_packed, pack, unpack, unpack_file
from nvlm_runtime.checkpoint.sources import text_model_digest
from nvlm_runtime.checkpoint.tensors import file_entries, fill, to_file
from nvlm_runtime.checkpoint.weights import SINGLE, open_tensors, read_json, some, write_json
from nvlm_runtime.config import NVLMConfig, from_hf, to_hf
from nvlm_runtime.model.model import NVLMModel, outline
from nvlm_runtime.parallel.group import SOLO, Group
from nvlm_runtime.parallel.ranks import wait_for_loading

TEXT_MODEL = "text_model"
DTYPE = torch.bfloat16


def whole_folder(name: str | Path, cache_folder: str | Path | None = None, group: Group = SOLO) -> Path:
    """Returns the folder of a whole checkpoint. A checkpoint without its text model is first composed in the cache.

    Args:
        name: a bundled name or a checkpoint folder.
        cache_folder: where composite checkpoints are kept; None is the user's cache.
        group: the ranks that need the folder. Rank 0 composes it, the others wait.

    Raises:
        FileNotFoundError: The checkpoint or its text model does not exist.
        ValueError: The text model is not the one that the checkpoint names. No partial folder is left.
    """
    folder = checkpoint_folder(name)
    values = read_json(folder / "config.json")
    if TEXT_MODEL not in values:
        return folder
    text, text_digest = _text_model(folder, values)
    digest = hashlib.sha256((folder / "config.json").read_bytes() + (folder / SINGLE).read_bytes()).hexdigest()
    cache = default_folder() if cache_folder is None else Path(cache_folder)
    whole = cache / f"{folder.resolve().name}-{digest[:24]}"
    if group.rank:
        wait_for_loading(group)
    if not (whole / "config.json").is_file():
        if (found := text_model_digest(text)) != text_digest:
            raise ValueError(
                f"{folder} was trained beside another {text!r}: its hash is {found:.12}, not {text_digest:.12}"
            )
        assembly = _compose(folder, text)
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            assembly.save(whole)
        except (ValueError, OSError):
            if not (whole / "config.json").is_file():  # else another process was first
                raise
    if not group.rank:
        wait_for_loading(group)
    return whole


def _text_model(folder: Path, values: Mapping[str, Any]) -> tuple[str, str]:
    """Name and hash."""
    given = values[TEXT_MODEL]
    found = (given.get("name"), given.get("sha256")) if isinstance(given, dict) else (None, None)
    if not all(isinstance(each, str) and each for each in found):
        raise ValueError(f"{folder / 'config.json'}: {TEXT_MODEL!r} must give 'name' and 'sha256', got {given!r:.60}")
    return found


@torch.no_grad()
def _compose(folder: Path, text: str) -> Assembly:
    config = from_hf(read_json(folder / "config.json"))
    if config.cross is None:
        raise ValueError(f"{folder} is NVLM-D, which has learnt in its text model: it does not come without")
    if not is_packed(folder / SINGLE):
        return _compose_dense(folder, folder, config, text)
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / folder.name
        dense.mkdir()
        shutil.copy(folder / "config.json", dense)
        entries = file_entries(outline(config))
        shapes = {name: entry.shape for name, entry in entries.items() if not is_of_text_model(name)}
        unpack_file(folder / SINGLE, dense / SINGLE, shapes, DTYPE)
        return _compose_dense(dense, folder, config, text)


def _compose_dense(part: Path, folder: Path, config: NVLMConfig, text: str) -> Assembly:
    """part: the folder with dense weights. folder: the one that messages name."""
    cross = config.cross
    assert cross is not None
    assembly = assemble(
        config.variant,
        text,
        part,
        layers=cross.layers,
        placement=cross.placement,
        ffn=cross.ffn,
        positions=cross.positions,
        dtype=DTYPE,
        max_tiles=config.max_tiles,
    )
    if assembly.model.config != config:
        raise ValueError(f"{folder} and the text model {text!r} do not fit: their configs differ")
    entries = {name: entry for name, entry in file_entries(assembly.model).items() if not is_of_text_model(name)}
    parameters = dict(assembly.model.named_parameters())
    with ExitStack() as stack:
        tensors = open_tensors(part, stack)
        if wrong := set(tensors) ^ set(entries):
            raise ValueError(f"{folder} misses or should not hold {len(wrong)} tensors: {some(wrong)}")
        for name, entry in entries.items():
            if (shape := tuple(tensors[name].get_shape())) != entry.shape:
                raise ValueError(f"{name} has shape {list(shape)}, expected {list(entry.shape)}")
            fill(parameters[entry.parameter], entry, tensors[name], name, is_checked=True)
    return assembly


def save_without_text_model(model: NVLMModel, text: str | Path, folder: Path, packed: bool = False) -> None:
    """Writes what `whole_folder` composes with a text model, in bfloat16. A failure leaves no folder.

    Args:
        model: an NVLM-X or NVLM-H.
        text: the text model, as `open_text_model` takes it.
        folder: the new folder.
        packed: whether linears are stored in 8 and 4 bits (`checkpoint.packed`), which rounds their weights.

    Raises:
        ValueError: `folder` exists and is not empty, the model is an NVLM-D, or both together would not be the model,
            as when its text model has learnt.
    """
    source = str(Path(text).resolve()) if Path(text).exists() else str(text)
    wanted = _tensors(model)
    with new_folder(folder) as partial:
        tensors = {name: tensor for name, tensor in wanted.items() if not is_of_text_model(name)}
        if packed:
            linears = _linears(model) & set(tensors)
            stored = pack(tensors, linears)
            wanted |= {name: unpack(stored, name, tuple(tensors[name].shape), DTYPE) for name in linears}
            tensors = stored
        save_file(tensors, partial / SINGLE, metadata={"format": "pt"})
        named = {TEXT_MODEL: {"name": source, "sha256": text_model_digest(source)}}
        write_json(partial / "config.json", to_hf(model.config, str(DTYPE).removeprefix("torch.")) | named)
        composed = _tensors(_compose(partial, source).model)
        if wrong := {name for name in wanted if not composed[name].equal(wanted[name])}:
            raise ValueError(f"the model's text model is not {source!r} any more: {some(wrong)}")


def _linears(model: NVLMModel) -> set[str]:
    """File names of the weights of all linears."""
    weights = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name for name, entry in file_entries(model).items() if entry.parameter in weights}


def _tensors(model: NVLMModel) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return {
        name: to_file(parameters[entry.parameter], entry, DTYPE, SOLO) for name, entry in file_entries(model).items()
    }
