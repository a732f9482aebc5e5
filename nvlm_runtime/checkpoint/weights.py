"""Checkpoints in the published NVLM layout: sharded safetensors, an index, config.json, tokenizer files.

What each tensor is in memory stands in one table (`entries`). Loading checks every name and shape before it allocates,
then streams slice by slice, so host memory holds the weights once.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nvlm_runtime.checkpoint.tensors import file_entries, fill, to_file, unfilled
from nvlm_runtime.config import VisionConfig, from_hf, to_hf
from nvlm_runtime.model.model import NVLMModel, allocate, outline
from nvlm_runtime.model.quantize import check_scheme, quantize, quantized_buffers, scheme_of
from nvlm_runtime.parallel.group import SOLO, Group
from nvlm_runtime.parallel.shard import VisionSplit

Progress = Callable[[int, int], None]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED = {"I8": torch.int8, "I32": torch.int32}  # of quantised weights, beside DTYPES
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: a file of a checkpoint folder.

    Returns:
        The object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not valid JSON, or holds no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, which every checkpoint folder needs")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _shards(folder: Path) -> list[Path]:
    """The shard files in order. FileNotFoundError where there are no weights, or a shard is missing."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} has no 'weight_map' of tensor names to files")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{folder / INDEX}: 'weight_map' must name a file for every tensor")
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise FileNotFoundError(f"{folder} has no weights: expected {SINGLE} or {INDEX} with its shards")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}")
    return [folder / name for name in names]


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Opens every tensor of a folder of safetensors, sharded or not.

    Args:
        folder: the checkpoint's folder.
        stack: keeps the files open.

    Returns:
        Names to slices, which are read when they are indexed.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a damaged file, an index that does not fit its shards, or numbers that are not floating.
    """
    files = {path: _open(path, stack) for path in _shards(folder)}
    where = {name: path for path, file in files.items() for name in file.keys()}
    _check_index(folder, where)
    tensors = {name: files[path].get_slice(name) for name, path in where.items()}
    for name, tensor in tensors.items():
        if tensor.get_dtype() not in DTYPES:
            raise ValueError(f"{name} is stored as {tensor.get_dtype()}, expected one of {', '.join(DTYPES)}")
    return tensors


def some(names: Iterator[str] | set[str]) -> str:
    """Lists the first few names, for a message.

    Args:
        names: any number of them.

    Returns:
        The first four in order, and how many more there are.
    """
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_index(folder: Path, where: Mapping[str, Path]) -> None:
    if not (folder / INDEX).is_file():
        return
    weight_map = read_json(folder / INDEX)["weight_map"]
    wrong = {name for name, file in weight_map.items() if name not in where or where[name].name != file}
    if wrong:
        raise ValueError(f"{INDEX} names tensors its shards do not hold: {some(wrong)}")
    if unlisted := set(where) - set(weight_map):
        raise ValueError(f"{INDEX} does not list tensors of its shards: {some(unlisted)}")


def with_dummy_heads(vision: VisionConfig, shapes: Mapping[str, tuple[int, ...]]) -> VisionConfig:
    """Finds the number of dummy heads, which config.json does not give, by the rows of the first qkv weight.

    Args:
        vision: the configuration without them.
        shapes: of the files' tensors, by name.

    Returns:
        The configuration with `num_dummy_heads`.

    Raises:
        ValueError: the rows are not three times a number of heads.
    """
    rows = (*shapes.get("vision_model.encoder.layers.0.attn.qkv.weight", ()), 3 * vision.hidden_size)[0]
    dummy = rows // (3 * vision.head_dim) - vision.num_attention_heads
    if rows % (3 * vision.head_dim) or dummy < 0:
        raise ValueError(
            f"vision_model.encoder.layers.0.attn.qkv.weight has {rows} rows, "
            f"expected 3 x {vision.head_dim} x the heads, of which {vision.num_attention_heads} are real"
        )
    return replace(vision, num_dummy_heads=dummy)


def checkpoint_digest(folder: Path) -> str:
    """Hashes what names every tensor of a checkpoint, its dtype, shape and place; not the weights.

    Args:
        folder: the checkpoint's folder.

    Returns:
        SHA-256 in hex of config.json, and of the shards' headers and sizes.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in _shards(folder):
        with path.open("rb") as file:
            size = file.read(8)
            digest.update(path.name.encode() + size + file.read(min(int.from_bytes(size, "little"), 1 << 26)))
            digest.update(path.stat().st_size.to_bytes(8, "little"))
    return digest.hexdigest()


def load(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    group: Group = SOLO,
    vision_split: VisionSplit = "tiles",
    allocate: Callable[[NVLMModel, torch.dtype, torch.device | str], Any] = allocate,
    progress: Progress = lambda read, total: None,
) -> tuple[NVLMModel, dict[str, Any]]:
    """Loads a model from a checkpoint folder.

    A rank of a group reads its own slices alone, each file once and in order, straight to their places: host memory
    holds its share and one tensor.

    Args:
        folder: holds config.json and safetensors.
        device: where the weights go.
        dtype: of the weights; None is config.json's "torch_dtype", or the file's own where it has none.
        group: the tensor-parallel ranks.
        vision_split: what of the vision encoder the ranks share out, tiles or heads.
        allocate: makes the memory of an outline, of which a rank may hold some rows alone (`held_rows`).
        progress: called with (bytes_read, bytes_total) of the files after every tensor.

    Returns:
        The model in eval mode, and config.json.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: missing, unexpected or wrongly shaped tensors, padding heads that are not zero, a damaged file, a
            config this runtime does not know, or a group that cannot share the model out, each by name and before
            memory is allocated (padding: while it streams).
    """
    values = read_json(folder / "config.json")
    config, scheme = from_hf(values), _scheme(values)
    if scheme and group.size > 1:
        raise ValueError(f"{folder} is quantised: it is held by one process, not shared out over {group.size}")
    with ExitStack() as stack:
        files = {path: _open(path, stack) for path in _shards(folder)}
        where = {name: path for path, file in files.items() for name in file.keys()}
        shapes = {name: tuple(files[path].get_slice(name).get_shape()) for name, path in where.items()}
        _check_index(folder, where)
        if "num_dummy_heads" not in values["vision_config"]:
            config = replace(config, vision=with_dummy_heads(config.vision, shapes))
        model = outline(config, group, vision_split)
        quantize(model, scheme, filled=False)
        entries, buffers = file_entries(model), quantized_buffers(model)
        if missing := set(entries) - set(where):
            raise ValueError(f"{folder} misses {len(missing)} tensors: {some(missing)}")
        if unexpected := set(where) - set(entries):
            raise ValueError(f"{folder} holds {len(unexpected)} unexpected tensors: {some(unexpected)}")
        for name, entry in entries.items():
            if shapes[name] != entry.shape:
                raise ValueError(f"{name} has shape {list(shapes[name])}, expected {list(entry.shape)}")
            stored = files[where[name]].get_slice(name).get_dtype()
            kept = buffers[entry.parameter].dtype if entry.parameter in buffers else None
            wanted = [kind for kind, known in STORED.items() if known == kept] or list(DTYPES)
            if stored not in wanted:
                raise ValueError(f"{name} is stored as {stored}, expected one of {', '.join(wanted)}")
        first = next(iter(entries))
        dtype = dtype or _dtype(values, files[where[first]].get_slice(first).get_dtype())
        allocate(model, dtype, device)
        if config.text.tie_word_embeddings and isinstance(model.language_model.lm_head, nn.Linear):
            model.language_model.tie()
        parameters = dict(model.named_parameters()) | quantized_buffers(model)
        with torch.no_grad():
            for name in unfilled(entries, parameters):
                parameters[name].zero_()
            total, read = sum(path.stat().st_size for path in files), 0
            for name in sorted(entries, key=lambda name: (str(where[name]), name)):
                entry = entries[name]
                stored = files[where[name]].get_slice(name)
                fill(parameters[entry.parameter], entry, stored, name, is_checked=group.rank == 0)
                read += math.prod(entry.shape) * (DTYPES | STORED)[stored.get_dtype()].itemsize
                progress(read, total)
    return model.eval(), values


def _scheme(values: Mapping[str, Any]) -> dict[str, str]:
    scheme = values.get("quantization", {})
    if not isinstance(scheme, dict) or not all(isinstance(method, str) for method in scheme.values()):
        raise ValueError(f"config: 'quantization' must be an object of parts and methods, got {scheme!r:.60}")
    check_scheme(scheme)
    return scheme


def _dtype(values: Mapping[str, Any], stored: str) -> torch.dtype:
    given = values.get("torch_dtype", values.get("dtype"))
    if given is None:
        return DTYPES[stored]
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if given not in known:
        raise ValueError(f"config: torch_dtype must be one of {', '.join(known)}, got {given!r}")
    return known[given]


def save(
    model: NVLMModel,
    folder: Path,
    dtype: torch.dtype | None = None,
    run_dtype: torch.dtype | None = None,
    shard_bytes: int = 4 << 30,
    data: Group = SOLO,
) -> None:
    """Writes config.json and the weights in the published layout, dummy heads put back.

    Every file is written under a temporary name first. An index and shards that stood in the folder and are not written
    anew are deleted at the end, so that no loader mixes two checkpoints. What is quantised is written as it is held,
    under "quantization" in config.json.

    Args:
        model: without adapters. Every rank of its group calls this, and rank 0 writes.
        folder: made where it does not exist.
        dtype: of the files; None is the parameters' own.
        run_dtype: what config.json asks a loader to compute in; None is `dtype`.
        shard_bytes: the most bytes of a file, 4 GiB by default; a larger tensor has a file of its own.
        data: ranks that share out the rows of each parameter. They call this too.

    Raises:
        ValueError: the model holds adapters, for which the layout has no place.
    """
    if any(".lora_A." in name for name, _ in model.named_parameters()):
        raise ValueError("save: the model holds adapters: merge them first, or save them alone (save_lora)")
    writes = model.group.rank == data.rank == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    dtype = dtype or next(iter(parameters.values())).dtype
    buffers, entries = quantized_buffers(model), file_entries(model)
    parameters |= buffers
    shards: list[list[str]] = [[]]
    used = 0
    for name, entry in entries.items():
        kept = buffers[entry.parameter].dtype if entry.parameter in buffers else dtype
        size = math.prod(entry.shape) * kept.itemsize
        if used and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    total = 0
    for file, shard in zip(names, shards, strict=True):
        tensors = {}
        for name in shard:
            held = parameters[entries[name].parameter]
            kept = held.dtype if entries[name].parameter in buffers else dtype
            if data.size > 1:
                held = held.full_tensor()
            tensor = to_file(held, entries[name], kept, model.group)
            if writes:
                tensors[name] = tensor.cpu()
        if not writes:
            continue
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / f"{file}.partial", metadata={"format": "pt"})
        (folder / f"{file}.partial").rename(folder / file)
    model.group.wait()
    data.wait()
    if not writes:
        return
    run_dtype = str(run_dtype or dtype).removeprefix("torch.")
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for stale in set(folder.glob("model*.safetensors")) - {folder / name for name in names}:
        stale.unlink()
    values = to_hf(model.config, run_dtype)
    write_json(folder / "config.json", values | ({"quantization": scheme} if (scheme := scheme_of(model)) else {}))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file, under a temporary name first.

    Args:
        path: the file.
        values: what `json.dumps` takes.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.rename(path)
